"""Distance to float64 in units in the last place, and rounding to the low-precision formats."""

import pytest
import torch
from kinds import BY_KIND, each

import fusedstep
from fusedstep import _C
from fusedstep.cases import CASES, chain_cases, precision_cases, reduces, select_cases
from fusedstep.numerics import power, square_root
from fusedstep.verification import DTYPES, ULP_PER_STEP, ulp_distance, verify

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def test_verify_finds_every_row_right():
    report = verify(backend="cpu", steps=3)
    assert report.ok
    further = [*precision_cases(), *chain_cases()]
    assert len(report.rows) == len(select_cases()) * len(DTYPES) + len(further)
    elementwise = {str(case) for case in (*CASES, *(case for case, _ in further)) if not reduces(case)}
    assert max(row.max_ulp for row in report.rows if row.case in elementwise) <= ULP_PER_STEP


@pytest.mark.parametrize("mutation", ["no_decay", "fp32_correction", "swapped"])
def test_verify_finds_a_wrong_rule(monkeypatch, mutation):
    """The reference itself is checked against float64 only by its own formula, so mutate the engine's input."""
    right = fusedstep.AdamW.hyper

    def wrong(self, group, variant):
        lr, beta1, beta2, eps, weight_decay, *rest = right(self, group, variant)
        if self.stepper.backend == "reference":
            return lr, beta1, beta2, eps, weight_decay, *rest
        return {
            "no_decay": (lr, beta1, beta2, eps, 0.0, *rest),
            "fp32_correction": (lr, beta1, torch.tensor(beta2).item(), eps, weight_decay, *rest),
            "swapped": (lr, beta2, beta1, eps, weight_decay, *rest),
        }[mutation]

    monkeypatch.setattr(fusedstep.AdamW, "hyper", wrong)
    assert not verify(["AdamW"], backend="cpu", dtypes=["fp32"]).ok


def test_ulp_distance_counts_units():
    one = torch.tensor([1.0])
    assert ulp_distance(one + 2**-23, torch.tensor([1.0], dtype=torch.float64), one) == 1.0
    assert ulp_distance(one, torch.tensor([1.0 + 2**-24], dtype=torch.float64), one) == 0.5
    nan = torch.tensor([float("nan")])
    assert ulp_distance(nan, nan.double(), nan) == 0.0
    assert ulp_distance(nan, one.double(), one) != 0.0


@each(case=BY_KIND, dtype=LOW)
def test_a_low_precision_step_is_the_fp32_step_rounded(case, dtype):
    generator = torch.Generator().manual_seed(4)
    start, grad = (torch.randn(3000, generator=generator).to(dtype) for _ in range(2))
    results = []
    for wide in (False, True):
        param = torch.nn.Parameter(start.float() if wide else start.clone())
        optimizer = getattr(fusedstep, case.optimizer)([param], backend="cpu", **case.options)
        param.grad = grad.to(param.dtype)
        optimizer.step()
        results.append(param.detach())
    assert torch.equal(results[0], results[1].to(dtype))


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_all_65536_numbers_survive_a_step_of_size_zero(dtype, isa):
    before = _C.cpu_isa()
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    param = torch.nn.Parameter(bits.clone())
    param.grad = torch.zeros_like(param)
    try:
        _C.set_cpu_isa(isa)
        fusedstep.SGD([param], lr=0.0, backend="cpu").step()
    finally:
        _C.set_cpu_isa(before)
    nan = bits.isnan()
    assert torch.equal(param.isnan(), nan)
    assert torch.equal(param.detach()[~nan].view(torch.int16), bits[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_rounding_is_torchs(dtype, isa):
    """0 - 1 * (-x) is x, rounded when it is stored: ties, subnormals, overflow, infinities and NaN."""
    before = _C.cpu_isa()
    generator = torch.Generator().manual_seed(2)
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    exact = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    exact = exact[exact.isfinite()].sort().values
    ties = (exact[1:].double() + exact[:-1].double()).div(2).float()
    around = torch.cat([ties.nextafter(torch.tensor(float("inf"))), ties.nextafter(torch.tensor(-float("inf")))])
    x = torch.cat([random, exact, ties, around])
    param = torch.nn.Parameter(torch.zeros(x.numel(), dtype=dtype))
    param.grad_dtype = None
    param.grad = -x
    try:
        _C.set_cpu_isa(isa)
        fusedstep.SGD([param], lr=1.0, backend="cpu").step()
    finally:
        _C.set_cpu_isa(before)
    expected = x.to(dtype)
    nan = expected.isnan()
    assert torch.equal(param.isnan(), nan)
    assert torch.equal(param.detach()[~nan], expected[~nan])


def test_power_is_the_float64_power():
    for base in (0.0, 0.9, 0.999, 0.95, 1.0):
        for exponent in (1, 2, 3, 10, 1000, 123_456):
            assert power(base, exponent) == pytest.approx(base**exponent, rel=1e-13)


def test_square_root_is_correctly_rounded():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(square_root(x), x.double().sqrt().float())
