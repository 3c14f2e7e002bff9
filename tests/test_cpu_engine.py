"""What the CPU engine owes beside the contract of `test_engines.py`: threads, ranges, any numbers, kept plans."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kinds import IN_ENGINES, each, examples, few
from support import by_kind_in_engines, precision_modes

import fusedstep
from fusedstep import _C, planning
from fusedstep.cases import CASES, gradient, layouts
from fusedstep.verification import same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES = precision_modes("own", "fp32", "bf16", "8bit", "4bit")
SIZES = [0, 1, 7, 8, 9, 255, 256, 257, 4095, 4096, 4097, 4352, 9001]

# The contract has every format once; what is shown here sees a way to store weights, or states, or both at once.
FEW_MODES = few(
    MODES,
    *("plain-own", "plain-8bit", "split-8bit", "plain-4bit", "split-4bit"),
    *("kahan-bf16", "stochastic-own", "stochastic-8bit", "master-own"),
)

by_mode = pytest.mark.parametrize("mode", FEW_MODES.values(), ids=FEW_MODES)


def make(case, values, backend, mode):
    params = [torch.nn.Parameter(v.clone()) for v in values]
    return getattr(fusedstep, case.optimizer)(params, backend=backend, **{**case.options, **mode})


def pair(case, values, mode):
    return tuple(make(case, values, backend, mode) for backend in ("cpu", "reference"))


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def step(optimizers, grads):
    for optimizer in optimizers:
        for param, grad in zip(params_of(optimizer), grads, strict=True):
            param.grad_dtype = None
            param.grad = None if grad is None else grad.clone()
        optimizer.step()


def assert_same(a, b):
    for p, q in zip(params_of(a), params_of(b), strict=True):
        assert same_bits(p.detach(), q.detach()), f"{(p != q).sum().item()} of {p.numel()} weights differ"
        mine, other = a.state.get(p, {}), b.state.get(q, {})
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype
            assert same_bits(mine[name], other[name]), f"{(mine[name] != other[name]).sum().item()} of {name} differ"


@each(dtype=[torch.float32, torch.float64], case=IN_ENGINES, mode=FEW_MODES)
def test_wide_parameters_have_the_references_bits(case, dtype, mode):
    generator = torch.Generator().manual_seed(7)
    optimizers = pair(case, [torch.randn(n, generator=generator).to(dtype) for n in SIZES], mode)
    for _ in range(2):
        step(optimizers, [torch.randn(n, generator=generator).to(dtype) for n in SIZES])
    assert_same(*optimizers)
    for param in params_of(optimizers[0]):
        for name, value in optimizers[0].state.get(param, {}).items():
            assert name in (*optimizers[0].state_names, "step") or name.endswith("_scale")
            assert dtype == torch.float32 or value.dtype in (torch.float64, torch.float32)


@each(other_layout={"same": False, "other": True}, case=IN_ENGINES, mode=FEW_MODES)
def test_every_layout_has_the_references_bits(case, mode, other_layout):
    generator = torch.Generator().manual_seed(8)
    optimizers = []
    for backend in ("cpu", "reference"):
        values = layouts(torch.bfloat16, "cpu", torch.Generator().manual_seed(9))
        big = torch.randn(70, 80, generator=torch.Generator().manual_seed(1)).bfloat16()
        values |= {"big": big, "big_transposed": big.t(), "every_other": big.repeat(1, 2)[:, ::2]}
        params = [torch.nn.Parameter(v.detach().clone(memory_format=torch.preserve_format)) for v in values.values()]
        params[-1] = torch.nn.Parameter(values["every_other"].detach())
        optimizers.append(getattr(fusedstep, case.optimizer)(params, backend=backend, **{**case.options, **mode}))
    for _ in range(3):
        grads = [gradient(p, torch.bfloat16, generator, other_layout) for p in params_of(optimizers[0])]
        step(optimizers, [g.detach() for g in grads])
    assert_same(*optimizers)


def test_a_parameter_that_is_laid_out_anew_has_the_references_bits():
    for mode in (MODES["plain-8bit"], MODES["stochastic-8bit"], MODES["split-4bit"]):
        generator = torch.Generator().manual_seed(11)
        optimizers = pair(CASES[10], [torch.randn(4, 8, 16, 32, generator=generator).bfloat16()], mode)
        for _ in range(2):
            step(optimizers, [torch.randn(4, 8, 16, 32, generator=generator)])
            for optimizer in optimizers:
                (param,) = params_of(optimizer)
                param.grad, param.data = None, param.data.to(memory_format=torch.channels_last)
        assert_same(*optimizers)


@each(mode=FEW_MODES.keys(), case=IN_ENGINES)
def test_threads_and_ranges_do_not_change_the_bits(mode, case):
    before = torch.get_num_threads()
    results = []
    sizes = [200_003, 17, 65_536 * 3 + 5, 1, 5000]
    dtype = torch.float32 if mode == "plain-own" else torch.bfloat16
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(12)
            values = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
            results.append(make(case, values, "cpu", MODES[mode]))
            for _ in range(2):
                step([results[-1]], [torch.randn(n, generator=generator).to(dtype) for n in sizes])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(results[0], other)


@each(mode=[m for m in FEW_MODES if "bit" not in m], cuts=[[1, 100, 255, 256, 257, 1000], [3, 511, 513]])
def test_any_chunking_has_the_same_bits(mode, cuts):
    """Also of a chunk that begins in the middle of a counter's eight elements."""
    results = []
    for pieces in ([0, 1500], [0, *cuts, 1500]):
        generator = torch.Generator().manual_seed(13)
        optimizer = make(CASES[10], [torch.randn(1500, generator=generator).bfloat16()], "cpu", MODES[mode])
        (param,) = params_of(optimizer)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        param.grad = torch.randn(1500, generator=generator).bfloat16()
        (plan,) = optimizer.stepper.plans_that_fit(optimizer)
        hyper = optimizer.hyper(optimizer.param_groups[0], None)
        for first, last in itertools.pairwise(pieces):
            _C.cpu_run_range(plan.native, plan.step_with(hyper), first, last)
        plan.native.release_grads()
        results.append(optimizer)
    assert_same(*results)


def test_a_range_that_cuts_a_block_is_refused():
    optimizer = make(CASES[10], [torch.randn(5000)], "cpu", {"state_dtype": "8bit"})
    (param,) = params_of(optimizer)
    param.grad = torch.zeros_like(param)
    (plan,) = optimizer.stepper.new_plans(optimizer, planning.check_and_select(optimizer, needs_norm=False))
    hyper = optimizer.hyper(optimizer.param_groups[0], None)
    for first, last in ((0, 300), (300, 5000)):
        with pytest.raises(ValueError, match="range"):
            _C.cpu_run_range(plan.native, plan.step_with(hyper), first, last)


@hypothesis.given(
    numbers=st.lists(st.tuples(*[st.floats(width=32)] * 2), min_size=1, max_size=40),
    case=st.sampled_from(CASES),
    dtype=st.sampled_from(FLOATS),
)
@examples(150)
def test_any_numbers_have_the_references_bits(numbers, case, dtype):
    param, grad = torch.tensor(numbers, dtype=torch.float32).unbind(1)
    optimizers = pair(case, [param.to(dtype)], {})
    for _ in range(2):
        step(optimizers, [grad.to(dtype)])
    assert_same(*optimizers)


@hypothesis.given(
    numbers=st.lists(st.tuples(*[st.floats(width=32)] * 2), min_size=1, max_size=40),
    case=st.sampled_from(CASES),
    mode=st.sampled_from(sorted(MODES)),
    seed=st.integers(0, 2**63 - 1),
)
@examples(150)
def test_any_numbers_have_the_references_bits_in_every_format(numbers, case, mode, seed):
    param, grad = torch.tensor(numbers, dtype=torch.float32).unbind(1)
    optimizers = pair(case, [param.repeat(5000 // len(numbers) + 1).bfloat16()], {**MODES[mode], "rounding_seed": seed})
    for _ in range(2):
        step(optimizers, [grad.repeat(5000 // len(numbers) + 1)])
    assert_same(*optimizers)


@by_kind_in_engines
def test_many_steps_have_the_references_bits(case):
    generator = torch.Generator().manual_seed(6)
    optimizers = pair(case, [torch.randn(97, generator=generator)], {})
    for _ in range(150):
        step(optimizers, [torch.randn(97, generator=generator)])
    assert_same(*optimizers)


@by_mode
def test_a_plan_is_kept_from_step_to_step(mode):
    optimizer = make(CASES[10], [torch.randn(5000).bfloat16()], "cpu", mode)
    step([optimizer], [torch.randn(5000).bfloat16()])
    plans = optimizer.stepper.plans
    for _ in range(3):
        step([optimizer], [torch.randn(5000).bfloat16()])
    assert optimizer.stepper.plans is plans
    assert optimizer.kernel_calls == 1
