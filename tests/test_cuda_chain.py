"""On a GPU: unscale, check, clip, step and what follows it, eagerly and in a captured graph.

They have been written without a GPU at hand: none of them has run yet.
"""

import math

import pytest
import torch

import fusedstep
from fusedstep.backends import BACKENDS
from fusedstep.cases import CASES, REDUCING
from fusedstep.verification import same_bits

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SIZES = (1, 33, 1023, 4096, 70_001, 1_000_003)

by_case = pytest.mark.parametrize("case", [*CASES, *REDUCING], ids=str)
adamw = next(case for case in CASES if case.optimizer == "AdamW")


@pytest.fixture(params=["cuda", "triton"])
def kernel(request):
    reasons = BACKENDS[request.param].reasons(torch.device(DEVICE))
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


def make(case, values, backend, **options):
    params = [torch.nn.Parameter(v.clone()) for v in values]
    return getattr(fusedstep, case.optimizer)(params, backend=backend, **{**case.options, **options})


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def random(generator, dtype=torch.float32, sizes=SIZES):
    return [torch.randn(n, generator=generator).to(DEVICE, dtype) for n in sizes]


def tensors(optimizer):
    states = [v for p in params_of(optimizer) for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return [*(p.detach() for p in params_of(optimizer)), *states]


@pytest.mark.sanitizer
@by_case
def test_a_clipped_step_is_torchs_clipping_and_step(kernel, case):
    generator = torch.Generator().manual_seed(1)
    values = random(generator)
    mine = make(case, values, kernel, max_grad_norm=0.5)
    expected = make(case, values, kernel)
    for _ in range(3):
        for a, b, grad in zip(params_of(mine), params_of(expected), random(generator), strict=True):
            a.grad, b.grad = grad, grad.clone()
        mine.step()
        norm = torch.nn.utils.clip_grad_norm_(params_of(expected), 0.5)
        expected.step()
        torch.testing.assert_close(mine.grad_norm, norm, rtol=1e-5, atol=0)
    for a, b in zip(tensors(mine), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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


@by_case
@pytest.mark.parametrize("kept", [{}, {"zero_grads": True}, {"write_grads": True}], ids=str)
def test_a_captured_chain_is_the_eager_one(kernel, case, kept):
    """lr, scale and gradients change between replays; some gradients are not finite."""
    generator = torch.Generator().manual_seed(4)
    values = random(generator)
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9, "weights_copy": torch.bfloat16, **kept}
    lrs = [torch.tensor(0.0, device=DEVICE) for _ in range(2)]
    if case.options.get("lr", 0) is None or case.options.get("relative_step"):
        pytest.skip("it has no learning rate to change")
    optimizers = [make(case, values, kernel, lr=lr, **options) for lr in lrs]
    scales = [torch.tensor(8.0, device=DEVICE) for _ in range(2)]
    for optimizer, scale in zip(optimizers, scales, strict=True):
        optimizer.grad_scale = scale
        for param in params_of(optimizer):
            param.grad = torch.zeros_like(param)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for optimizer in optimizers:
            for _ in range(3):
                optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for number in range(100):
        grads = random(generator)
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
    for a, b in zip(tensors(optimizers[0]), tensors(optimizers[1]), strict=True):
        assert same_bits(a, b)
    for a, b in zip(params_of(optimizers[0]), params_of(optimizers[1]), strict=True):
        assert same_bits(a.grad, b.grad)
        assert same_bits(optimizers[0].copies[a], optimizers[1].copies[b])


def test_a_step_that_clips_does_not_wait_for_the_device(kernel):
    values = random(torch.Generator().manual_seed(5))
    optimizer = make(adamw, values, kernel, max_grad_norm=1.0, ema_decay=0.9)
    for param in params_of(optimizer):
        param.grad = torch.randn_like(param)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]) == before


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
