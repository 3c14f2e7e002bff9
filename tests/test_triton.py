"""The Triton backend under the interpreter, which needs no GPU: its bits."""

import importlib.util

import numpy as np
import pytest
import torch
from kinds import ALL, ELEMENTWISE, IN_ENGINES, by_case, by_kind_in_engines, each

import fusedstep
from fusedstep.backends import BACKENDS
from fusedstep.cases import CASES
from fusedstep.verification import same_bits, verify

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def interpreted():
    reasons = BACKENDS["triton"].reasons(torch.device("cpu"))
    if reasons:
        pytest.skip("; ".join(reasons))


def pair(case, values, backend="triton"):
    return [
        getattr(fusedstep, case.optimizer)(
            [torch.nn.Parameter(v.clone()) for v in values], backend=name, **case.options
        )
        for name in (backend, "reference")
    ]


def step(optimizers, grads, **attributes):
    for optimizer in optimizers:
        for name, value in attributes.items():
            setattr(optimizer, name, value)
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad_dtype = None
            param.grad = None if grad is None else grad.clone()
        optimizer.step()


def assert_same(optimizers):
    for a, b in zip(*[o.param_groups[0]["params"] for o in optimizers], strict=True):
        assert same_bits(a.detach(), b.detach())
        states = [o.state.get(p, {}) for o, p in zip(optimizers, (a, b), strict=True)]
        assert states[0].keys() == states[1].keys()
        for name in states[0]:
            assert same_bits(states[0][name], states[1][name]), name


def random(sizes, generator, dtypes=(torch.float32,)):
    return [torch.randn(n, generator=generator).to(dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("optimizer", sorted({case.optimizer for case in CASES}) if ALL else ["SGD"])
def test_every_layout_and_dtype_has_the_references_bits(interpreted, optimizer):
    """Every case in every dtype is below; here is what `fusedstep verify` has besides: layouts and the options."""
    report = verify([optimizer], backend="triton", steps=1)
    assert {str(case) for case in CASES if case.optimizer == optimizer} <= {row.case for row in report.rows}
    assert report.ok, [row for row in report.rows if not row.ok]


@by_kind_in_engines
def test_sizes_around_a_block_have_the_references_bits(interpreted, case):
    generator = torch.Generator().manual_seed(1)
    sizes = [0, 1, 15, 16, 17, 16_383, 16_384, 16_385, 70_001]
    optimizers = pair(case, random(sizes, generator))
    for _ in range(2):
        step(optimizers, random(sizes, generator))
    assert_same(optimizers)
    assert optimizers[0].kernel_calls == 1


@by_case
def test_mixed_dtypes_have_the_references_bits_and_one_launch_for_each_mixture(interpreted, case):
    generator = torch.Generator().manual_seed(2)
    sizes = [*range(20, 27), 16_385]
    optimizers = pair(case, random(sizes, generator, FLOATS))
    for _ in range(2):
        step(optimizers, random(sizes, generator, FLOATS))
    assert optimizers[0].kernel_calls == len(FLOATS)
    # A gradient that changes its dtype joins another mixture.
    step(optimizers, random(sizes, generator, FLOATS[1:]))
    assert_same(optimizers)


@by_kind_in_engines
def test_missing_gradients_scales_and_skips_have_the_references_bits(interpreted, case):
    generator = torch.Generator().manual_seed(3)
    sizes = [5, 0, 40, 3000]
    optimizers = pair(case, random(sizes, generator))
    for number in range(6):
        grads = [g if number >= i else None for i, g in enumerate(random(sizes, generator))]
        # On the CPU the optimizer itself reads found_inf; the kernel's own look is in the next test.
        skip = torch.tensor(float(number in (0, 3)))
        step(optimizers, grads, grad_scale=torch.tensor(3.0), found_inf=skip)
    assert_same(optimizers)


def test_the_kernel_itself_skips_and_counts_nothing(interpreted):
    optimizer, _ = pair(CASES[-1], [torch.ones(10)])
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones(10)
    optimizer.step()
    before = [param.detach().clone(), *[t.clone() for t in optimizer.state[param].values()]]
    (plan,) = optimizer.stepper.plans_that_fit(optimizer)
    hyper = optimizer.hyper(optimizer.param_groups[0], None)
    plan.launch(plan.step_with(hyper, found_inf=torch.tensor(1.0)))
    assert all(torch.equal(a, b) for a, b in zip(before, [param, *optimizer.state[param].values()], strict=True))
    assert plan.gather()
    plan.launch(plan.step_with(hyper, found_inf=torch.tensor(0.0)))
    assert optimizer.state[param]["step"] == 2


def test_a_tensor_lr_is_read_in_every_step(interpreted):
    case = next(c for c in CASES if c.optimizer == "AdamW")
    generator = torch.Generator().manual_seed(4)
    optimizers = pair(case, random([33], generator))
    rates = [torch.tensor(0.01) for _ in optimizers]
    for optimizer, lr in zip(optimizers, rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
    for value in (0.01, 0.3, 0.002):
        for lr in rates:
            lr.fill_(value)
        step(optimizers, random([33], generator))
    assert_same(optimizers)


def test_infinite_and_missing_numbers_have_the_references_bits(interpreted):
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-39, 3e38, float("inf"), -float("inf"), float("nan"), 1.0])
    for case in CASES if ALL else ELEMENTWISE:
        optimizers = pair(case, [edges])
        with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns
            for grad in (edges.flip(0), edges):
                step(optimizers, [grad])
        assert_same(optimizers)


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in BACKENDS["triton"].reasons(torch.device("cpu"))[0]


@each(case=CASES[4:6], dtype=FLOATS)
@pytest.mark.parametrize("kept", [{}, {"zero_grads": True}, {"write_grads": True}], ids=str)
def test_clipped_gradients_and_what_is_left_of_them(interpreted, case, dtype, kept):
    """The norm is a power of two, so that the coefficient is the same whatever the order of its sum."""
    optimizers = []
    for backend in ("triton", "reference"):
        params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (5, 9000, 0, 59, 7320)]
        options = {"max_grad_norm": 1.0, "skip_nonfinite": True, **case.options, **kept}
        optimizers.append(getattr(fusedstep, case.optimizer)(params, backend=backend, **options))
    assert sum(p.numel() for p in params) == 4**7
    for number in range(3):
        for optimizer in optimizers:
            for param in optimizer.param_groups[0]["params"]:
                param.grad = torch.full_like(param, 0.5)
                if number == 1 and len(param) == 59:
                    param.grad[58] = torch.nan
            optimizer.step()
        norms = [optimizer.grad_norm for optimizer in optimizers]
        assert same_bits(*norms)
        assert norms[0].isnan() if number == 1 else norms[0] == 64.0
        for a, b in zip(*[o.param_groups[0]["params"] for o in optimizers], strict=True):
            assert same_bits(a.grad, b.grad)
    assert_same(optimizers)


@pytest.mark.parametrize("by_largest", [False, True])
def test_the_norm_of_gradients_of_every_dtype_and_size(interpreted, by_largest):
    generator = torch.Generator().manual_seed(11)
    sizes = [1, 33, 70_000, 5, 0, 20_000]
    grads = random(sizes, generator, FLOATS)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(n)) for n in half]} for half in (sizes[:3], sizes[3:])]
    optimizer = fusedstep.SGD(
        groups, 0.1, max_grad_norm=1.0, norm_type=torch.inf if by_largest else 2, backend="triton"
    )
    for scale in (1.0, 8.0):
        params = [p for group in groups for p in group["params"]]
        for param, grad in zip(params, grads, strict=True):
            param.grad_dtype = None
            param.grad = grad
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        flat = torch.cat([grad.double() for grad in grads]) / scale
        norm = flat.abs().max() if by_largest else flat.norm()
        torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=1e-6, atol=0)


def test_a_scaler_that_leaves_the_finite_check_to_the_step(interpreted):
    params = [torch.nn.Parameter(torch.ones(n)) for n in (5, 3000)]
    optimizer = fusedstep.AdamW(params, max_grad_norm=1.0, backend="triton")
    scaler = fusedstep.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for number in range(4):
        for param in params:
            param.grad = torch.full_like(param, torch.inf if number in (0, 2) else 1.0)
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, b) == (number in (0, 2)) for p, b in zip(params, before, strict=True))
    assert scaler.get_scale() == 1.0
    assert all(state["step"] == 2 for state in optimizer.state.values())


@each(case=IN_ENGINES, dtype=FLOATS)
def test_averages_and_copies_have_the_references_bits(interpreted, case, dtype):
    generator = torch.Generator().manual_seed(13)
    sizes = [5, 17_000, 0, 40]
    values = random(sizes, generator, (dtype,))
    optimizers = []
    for backend in ("triton", "reference"):
        params = [torch.nn.Parameter(v.clone()) for v in values]
        options = {**case.options, "ema_decay": 0.7, "weights_copy": torch.bfloat16}
        optimizers.append(getattr(fusedstep, case.optimizer)(params, backend=backend, **options))
    for _ in range(2):
        step(optimizers, random(sizes, generator, (dtype,)))
    assert_same(optimizers)
    for a, b in zip(*[o.param_groups[0]["params"] for o in optimizers], strict=True):
        assert same_bits(optimizers[0].copies[a], optimizers[1].copies[b])
        assert same_bits(optimizers[0].copies[a], a.detach().to(torch.bfloat16))
