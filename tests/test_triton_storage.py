"""The Triton backend in every form of the precision options: its bits under the interpreter."""

import importlib.util

import numpy as np
import pytest
import torch
from kinds import each
from support import precision_modes

import fusedstep
from fusedstep.backends import BACKENDS
from fusedstep.cases import CASES
from fusedstep.verification import same_bits

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

MODES = precision_modes("own", "bf16", "8bit", "4bit")
MODES.pop("plain-own")
SIZES = [0, 1, 9, 257, 4095, 4097, 16_384 + 4096 + 3]
# A rule without states, with a state of its own step count, with a state that has a sign and one that has none.
FEW_CASES = [CASES[1], CASES[2], CASES[10], next(c for c in CASES if c.optimizer == "Amos" and "momentum" in c.options)]


@pytest.fixture(autouse=True)
def _interpreted():
    reasons = BACKENDS["triton"].reasons(torch.device("cpu"))
    if reasons:
        pytest.skip("; ".join(reasons))


def pair(case, values, mode):
    return [
        getattr(fusedstep, case.optimizer)(
            [torch.nn.Parameter(v.clone()) for v in values], backend=name, **case.options, **mode
        )
        for name in ("triton", "reference")
    ]


def step(optimizers, grads):
    for optimizer in optimizers:
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad_dtype = None
            param.grad = None if grad is None else grad.clone()
        with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns
            optimizer.step()


def assert_same(optimizers):
    for a, b in zip(*[o.param_groups[0]["params"] for o in optimizers], strict=True):
        assert same_bits(a.detach(), b.detach()), f"{(a != b).sum().item()} of {a.numel()} weights"
        states = [o.state.get(p, {}) for o, p in zip(optimizers, (a, b), strict=True)]
        assert states[0].keys() == states[1].keys()
        for name in states[0]:
            assert same_bits(states[0][name], states[1][name]), (name, a.numel())


@each(mode=MODES, case=FEW_CASES)
def test_every_form_has_the_references_bits(case, mode):
    for dtype in (torch.bfloat16,) if mode.get("master_weights") == "split" else (torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(1)
        optimizers = pair(case, [torch.randn(n, generator=generator).to(dtype) for n in SIZES], mode)
        for number in range(2):
            grads = [torch.randn(n, generator=generator).to(dtype) for n in SIZES]
            step(optimizers, [None if i == number else g for i, g in enumerate(grads)])
        assert_same(optimizers)


def test_numbers_that_are_not_finite_have_the_references_bits():
    edges = [0.0, -0.0, 1e-40, -3e-39, 3.4e38, -3.39e38, float("inf"), float("nan"), 7e4, -65519.0, 6e-8]
    for mode in MODES.values():
        generator = torch.Generator().manual_seed(2)
        optimizers = pair(CASES[10], [torch.randn(5000, generator=generator).bfloat16()], mode)
        for scale in (1.0, 1e-30):
            grad = torch.randn(5000, generator=generator)
            grad[: 300 * len(edges) : 300] = torch.tensor(edges)
            step(optimizers, [grad * scale])
        assert_same(optimizers)


def test_zeros_that_were_written_beside_remainders_have_the_references_bits():
    generator = torch.Generator().manual_seed(3)
    optimizers = pair(CASES[0], [torch.randn(5000, generator=generator).bfloat16()], MODES["split-own"])
    for factor in (1.0, torch.arange(5000) % 2):
        for optimizer in optimizers:
            optimizer.param_groups[0]["params"][0].data.mul_(factor)
        step(optimizers, [torch.randn(5000, generator=generator)])
    assert_same(optimizers)
    assert optimizers[0].param_groups[0]["params"][0].isfinite().all()


def test_tensors_of_several_forms_take_a_launch_each():
    sizes = [100, 5000, 200]
    optimizers = pair(CASES[10], [torch.randn(n) for n in sizes], {"state_dtype": "8bit"})
    step(optimizers, [torch.randn(n) for n in sizes])
    assert optimizers[0].kernel_calls == 2
    assert_same(optimizers)
