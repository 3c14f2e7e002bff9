"""On a GPU: unscale, check, clip, step and what follows it, eagerly and in a captured graph."""

import math

import pytest
import torch
from on_gpu import DEVICE, captured, needs_cuda, no_waiting, on_device, warmed_up

import fusedstep
from fusedstep.cases import CASES, REDUCING
from fusedstep.verification import same_bits

pytestmark = pytest.mark.gpu
SIZES = (1, 33, 1023, 4096, 70_001, 1_000_003)

by_case = pytest.mark.parametrize("case", [*CASES, *REDUCING], ids=str)
# One of each kind: no state, one, two, three; a rule that reduces rows and columns, or rows. All have a learning rate.
KINDS = [CASES[1], CASES[3], CASES[8], CASES[10], REDUCING[3], REDUCING[6]]
by_kind = pytest.mark.parametrize("case", KINDS, ids=str)
adamw = next(case for case in CASES if case.optimizer == "AdamW")


def make(case, values, backend, **options):
    params = [torch.nn.Parameter(v.clone()) for v in values]
    return getattr(fusedstep, case.optimizer)(params, backend=backend, **{**case.options, **options})


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def random(generator, dtype=torch.float32, sizes=SIZES):
    return on_device([torch.randn(n, generator=generator) for n in sizes], dtype)


def tensors(optimizer):
    states = [v for p in params_of(optimizer) for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return [*(p.detach() for p in params_of(optimizer)), *states]


@by_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_clipped_step_is_torchs_clipping_and_step(kernel, case, dtype):
    """Gradients and parameters pull one way, and none is near zero.

    Where a gradient, with its weight decay, nearly vanishes, and with it the average of its square, an update is the
    quotient of two roundings: the last bit of the norm decides.
    """
    generator = torch.Generator().manual_seed(1)

    def away_from_zero():
        return [v.abs() + 0.5 for v in random(generator, dtype)]

    signs = [torch.randn(n, generator=generator).sign() for n in SIZES]
    signs = on_device(signs, dtype)
    values = [v * sign for v, sign in zip(away_from_zero(), signs, strict=True)]
    mine = make(case, values, kernel, max_grad_norm=0.5)
    expected = make(case, values, kernel)
    pull = -1.0 if case.options.get("maximize") else 1.0
    for _ in range(3):
        grads = [pull * v * sign for v, sign in zip(away_from_zero(), signs, strict=True)]
        for a, b, grad in zip(params_of(mine), params_of(expected), grads, strict=True):
            a.grad, b.grad = grad, grad.clone()
        mine.step()
        norm = torch.nn.utils.clip_grad_norm_(params_of(expected), 0.5)
        expected.step()
        torch.testing.assert_close(mine.grad_norm, norm, rtol=1e-5, atol=0)
    rtol = 1e-4 if dtype == torch.float32 else 1e-12
    for a, b in zip(tensors(mine), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=0.1 * rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_norm_is_exact_to_rounding_and_the_same_every_time(kernel, dtype, norm_type):
    values = random(torch.Generator().manual_seed(2), dtype)
    optimizer = make(adamw, values, kernel, max_grad_norm=1.0, norm_type=norm_type)
    for param, grad in zip(params_of(optimizer), values, strict=True):
        param.grad = grad
    flat = torch.cat([v.double() for v in values])
    norms = []
    for _ in range(20):
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert all(torch.equal(norm, norms[0]) for norm in norms)
    exact = flat.abs().max() if norm_type == math.inf else flat.norm()
    torch.testing.assert_close(norms[0].double(), exact, rtol=1e-6, atol=0)


@by_case
def test_a_scaler_leaves_check_and_unscaling_to_the_step(kernel, case):
    generator = torch.Generator().manual_seed(3)
    values = random(generator, sizes=SIZES[:4])
    pairs = []
    for kind in (fusedstep.GradScaler, torch.amp.GradScaler):
        scaler = kind(DEVICE, init_scale=1024.0, growth_interval=2)
        scaler.scale(torch.ones((), device=DEVICE))
        pairs.append((scaler, make(case, values, kernel)))
    for number in range(6):
        grads = random(generator, sizes=SIZES[:4])
        if number in (0, 3):
            grads[2][1000] = (math.inf, math.nan)[number % 2]
        for scaler, optimizer in pairs:
            for param, grad in zip(params_of(optimizer), grads, strict=True):
                param.grad = grad * scaler.get_scale()
            before = [t.clone() for t in tensors(optimizer)]
            scaler.step(optimizer)
            scaler.update()
            if number == 3:
                assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer), before, strict=True))
    assert pairs[0][0].state_dict() == pairs[1][0].state_dict()
    for a, b in zip(tensors(pairs[0][1]), tensors(pairs[1][1]), strict=True):
        assert same_bits(a, b)


@needs_cuda
@by_kind
@pytest.mark.parametrize("kept", [{}, {"zero_grads": True}, {"write_grads": True}], ids=str)
def test_a_captured_chain_is_the_eager_one(kernel, case, kept):
    """lr, scale and gradients change between replays; some gradients are not finite."""
    generator = torch.Generator().manual_seed(4)
    values = random(generator)
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9, "weights_copy": torch.bfloat16, **kept}
    lrs = [torch.tensor(0.01, device=DEVICE) for _ in range(2)]
    optimizers = [make(case, values, kernel, lr=lr, **options) for lr in lrs]
    scales = [torch.tensor(8.0, device=DEVICE) for _ in range(2)]
    for optimizer, scale in zip(optimizers, scales, strict=True):
        optimizer.grad_scale = scale
        for param in params_of(optimizer):
            param.grad = torch.zeros_like(param)
    warmed_up(lambda: [optimizer.step() for _ in range(3) for optimizer in optimizers])
    graph = captured(optimizers[0].step)
    on_gpu = torch.Generator(DEVICE).manual_seed(5)
    for number in range(30):
        grads = [torch.randn(n, generator=on_gpu, device=DEVICE) for n in SIZES]
        if number % 7 == 3:
            grads[number % len(SIZES)][-1] = (math.inf, -math.inf, math.nan)[number % 3]
        for optimizer, lr, scale in zip(optimizers, lrs, scales, strict=True):
            lr.fill_(0.01 / (1 + number))
            scale.fill_(2.0 ** (number % 5))
            for param, grad in zip(params_of(optimizer), grads, strict=True):
                param.grad.copy_(grad * scale)
        graph.replay()
        optimizers[1].step()
        assert same_bits(optimizers[0].grad_norm, optimizers[1].grad_norm)
    assert all(not same_bits(p.detach(), v) for p, v in zip(params_of(optimizers[0]), values, strict=True))
    for a, b in zip(tensors(optimizers[0]), tensors(optimizers[1]), strict=True):
        assert same_bits(a, b)
    for a, b in zip(params_of(optimizers[0]), params_of(optimizers[1]), strict=True):
        assert same_bits(a.grad, b.grad)
        assert same_bits(optimizers[0].copies[a], optimizers[1].copies[b])


@needs_cuda
def test_a_step_that_clips_does_not_wait_for_the_device(kernel):
    values = random(torch.Generator().manual_seed(5))
    optimizer = make(adamw, values, kernel, max_grad_norm=1.0, ema_decay=0.9)
    for param in params_of(optimizer):
        param.grad = torch.randn_like(param)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waiting():
        for _ in range(5):
            optimizer.step()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]) == before


@needs_cuda
def test_one_norm_over_several_devices(kernel):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    params = [torch.nn.Parameter(torch.ones(1000, device=f"cuda:{i}")) for i in range(2)]
    optimizer = fusedstep.SGD(params, 1.0, max_grad_norm=1.0, backend=kernel)
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(8000.0))
    for param in params:
        torch.testing.assert_close(param.detach(), torch.full_like(param, 1.0 - 2.0 / math.sqrt(8000.0)))


@needs_cuda
@pytest.mark.parametrize("norm_type", [2, math.inf])
@pytest.mark.parametrize("order", [("cpu", DEVICE), (DEVICE, "cpu")], ids=str)
def test_one_norm_over_the_host_and_a_busy_gpu(norm_type, order):
    params = [torch.nn.Parameter(torch.ones(1000, device=device)) for device in order]
    optimizer = fusedstep.SGD(params, 1.0, max_grad_norm=1.0, norm_type=norm_type)
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    for size in (2.0, 3.0):  # in the second step nothing is built, which would wait for the GPU
        with torch.no_grad():
            for param in params:
                param.fill_(1.0)
                param.grad = torch.zeros_like(param)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        for param in params:
            param.grad.fill_(4.0 * size)
        optimizer.step()
        norm = size if norm_type == math.inf else size * math.sqrt(2000.0)
        assert optimizer.grad_norm.item() == pytest.approx(norm)
        for param in params:
            torch.testing.assert_close(param.detach(), torch.full_like(param, 1.0 - size / (norm + 1e-6)))
