"""The precision options together with clipping, gradients that are left, averages and copies, on every backend."""

import importlib.util

import numpy as np
import pytest
import torch
from host_plan import run_on_the_host
from kinds import each, few
from support import ADAMW, MOMENTUM, STATES, WEIGHTS, parameters_of, precision_modes

import fusedstep
from fusedstep.backends import BACKENDS
from fusedstep.cases import CASES, gradient, layouts
from fusedstep.verification import same_bits

MODES = precision_modes("own", "8bit")
MODES["plain-bf16"] = {"state_dtype": torch.bfloat16}
# The largest gradient is the same number on every backend; sums are not.
CLIPPED = {"max_grad_norm": 0.7, "norm_type": float("inf")}
CHAINS = {
    "zeroed": {**CLIPPED, "zero_grads": True, "ema_decay": 0.7},
    "written": {**CLIPPED, "write_grads": True, "weights_copy": torch.float16},
    "averaged": {"ema_decay": 0.7, "weights_copy": torch.bfloat16},
}
FEW_CASES = [MOMENTUM, ADAMW, next(c for c in CASES if c.optimizer == "Amos" and "momentum" in c.options)]

# Around a step the format of the weights is seen, and whether states are quantized.
FEW_MODES = few(MODES, "plain-8bit", "master-own", "split-8bit", "kahan-own", "stochastic-own")
by_mode = pytest.mark.parametrize("mode", FEW_MODES.values(), ids=FEW_MODES)


@pytest.fixture(params=["cpu", "cuda on the host", "triton"])
def tested(request, monkeypatch):
    """The name of a backend that runs the kernels in question on CPU tensors."""
    if request.param == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        reasons = BACKENDS["triton"].reasons(torch.device("cpu"))
        if reasons:
            pytest.skip("; ".join(reasons))
        return "triton"
    if request.param != "cpu":
        run_on_the_host(monkeypatch)
    return "cpu"


def make(case, values, backend, **options):
    """Every second parameter is in a group of its own, with another learning rate."""
    params = [torch.nn.Parameter(value.detach()) for value in values]
    for param in params:
        param.grad_dtype = None
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.003}]
    return getattr(fusedstep, case.optimizer)(groups, backend=backend, **{**case.options, **options})


def step(optimizers, grads):
    for optimizer in optimizers:
        for param, grad in zip(parameters_of(optimizer), grads, strict=True):
            param.grad = None if grad is None else torch.empty_like(grad).copy_(grad)
        with np.errstate(all="ignore"):  # Triton's interpreter computes with numpy, which warns
            optimizer.step()


def assert_same(mine, reference):
    for index, (a, b) in enumerate(zip(parameters_of(mine), parameters_of(reference), strict=True)):
        assert same_bits(a.detach(), b.detach()), f"{(a != b).sum().item()} of {a.numel()} weights of {index}"
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert same_bits(a.grad, b.grad), f"gradient of {index}"
        states = mine.state.get(a, {}), reference.state.get(b, {})
        assert states[0].keys() == states[1].keys()
        for name in states[0]:
            assert same_bits(states[0][name], states[1][name]), (index, name)
        if mine.stepper.kept.copy.dtype is not None:
            assert same_bits(mine.copies[a], reference.copies[b]), f"copy of {index}"


@each(mode=FEW_MODES, chain=CHAINS)
def test_forms_and_what_is_done_around_a_step_have_the_references_bits(tested, mode, chain):
    """bf16, fp16 and fp32 weights of every layout in one group, with gradients of any dtype."""
    halves = (torch.bfloat16,) if mode.get("master_weights") == "split" else (torch.bfloat16, torch.float16)
    case = FEW_CASES[(list(MODES.values()).index(mode) + list(CHAINS.values()).index(chain)) % len(FEW_CASES)]
    dtypes = (*halves, torch.float32)

    def values():
        generator = torch.Generator().manual_seed(3)
        found = [value for dtype in dtypes for value in layouts(dtype, "cpu", generator).values()]
        return found[::3] if tested == "triton" else found  # whose interpreter takes its time

    optimizers = [make(case, values(), backend, **mode, **chain) for backend in (tested, "reference")]
    generator = torch.Generator().manual_seed(4)
    for number in range(2 if tested == "triton" else 3):
        grads = []
        for index, param in enumerate(parameters_of(optimizers[0])):
            dtype = (param.dtype, torch.float32, torch.bfloat16)[index % 3]
            grad = gradient(param, dtype, generator, other_layout=(index + number) % 4 == 0)
            grads.append(None if (index + number) % 7 == 0 else grad)
        step(optimizers, grads)
        assert_same(*optimizers)


@pytest.mark.parametrize("mode", [{"master_weights": True}, {"master_weights": "split"}], ids=str)
def test_averages_and_copies_of_master_weights_are_those_of_fp32_training(tested, mode):
    generator = torch.Generator().manual_seed(5)
    values = [torch.randn(n, generator=generator).bfloat16() for n in (300, 5000)]
    chain = {"max_grad_norm": 1.0, "ema_decay": 0.9, "weights_copy": torch.float16}
    narrow = make(ADAMW, [v.clone() for v in values], tested, **mode, **chain)
    wide = make(ADAMW, [v.float() for v in values], tested, **chain)
    for _ in range(4):
        step([narrow, wide], [torch.randn(v.numel(), generator=generator) for v in values])
    for a, b in zip(parameters_of(narrow), parameters_of(wide), strict=True):
        assert torch.equal(narrow.state[a]["ema"], wide.state[b]["ema"])
        assert torch.equal(narrow.copies[a], wide.copies[b])
        assert not torch.equal(narrow.copies[a].float(), a.detach().float())


@pytest.mark.parametrize("mode", [WEIGHTS["kahan"], WEIGHTS["stochastic"], STATES["8bit"]], ids=str)
def test_without_master_weights_averages_follow_the_stored_weights(tested, mode):
    values = [torch.randn(5000, generator=torch.Generator().manual_seed(6)).bfloat16()]
    optimizer = make(ADAMW, values, tested, **mode, ema_decay=0.75, weights_copy=torch.float16)
    (param,) = parameters_of(optimizer)
    expected = param.detach().float()
    for _ in range(3):
        step([optimizer], [torch.randn(5000)])
        expected = expected + 0.25 * (param.detach().float() - expected)
        assert torch.equal(optimizer.state[param]["ema"], expected)
        assert torch.equal(optimizer.copies[param], param.detach().half())


@by_mode
def test_weights_come_back_from_their_averages_bit_for_bit(mode):
    values = [torch.randn(5000, generator=torch.Generator().manual_seed(7)).bfloat16()]
    one, other = (make(ADAMW, [v.clone() for v in values], "cpu", **mode, ema_decay=0.5) for _ in range(2))
    grads = [torch.randn(5000) for _ in range(4)]
    for number, grad in enumerate(grads):
        step([one, other], [grad])
        if number == 2:
            with one.swap_ema():
                (param,) = parameters_of(one)
                assert torch.equal(param.detach(), other.state[parameters_of(other)[0]]["ema"].bfloat16())
    assert_same(one, other)


@pytest.mark.parametrize("mode", [{"master_weights": True}, {"master_weights": "split"}], ids=str)
def test_copies_that_are_made_or_renewed_later_are_of_the_fp32_weights(mode):
    options = {**mode, "weights_copy": torch.float16, "ema_decay": 0.5}
    first = make(ADAMW, [torch.randn(5000).bfloat16()], "cpu", **options)
    step([first], [torch.randn(5000)])
    (param,) = parameters_of(first)
    before = first.copies[param].clone()
    with first.swap_ema():
        assert torch.equal(first.copies[param], param.detach().half())
    first.renew_copies()
    assert torch.equal(first.copies[param], before)
    resumed = make(ADAMW, [param.detach().clone()], "cpu", **options)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(resumed.copies[parameters_of(resumed)[0]], before)


@pytest.mark.parametrize("mode", [MODES["split-8bit"], MODES["stochastic-own"]], ids=["split-8bit", "stochastic"])
def test_a_step_that_is_skipped_changes_nothing_but_zeroes_gradients(tested, mode):
    values = [torch.randn(5000).bfloat16(), torch.randn(30).bfloat16()]
    chain = {"skip_nonfinite": True, "zero_grads": True, "ema_decay": 0.9, "weights_copy": torch.float16}
    one, other = (make(ADAMW, [v.clone() for v in values], tested, **mode, **chain) for _ in range(2))
    good = [torch.randn(v.numel()) for v in values]
    step([one, other], good)
    step([one], [torch.full((5000,), float("inf")), good[1]])
    assert_same(one, other)
    step([one, other], good)
    assert_same(one, other)


@each(mode=[WEIGHTS["split"], STATES["8bit"]], left=["zero_grads", "write_grads"])
def test_sparse_gradients_are_left_as_asked_for(tested, mode, left):
    """They are taken as dense ones, because a weight and its states have more to them than a row."""
    start = torch.randn(1000, 8, generator=torch.Generator().manual_seed(8)).bfloat16()
    rows, numbers = torch.tensor([[3, 700]]), torch.full((2, 8), 0.5).bfloat16()
    make = fusedstep.Adagrad if "state_dtype" in mode else fusedstep.SGD
    one, other = (
        make(
            [torch.nn.Parameter(start.clone())],
            **{"lr": 0.1, "backend": backend, "max_grad_norm": 0.25, "norm_type": float("inf"), left: True, **mode},
        )
        for backend in (tested, "reference")
    )
    for optimizer in (one, other):
        (param,) = parameters_of(optimizer)
        param.grad = torch.sparse_coo_tensor(rows, numbers, param.shape, check_invariants=False)
        with np.errstate(all="ignore"):
            optimizer.step()
    (a,), (b,) = parameters_of(one), parameters_of(other)
    assert same_bits(a.detach(), b.detach())
    assert torch.equal(a.grad.to_dense(), b.grad.to_dense())
    assert a.grad.to_dense().abs().max() == (0.0 if left == "zero_grads" else 0.25)
