"""Gradients that a step finds in torch's own memory, without the Python objects for them: all that may change there."""

import ctypes
import gc
import subprocess
import sys

import pytest
import torch

import fusedstep
from fusedstep.backends.plan import KernelPlan


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
    return optimizer.stepper.plans[0].native.borrowed()


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


def test_a_gradient_permuted_otherwise_than_the_weight_is_noticed():
    """Both of the same sizes and in no plain order: strides alone tell them apart."""

    def laid_out(shape, *order):
        back = [order.index(dim) for dim in range(len(shape))]
        return torch.randn([shape[dim] for dim in order]).permute(back)

    pair = [torch.nn.Parameter(laid_out((4, 4, 4), 0, 2, 1)) for _ in range(2)]
    pair[1].data.copy_(pair[0].data)
    mine = fusedstep.SGD(pair[:1], lr=0.1, momentum=0.9, backend="cpu")
    theirs = torch.optim.SGD(pair[1:], lr=0.1, momentum=0.9, foreach=False)
    for order in [(0, 2, 1), (0, 2, 1), (2, 1, 0), (0, 2, 1), (1, 0, 2)]:
        both_step(mine, theirs, lambda p, order=order: laid_out(p.shape, *order))


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


def groups_of(make):
    """An optimizer with three groups, each of which takes a plan of its own."""
    torch.manual_seed(0)
    shapes = [(6, 4), (3,), (), (0, 3), (2, 1, 5), (1 << 10,)]
    dtypes = [torch.float32, torch.float64, torch.float32]
    groups = [[torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes] for dtype in dtypes]
    settings = [{"lr": 0.01}, {"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.03, "maximize": True}]
    return make([{"params": params, **more} for params, more in zip(groups, settings, strict=True)])


def each_param(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_grads(optimizer, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for index, param in enumerate(each_param(optimizer)):
        grad = torch.randn(param.shape, dtype=param.dtype, generator=generator)
        param.grad = None if index in without else grad


def trio(steps=3):
    mine, theirs = groups_of(fusedstep.AdamW), groups_of(torch.optim.AdamW)
    for seed in range(steps):
        step_pair(mine, theirs, seed)
    return mine, theirs


def step_pair(mine, theirs, seed, without=()):
    for optimizer in (mine, theirs):
        give_grads(optimizer, seed, without)
        optimizer.step()
    torch.testing.assert_close(each_param(mine), each_param(theirs))


@pytest.fixture
def no_way_back(monkeypatch):
    """Steps that are made in one native call, or not at all."""

    def refuse(*_):
        raise AssertionError("a gradient was gathered by itself")

    return lambda: monkeypatch.setattr(KernelPlan, "gather", refuse)


def test_steps_of_several_groups_are_one_native_call(no_way_back):
    mine, theirs = trio()
    no_way_back()
    for seed in range(3, 8):
        step_pair(mine, theirs, seed)
        assert mine.kernel_calls == 3


def test_gradients_come_and_go(no_way_back):
    mine, theirs = trio()
    no_way_back()
    for seed, without in enumerate([(0, 1), (), range(6, 12), range(18), (5, 17), ()], start=3):
        step_pair(mine, theirs, seed, without)
        assert mine.kernel_calls == len({index // 6 for index in range(18) if index not in without})


def test_exactly_the_written_parameters_have_a_new_version():
    mine, _ = trio()
    for seed, without in enumerate([(), (0, 7, 17), range(18)], start=3):
        before = [param._version for param in each_param(mine)]
        give_grads(mine, seed, without)
        mine.step()
        after = [param._version for param in each_param(mine)]
        assert after == [version + (index not in without) for index, version in enumerate(before)]


def test_a_saved_tensor_notices_a_step_of_many():
    mine, _ = trio()
    param = each_param(mine)[0]
    loss = (param * param).sum()
    give_grads(mine, 9)
    mine.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


FAULTS = {
    "a gradient lost its memory": lambda p, state: p.grad.untyped_storage().resize_(0),
    "a state lost its memory": lambda p, state: state["exp_avg_sq"].untyped_storage().resize_(0),
    "the weight lost its memory": lambda p, state: p.untyped_storage().resize_(0),
    "a state has another shape": lambda p, state: state.update(exp_avg=torch.zeros(7, 5)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_last_group_leaves_the_first_as_it_was(fault):
    mine, _ = trio()
    give_grads(mine, 3)
    param = each_param(mine)[-1]
    groups = mine.param_groups[:2]
    healthy = [p for group in groups for p in group["params"]]
    kept = [value for p in healthy for value in mine.state[p].values()]
    before = [tensor.detach().clone() for tensor in (*healthy, *kept)], [p._version for p in healthy]
    FAULTS[fault](param, mine.state[param])
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError)):
            mine.step()
        assert [p._version for p in healthy] == before[1]
        torch.testing.assert_close([*healthy, *kept], before[0], rtol=0, atol=0)


def swapped(state):
    torch.utils.swap_tensors(state["exp_avg"], torch.full_like(state["exp_avg"], 0.5))


def resized(state):
    storage = state["exp_avg"].untyped_storage()
    size = storage.nbytes()
    kept = state["exp_avg"].clone()
    storage.resize_(size + (1 << 16))
    state["exp_avg"].copy_(kept)


def moved(state):
    state["exp_avg"].set_(torch.full((2 * state["exp_avg"].numel(),), 0.25)[3 : 3 + state["exp_avg"].numel()])


EDITS = {
    "other data": lambda state: setattr(state["exp_avg"], "data", torch.full_like(state["exp_avg"], 0.5)),
    "another tensor": lambda state: state.update(exp_avg=torch.full_like(state["exp_avg"], 0.5)),
    "other numbers": lambda state: state["exp_avg"].fill_(0.5),
    "another count": lambda state: state.update(step=torch.tensor(100.0)),
    "swapped": swapped,
    "resized": resized,
    "moved": moved,
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_state_edited_between_two_steps_is_noticed(edit):
    mine, theirs = trio()
    for seed in (3, 4):
        for optimizer in (mine, theirs):
            EDITS[edit](optimizer.state[each_param(optimizer)[17]])
        step_pair(mine, theirs, seed)
        step_pair(mine, theirs, seed + 10)


def test_a_state_that_moves_within_its_storage_is_noticed():
    mine, theirs = trio()
    for optimizer in (mine, theirs):
        state = optimizer.state[each_param(optimizer)[17]]
        n = state["exp_avg"].numel()
        state["exp_avg"].set_(torch.linspace(0, 1, 2 * n)[:n])
    step_pair(mine, theirs, 3)
    step_pair(mine, theirs, 4)
    for optimizer in (mine, theirs):
        state = optimizer.state[each_param(optimizer)[17]]
        storage = state["exp_avg"].untyped_storage()
        state["exp_avg"].set_(storage, state["exp_avg"].numel(), state["exp_avg"].shape)
    step_pair(mine, theirs, 5)
    step_pair(mine, theirs, 6)


ODD = {
    "sparse": lambda grad: grad.to_sparse(),
    "transposed": lambda grad: grad.t().contiguous().t(),
    "expanded": lambda grad: grad[:1].expand(grad.shape),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_gradient_that_needs_a_look_is_taken_beside_others_that_need_none(odd):
    def make(params):
        return fusedstep.Adagrad(params) if odd == "sparse" else fusedstep.SGD(params)

    torch.manual_seed(1)
    first = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(4, 3))]
    second = [torch.nn.Parameter(param.detach().clone()) for param in first]
    mine = make([{"params": [param]} for param in first])
    theirs = (torch.optim.Adagrad if odd == "sparse" else torch.optim.SGD)([{"params": [p]} for p in second])
    for step in range(8):
        for p, q in zip(first, second, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step % 3 == 2:
            first[1].grad = grad = ODD[odd](first[1].grad)
            second[1].grad = grad.to_dense()
        mine.step()
        theirs.step()
        torch.testing.assert_close(first, second)


def test_a_group_with_much_work_goes_with_a_small_one():
    make = {fusedstep.SGD: None, torch.optim.SGD: None}
    for cls in make:
        torch.manual_seed(2)
        params = [torch.nn.Parameter(torch.randn(n)) for n in (9, (1 << 22) + 5)]
        optimizer = cls([{"params": [param]} for param in params], lr=0.1, momentum=0.9)
        for seed in range(4):
            give_grads(optimizer, seed)
            optimizer.step()
        make[cls] = params
    mine, theirs = make.values()
    torch.testing.assert_close(mine, theirs)


def test_many_kinds_of_gradients_are_told_apart():
    """Dtypes that come in turn, each after the other was seen: what is remembered of one must not do for another."""
    mine = fusedstep.SGD([p := torch.nn.Parameter(torch.zeros(8))], lr=1.0, backend="cpu")
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    order = [0, 0, 1, 1, 0, 2, 3, 3, 2, 0, 1, 3, 0, 0]
    for number, index in enumerate(order, start=1):
        grad = torch.ones(8, dtype=dtypes[index])
        set_grad_of_any_dtype(p, grad)
        mine.step()
        assert p.tolist() == [-float(number)] * 8


def set_grad_of_any_dtype(param, grad):
    """torch lets a gradient differ from its parameter in dtype only where it is told so, or by the back door."""
    param.grad = None
    param.grad = torch.zeros_like(param)
    param.grad.data = grad


def test_where_torchs_words_are_not_found_torch_is_asked():
    code = """
import torch
del torch._neg_view
import fusedstep
pairs = []
for cls in (fusedstep.AdamW, torch.optim.AdamW):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(6, 4), (3,), ()]]
    optimizer = cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}])
    for step in range(6):
        for param in params:
            param.grad = torch.randn_like(param)
        if step == 4:
            optimizer.state[params[0]]["exp_avg"].data = torch.full_like(params[0], 0.5)
            params[1].data = torch.ones(3)
        versions = [param._version for param in params]
        optimizer.step()
        rises = {param._version - version for param, version in zip(params, versions)}
        assert cls.__module__.startswith('torch.') or rises == {1}
    pairs.append(params)
torch.testing.assert_close(*pairs)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
