"""Gradients that a step finds in torch's own memory, without the Python objects for them: all that may change there."""

import ctypes
import gc

import pytest
import torch

import fusedstep


def twins(shape=(6, 4), dtype=torch.float32, **options):
    """A parameter under fusedstep.SGD, and its copy under torch's."""
    param = torch.nn.Parameter(torch.randn(shape, dtype=dtype))
    copy = torch.nn.Parameter(param.detach().clone())
    options = {"lr": 0.1, "momentum": 0.9, **options}
    return fusedstep.SGD([param], **options, backend="cpu"), torch.optim.SGD([copy], **options, foreach=False)


def both_step(mine, theirs, make_grad):
    pair = [optimizer.param_groups[0]["params"][0] for optimizer in (mine, theirs)]
    state = torch.get_rng_state()
    for param in pair:
        torch.set_rng_state(state)
        param.grad = make_grad(param)
    mine.step()
    theirs.step()
    torch.testing.assert_close(*pair)


def borrowed(optimizer):
    return optimizer._plans[0].native.borrowed()


def plain(param):
    return torch.randn_like(param)


def litter():
    """Leaves blocks full of something to whoever allocates next: padding of a new object is what was there before."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    sizes = torch.randint(64, 512, (500,)).tolist()
    blocks = [ctypes.memset(libc.malloc(size), number % 256, size) for number, size in enumerate(sizes)]
    for block in blocks:
        libc.free(block)


def test_gradients_are_borrowed_from_the_second_step_on():
    mine, theirs = twins()
    for step in range(40):
        litter()
        both_step(mine, theirs, plain)
        assert borrowed(mine) == (step > 0)


def test_a_borrowed_gradient_is_not_kept_alive():
    mine, theirs = twins()
    for _ in range(3):
        both_step(mine, theirs, plain)
    param = mine.param_groups[0]["params"][0]
    seen = []
    torch.utils.weak.weakref.finalize(param.grad.untyped_storage(), seen.append, True)
    param.grad = None
    gc.collect()
    assert seen


OTHERS = {
    "transposed": lambda p: torch.randn(p.shape[::-1], dtype=p.dtype).t(),
    "strided": lambda p: torch.randn(2 * p.shape[0], *p.shape[1:], dtype=p.dtype)[::2],
    "offset": lambda p: torch.randn(p.numel() + 3, dtype=p.dtype)[3:].view(p.shape),
    "negated": lambda p: torch._neg_view(torch.randn(p.shape, dtype=p.dtype)),
    "lazily copied": lambda p: torch._lazy_clone(torch.randn(p.shape, dtype=p.dtype)),
    "expanded": lambda p: torch.randn(1, dtype=p.dtype).expand(p.shape),
    "of inference mode": lambda p: inference(p.shape, p.dtype),
    "with its own graph": lambda p: torch.randn(p.shape, dtype=p.dtype, requires_grad=True) * 2,
    "none": lambda p: None,
}


def inference(shape, dtype):
    with torch.inference_mode():
        return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_gradient_that_looks_otherwise_is_noticed(kind):
    mine, theirs = twins()
    for _ in range(2):
        both_step(mine, theirs, plain)
        both_step(mine, theirs, OTHERS[kind])
        both_step(mine, theirs, plain)


def test_a_gradient_changed_in_place_is_noticed():
    mine, theirs = twins((5, 5))
    for _ in range(3):
        both_step(mine, theirs, plain)
    both_step(mine, theirs, lambda p: torch.randn_like(p).t_())
    both_step(mine, theirs, plain)


def test_a_parameter_changed_in_place_is_noticed():
    mine, theirs = twins((5, 5), momentum=0.0)
    for _ in range(3):
        both_step(mine, theirs, plain)
    for optimizer in (mine, theirs):
        optimizer.param_groups[0]["params"][0].data.t_()
        optimizer.param_groups[0]["params"][0].data = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).t()
    for _ in range(3):
        both_step(mine, theirs, plain)


def test_a_gradient_without_memory_is_an_error():
    mine, theirs = twins()
    for _ in range(3):
        both_step(mine, theirs, plain)
    param = mine.param_groups[0]["params"][0]
    before = param.detach().clone()
    param.grad = torch.randn_like(param)
    param.grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="gradient"):
        mine.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 1, 2, 1, 2, 1, 2), (1 << 20, 5)])
def test_every_shape(shape):
    mine, theirs = twins(shape)
    for _ in range(3):
        both_step(mine, theirs, plain)
    assert borrowed(mine) == (len(shape) < 6 and torch.Size(shape).numel() < 1 << 22)  # more dimensions lie elsewhere


def test_a_gradient_of_another_dtype_is_noticed():
    param = torch.nn.Parameter(torch.zeros(9, dtype=torch.bfloat16))
    optimizer = fusedstep.SGD([param], lr=1.0, backend="cpu")
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param.tolist() == [-3.0] * 9
    param.grad = None
    param.data = param.data.float()  # a new dtype of both
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param.tolist() == [-5.0] * 9
