"""The Triton backend: its bits under the interpreter, its code for sm_90. Neither needs a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fusedstep
from fusedstep.backends import BACKENDS
from fusedstep.backends.plan import Call
from fusedstep.cases import CASES
from fusedstep.verification import same_bits, verify

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def variant(case):
    """The rule of a row, and which of the states that it names there are, as the bits of a number."""
    optimizer = getattr(fusedstep, case.optimizer)([torch.zeros(1)], backend="reference", **case.options)
    states = optimizer.states_of(optimizer.param_groups[0])
    return optimizer.rule, sum((name in states) << k for k, name in enumerate(optimizer.state_names))


VARIANTS = sorted({variant(case) for case in CASES})
by_case = pytest.mark.parametrize("case", CASES, ids=str)


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


@pytest.mark.parametrize("optimizer", sorted({case.optimizer for case in CASES}))
def test_every_layout_and_dtype_has_the_references_bits(interpreted, optimizer):
    report = verify([optimizer], backend="triton", steps=1)
    assert {str(case) for case in CASES if case.optimizer == optimizer} <= {row.case for row in report.rows}
    assert report.ok, [row for row in report.rows if not row.ok]


@by_case
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
    sizes = list(range(20, 28))
    optimizers = pair(case, random(sizes, generator, FLOATS))
    for _ in range(2):
        step(optimizers, random(sizes, generator, FLOATS))
    assert optimizers[0].kernel_calls == len(FLOATS)
    # A gradient that changes its dtype joins another mixture.
    step(optimizers, random(sizes, generator, FLOATS[1:]))
    assert_same(optimizers)


@by_case
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
    (plan,) = optimizer._plans_that_fit()
    hyper = optimizer.hyper(optimizer.param_groups[0], None)
    plan.launch(Call(hyper, found_inf=torch.tensor(1.0)))
    assert all(torch.equal(a, b) for a, b in zip(before, [param, *optimizer.state[param].values()], strict=True))
    assert plan.gather()
    plan.launch(Call(hyper, found_inf=torch.tensor(0.0)))
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
    for case in CASES:
        optimizers = pair(case, [edges])
        with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns
            for grad in (edges.flip(0), edges):
                step(optimizers, [grad])
        assert_same(optimizers)


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in BACKENDS["triton"].reasons(torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def code():
    """For each rule, its states and dtype: what its code for sm_90 holds."""
    variants = [(*v, dtype, "plain") for v in VARIANTS for dtype in ("fp32", "bf16")]
    variants += [("sgd", 0, "fp32", "scaled"), ("adam", 3, "bf16", "scaled")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = [",".join(map(str, variant)) for variant in variants]
    script = Path(__file__).with_name("triton_compile.py")
    run = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(zip(variants, json.loads(run.stdout.splitlines()[-1]), strict=True))


def test_memory_is_accessed_16_bytes_at_a_time(code):
    for (_, present, dtype, _), found in code.items():
        n_states = present.bit_count()
        packs = 2 if dtype == "fp32" else 1  # of 2,048 elements by 256 threads
        assert found["wide_loads"] >= (2 + n_states) * packs
        assert found["wide_stores"] >= (1 + n_states) * packs


def test_arithmetic_is_rounded_after_every_operation(code):
    for (rule, _, _, scaled), found in code.items():
        assert found["fma"] == 0
        assert found["approximate"] == 0
        divides = rule not in ("sgd", "lion")
        assert (found["rounded_roots"] > 0) == divides
        assert (found["rounded_divisions"] > 0) == (divides or scaled == "scaled")


def test_nothing_is_spilled_to_local_memory(code):
    assert all(found["local"] == 0 for found in code.values())


@pytest.mark.parametrize("case", CASES[4:6], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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


def test_the_kernel_that_sums_compiles_for_a_gpu():
    command = [sys.executable, str(Path(__file__).parent / "triton_compile.py"), "norm"]
    variants = [f"{dtype},{last}" for dtype in ("fp32", "bf16", "fp16", "fp64") for last in (0, 1)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([*command, *variants], env=environment, capture_output=True, text=True, check=True)
    for counts in json.loads(done.stdout):
        assert counts["wide_loads"] > 0
        assert counts["fma"] == counts["local"] == counts["approximate"] == 0


@pytest.mark.parametrize("case", CASES[2:6], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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
