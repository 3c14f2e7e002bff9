"""What Triton's backend owes beside the contract of `test_engines.py`, under the interpreter, which needs no GPU."""

import importlib.util

import pytest
import torch
from kinds import ALL

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


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in BACKENDS["triton"].reasons(torch.device("cpu"))[0]


@pytest.mark.parametrize("by_max_abs", [False, True])
def test_the_norm_of_gradients_of_every_dtype_and_size(interpreted, by_max_abs):
    generator = torch.Generator().manual_seed(11)
    sizes = [1, 33, 70_000, 5, 0, 20_000]
    grads = random(sizes, generator, FLOATS)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(n)) for n in half]} for half in (sizes[:3], sizes[3:])]
    optimizer = fusedstep.SGD(
        groups, 0.1, max_grad_norm=1.0, norm_type=torch.inf if by_max_abs else 2, backend="triton"
    )
    for scale in (1.0, 8.0):
        params = [p for group in groups for p in group["params"]]
        for param, grad in zip(params, grads, strict=True):
            param.grad_dtype = None
            param.grad = grad
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        flat = torch.cat([grad.double() for grad in grads]) / scale
        norm = flat.abs().max() if by_max_abs else flat.norm()
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


def test_tensors_of_several_forms_take_a_launch_each(interpreted):
    """8-bit states of a small parameter are in its own dtype."""
    generator = torch.Generator().manual_seed(6)
    optimizer = fusedstep.AdamW(
        [torch.nn.Parameter(value) for value in random([100, 5000, 200], generator)],
        backend="triton",
        state_dtype="8bit",
    )
    step([optimizer], random([100, 5000, 200], generator))
    assert optimizer.kernel_calls == 2
