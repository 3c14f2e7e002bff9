"""The Triton kernels of rules that reduce: under the interpreter beside the reference."""

import importlib.util

import pytest
import torch
from kinds import ALL, each

import fusedstep
from fusedstep.backends import BACKENDS
from fusedstep.cases import REDUCING
from fusedstep.verification import same_bits, verify

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

by_case = pytest.mark.parametrize("case", REDUCING, ids=str)
RULES = [REDUCING[3], REDUCING[4], REDUCING[6], REDUCING[7]]  # those of Amos for rows, and for columns
# Flat, small and cut into tiles: several rows of tiles, several columns of tiles, several matrices.
SHAPES = [(), (300,), (0, 3), (3, 0), (50, 3, 3), (2, 20, 31), (300, 150), (2, 9, 170)]
# Sums are in another order than the reference's, in the arithmetic type: this is far above what that makes of them, and
# far below what a missing term would.
CLOSE = {"rtol": 3e-6, "atol": 3e-7}


@pytest.fixture
def interpreted():
    reasons = BACKENDS["triton"].reasons(torch.device("cpu"))
    if reasons:
        pytest.skip("; ".join(reasons))


def make(case, values, backend, **options):
    params = [torch.nn.Parameter(value.clone()) for value in values]
    return getattr(fusedstep, case.optimizer)(params, backend=backend, **case.options, **options)


def random(shapes, generator, dtype=torch.float32):
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def step(optimizers, grads, **attributes):
    for optimizer in optimizers:
        for name, value in attributes.items():
            setattr(optimizer, name, value)
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()


def tensors(optimizer):
    params = optimizer.param_groups[0]["params"]
    return [param.detach() for param in params] + [t for p in params for t in optimizer.state.get(p, {}).values()]


def assert_close(optimizers):
    for mine, expected in zip(*map(tensors, optimizers), strict=True):
        largest = expected.abs().nan_to_num().max().item() if expected.numel() else 0.0
        atol = CLOSE["atol"] * max(largest, 1.0)  # a number near zero is what two larger ones have left
        torch.testing.assert_close(mine, expected, equal_nan=True, rtol=CLOSE["rtol"], atol=atol)


@by_case
def test_every_shape_is_close_to_the_reference(interpreted, case):
    generator = torch.Generator().manual_seed(1)
    values = random(SHAPES, generator)
    optimizers = [make(case, values, backend) for backend in ("triton", "reference")]
    for _ in range(2 if ALL or case in RULES else 1):
        step(optimizers, random(SHAPES, generator))
    assert_close(optimizers)
    # Amos: two for rows, two for columns (a vector is one row), and one for the scalar, which has nothing to reduce.
    assert optimizers[0].kernel_calls == (5 if case.options.get("reduce") == (0,) else 3)


@each(case=RULES, dtype=[torch.float32, torch.bfloat16])
def test_the_tiles_of_a_gpu_are_close_to_the_reference(interpreted, monkeypatch, case, dtype):
    monkeypatch.setattr("fusedstep.triton_kernels.reducing.is_interpreted", lambda: False)
    generator = torch.Generator().manual_seed(4)
    # Rows that can be accessed 16 bytes at a time and rows that cannot; several strips, several blocks of rows.
    shapes = [(70, 1040), (2, 9, 531)]
    values = random(shapes, generator)
    optimizers = [make(case, values, backend) for backend in ("triton", "reference")]
    for optimizer in optimizers:
        for param in optimizer.param_groups[0]["params"]:
            param.grad_dtype = None
    for _ in range(2 if ALL else 1):
        step(optimizers, random(shapes, generator, dtype))
    assert_close(optimizers)


@pytest.mark.parametrize("case", [REDUCING[1], REDUCING[4]] if ALL else [REDUCING[4]], ids=str)
def test_every_layout_and_dtype_is_close_to_float64(interpreted, case):
    rows = [row for row in verify([case.optimizer], backend="triton", steps=1).rows if row.case == str(case)]
    assert len(rows) == 4
    assert all(row.ok for row in rows), rows


def test_gradients_come_and_go_scaled_and_steps_are_skipped(interpreted):
    generator = torch.Generator().manual_seed(2)
    shapes = [(5,), (0, 2), (40, 30), (3, 4, 4)]
    values = random(shapes, generator)
    optimizers = [make(REDUCING[1], values, backend) for backend in ("triton", "reference")]
    for number in range(5):
        grads = [g if number >= i else None for i, g in enumerate(random(shapes, generator))]
        step(optimizers, grads, grad_scale=torch.tensor(3.0), found_inf=torch.tensor(float(number in (0, 3))))
    assert_close(optimizers)


def test_the_kernels_themselves_skip_and_count_nothing(interpreted):
    optimizer = make(REDUCING[1], [torch.ones(40, 30), torch.ones(7)], "triton")
    step([optimizer], [torch.ones(40, 30), torch.ones(7)])
    before = [t.clone() for t in tensors(optimizer)]
    (plan,) = optimizer.stepper.plans_that_fit(optimizer)
    hyper = optimizer.hyper(optimizer.param_groups[0], None)
    plan.launch(plan.step_with(hyper, found_inf=torch.tensor(1.0)))
    assert all(same_bits(a, b) for a, b in zip(before, tensors(optimizer), strict=True))
    assert plan.gather()
    plan.launch(plan.step_with(hyper, found_inf=torch.tensor(0.0)))
    assert [int(optimizer.state[p]["step"]) for p in optimizer.param_groups[0]["params"]] == [2, 2]


def test_bits_do_not_depend_on_the_other_tensors_of_the_group(interpreted):
    generator = torch.Generator().manual_seed(3)
    values, grads = random(SHAPES, generator), random(SHAPES, generator)
    together = make(REDUCING[4], values, "triton")
    step([together], grads)
    for value, grad, expected in zip(values, grads, together.param_groups[0]["params"], strict=True):
        alone = make(REDUCING[4], [value], "triton")
        step([alone], [grad])
        assert same_bits(alone.param_groups[0]["params"][0].detach(), expected.detach())


@each(case=[REDUCING[3], REDUCING[4]], kept=[{}, {"zero_grads": True}, {"write_grads": True}])
def test_clipped_gradients_and_what_is_left_of_them(interpreted, case, kept):
    generator = torch.Generator().manual_seed(12)
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True, **kept}
    values = random(SHAPES, generator)
    optimizers = [make(case, values, backend, **options) for backend in ("triton", "reference")]
    for number in range(3):
        grads = random(SHAPES, generator)
        if number == 1:
            grads[1][7] = torch.inf
        before = [t.clone() for t in tensors(optimizers[0])]
        step(optimizers, grads)
        if number == 1:
            for a, b in zip(tensors(optimizers[0]), before, strict=True):
                assert same_bits(a, b)
        for a, b, grad in zip(*[o.param_groups[0]["params"] for o in optimizers], grads, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
            assert "zero_grads" not in kept or not a.grad.any()
            assert kept or torch.equal(a.grad, grad)
    assert_close(optimizers)


@each(case=[REDUCING[3], REDUCING[4]], dtype=[torch.float32, torch.bfloat16])
def test_averages_and_copies_follow_the_parameters(interpreted, case, dtype):
    generator = torch.Generator().manual_seed(13)
    values = random(SHAPES, generator, dtype)
    optimizer = make(case, values, "triton", ema_decay=0.75, weights_copy=torch.float16)
    expected = [v.float() for v in values]
    for _ in range(2):
        step([optimizer], random(SHAPES, generator, dtype))
        for i, param in enumerate(optimizer.param_groups[0]["params"]):
            expected[i] = expected[i] + 0.25 * (param.detach().float() - expected[i])
            assert same_bits(optimizer.state[param]["ema"], expected[i])
            assert same_bits(optimizer.copies[param], param.detach().to(torch.float16))
