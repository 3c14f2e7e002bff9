"""The contract of an engine: the reference's bits, in every case, dtype, layout, format and feature of a step.

Each statement goes through the CPU engine by every instruction set, the CUDA source run on the host (by its kernels of
whole vectors and in the general way), Triton's kernels under their interpreter, and on a GPU through both engines. What
lies in memory is fenced by sentinels, at all addresses. On the host the CUDA source proves its logic, nothing of a GPU.
"""

import itertools
import math

import pytest
import torch
from contract import beside_the_reference, engine_named, normal
from host_plan import ElementwiseHostPlan, run_on_the_host
from kinds import ALL, CHOOSING, choosing_grads
from on_gpu import DRY
from support import ADAMW, BY_KIND, IN_ENGINES, WITH_STATES, by_kind, cases_of, each, precision_modes

import fusedstep
from fusedstep.cases import CASES, REDUCING, gradient, layouts
from fusedstep.kept.states import MIN_QUANTIZED
from fusedstep.verification import same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INFO = torch.finfo(torch.float32)
EDGES = [
    0.0,
    -0.0,
    INFO.tiny,
    -INFO.tiny / 8,
    INFO.max,
    -INFO.max,
    math.inf,
    math.nan,
    1e-20,
    1e20,
    1.0,
    -65519.0,
    6e-8,
]
PAIRS = torch.tensor(list(itertools.product(EDGES, EDGES)))
MODES = precision_modes("own", "fp32", "bf16", "8bit", "4bit")
by_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
ENGINES = [
    *("cpu", "cuda on the host", "cuda on the host in general", "triton interpreted"),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.cuda_engine]),
    pytest.param("triton", marks=[pytest.mark.gpu, pytest.mark.triton_engine]),
]
# Above the other marks of a test: the engines of a case come one after the other, and share the reference's steps.
by_engine = pytest.mark.parametrize("engine", ENGINES, indirect=True)


def cases_on_engines():
    """Every case on each engine; the general way, which is another way to the same text of a rule, by kind."""
    for case in CASES:
        for engine in ENGINES:
            name, marks = (engine, ()) if isinstance(engine, str) else (*engine.values, engine.marks)
            if case in BY_KIND or "general" not in name:
                yield pytest.param(case, name, marks=marks, id=f"{case}-{name}")


@pytest.fixture
def engine(request, monkeypatch):
    monkeypatch.setattr(ElementwiseHostPlan, "general", "general" in request.param)
    return engine_named(request.param, lambda: run_on_the_host(monkeypatch))


# Every length below twice the widest pack, around powers of two and chunks, and enough for several threads.
SIZES = [*range(34), 255, 256, 257, 1023, 1024, 1025, 2047, 2049, 5000, 70_001]
FEW_SIZES = [0, 1, 15, 17, 20, 16_385]  # a program of the interpreter takes 16384 elements


@pytest.mark.parametrize(("case", "engine"), [*cases_on_engines()], indirect=["engine"])
def test_every_size_dtype_and_layout_has_the_references_bits(case, engine):
    """All in one group, at different steps, with gradients of other layouts; and tensors of extreme numbers: zeros of
    both signs, subnormals, infinities, NaN, largest and smallest, in parameters and gradients."""
    generator = torch.Generator().manual_seed(5)
    values = normal((SIZES if engine.quick else FEW_SIZES) * 4, generator)
    values = [v.to(FLOATS[i * 4 // len(values)]) for i, v in enumerate(values)]
    if engine.quick:
        values += [v for dtype in FLOATS for v in layouts(dtype, "cpu", generator).values()]
    grads = [
        [
            None if (i + number) % 7 == 0 else gradient(v, v.dtype, generator, (i + number) % 3 == 0)
            for i, v in enumerate(values)
        ]
        for number in range(2)
    ]
    left, right = PAIRS.unbind(1)
    values += [left.to(dtype) for dtype in FLOATS]
    for given, extreme in zip(grads, (right, right.flip(0)), strict=True):
        given += [extreme.to(dtype) for dtype in FLOATS]
    optimizer = beside_the_reference("sizes", case, engine, values, grads)
    if "cuda" in engine.name and not DRY:
        assert optimizer.kernel_calls in (3, 4)  # fp32, bf16, and fp16 with fp64 or by itself
    elif engine.name != "triton":
        assert optimizer.kernel_calls == (1 if engine.quick else len(FLOATS))


@by_engine
@pytest.mark.parametrize("case", CHOOSING, ids=str)
def test_elements_for_which_a_rule_chooses_another_number_have_the_references_bits(case, engine):
    generator = torch.Generator().manual_seed(12)
    dtypes = torch.float32, torch.bfloat16, torch.float32
    sizes = [1024, 5000, 5000] if engine.quick else [1024, 500, 500]
    values = normal(sizes, generator, dtypes)
    grads = [choosing_grads(sizes, generator) for _ in range(12 if engine.quick else 4)]
    grads = [[grad.to(dtype) for grad, dtype in zip(some, dtypes, strict=True)] for some in grads]
    beside_the_reference("choosing", case, engine, values, grads)


@by_engine
@pytest.mark.parametrize("case", WITH_STATES, ids=str)
def test_every_mixture_of_dtypes_has_the_references_bits(case, engine):
    """The dtypes of parameter, gradient (which changes from step to step) and states."""
    mixtures = list(itertools.product(FLOATS, repeat=3))[:: 1 if engine.quick else 5]
    sizes = [1, 15, 16, 33, 700, 1500] if engine.quick else [17, 700]
    generator = torch.Generator().manual_seed(9)
    values, grads, states = [], [[], [], []], []
    for (param, grad, state), n in itertools.product(mixtures, sizes):
        values += normal([n], generator, (param,))
        states.append(state)
        for number, given in enumerate(grads):
            given += normal([n], generator, (FLOATS[(FLOATS.index(grad) + number) % 4],))
    beside_the_reference("mixtures", case, engine, values, grads, state_dtypes=states)


@by_engine
@by_kind
def test_gradients_come_and_go_scaled_and_steps_are_skipped(case, engine):
    """And a tensor is the learning rate, which is read in every step."""
    generator = torch.Generator().manual_seed(3)
    sizes = [5, 0, 1200, 40, 3001]
    grads = [[g if number >= i else None for i, g in enumerate(normal(sizes, generator))] for number in range(6)]

    def before(optimizer, number):
        if number == 0:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.0, device=engine.device)
        optimizer.param_groups[0]["lr"].fill_((0.01, 0.3, 0.002)[number % 3])
        optimizer.grad_scale = torch.tensor(3.0, device=engine.device)
        optimizer.found_inf = torch.tensor(float(number in (0, 3)), device=engine.device)

    beside_the_reference("skips", case, engine, normal(sizes, generator), grads, before=before)


@by_engine
@pytest.mark.parametrize("case", [ADAMW, CASES[-1], REDUCING[1]], ids=str)
def test_the_kernel_itself_skips_and_counts_nothing(case, engine):
    """On CPU tensors an optimizer looks at the flag; a plan does not, if it is told not to wait."""
    if engine.backend == "cpu" and (engine.name.startswith("cpu") or case in REDUCING):
        pytest.skip("the CPU engine is not called")
    optimizer = getattr(fusedstep, case.optimizer)(
        [torch.nn.Parameter(torch.ones(40, 30, device=engine.device))], backend=engine.backend, **case.options
    )
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones_like(param)
    optimizer.step()
    kept = {name: value for name, value in optimizer.state[param].items() if isinstance(value, torch.Tensor)}
    before = [param.detach().clone(), *[value.clone() for value in kept.values()]]
    (plan,) = optimizer.stepper.plans_that_fit(optimizer)
    hyper = optimizer.hyper(optimizer.param_groups[0], optimizer.variant_of(optimizer.param_groups[0], None, None))
    for flag in (math.inf, 1.0):
        plan.launch(plan.step_with(hyper, found_inf=torch.tensor(flag, device=engine.device)))
        assert all(map(same_bits, before, [param.detach(), *kept.values()]))
        assert plan.gather()
    plan.launch(plan.step_with(hyper, found_inf=torch.tensor(0.0, device=engine.device)))
    assert optimizer.state[param]["step"] == 2
    assert not torch.equal(param.detach(), before[0])


@by_engine
@each(case=IN_ENGINES, kept=[{"write_grads": True}, {}, {"zero_grads": True}])
def test_clipped_gradients_and_what_is_left_of_them_have_the_references_bits(case, engine, kept):
    """By the largest gradient, which is the same number on every backend; sums are not. One step is skipped."""
    generator = torch.Generator().manual_seed(7)
    sizes = [5, 0, 1200, 40, 3001] * 4
    dtypes = [FLOATS[i // 5] for i in range(20)]
    values, *grads = (normal(sizes, generator) for _ in range(4))
    values, *grads = ([v.to(dtype) for v, dtype in zip(some, dtypes, strict=True)] for some in (values, *grads))
    grads[1][3][7] = math.nan
    options = {"max_grad_norm": 0.3, "norm_type": math.inf, "skip_nonfinite": True, **kept}
    optimizer = beside_the_reference("clipped", case, engine, values, grads, **options)
    assert optimizer.grad_norm.isfinite()


@by_engine
@each(case=IN_ENGINES, copy=[torch.bfloat16, torch.float16])
def test_averages_and_copies_have_the_references_bits(case, engine, copy):
    generator = torch.Generator().manual_seed(9)
    sizes = [5, 5, 5, 5, 0, 1200, 1201, 1202, 1203, *([9001, 9002, 9003, 9004] if engine.quick else ())]
    values, *grads = (normal(sizes, generator, FLOATS) for _ in range(4 if engine.quick else 3))
    grads[-1][3] = grads[1][6] = None

    def before(optimizer, number):
        optimizer.found_inf = torch.tensor(float(number == 1), device=engine.device)

    options = {"ema_decay": 0.7, "weights_copy": copy}
    beside_the_reference("averages", case, engine, values, grads, before=before, **options)


# The precision options: how weights and states are stored.

BLOCKS = [0, 1, 7, 8, 9, 255, 256, 257, 4095, 4096, 4097, 4352, 9001]
FEW_BLOCKS = [0, 1, 9, 257, 4095, 4097]
SIGNS = next(case for case in CASES if case.optimizer == "Amos" and "momentum" in case.options)


def stored_as(mode):
    """The dtypes of weights for which there is this mode."""
    if mode.get("master_weights") == "split":
        return (torch.bfloat16,)
    weights = mode.keys() - {"state_dtype"}
    return (torch.bfloat16, torch.float16) if weights else (torch.bfloat16, torch.float16, torch.float32)


def cases_in(mode, engine):
    """One of each kind, and of the other cases a part in each mode; by Triton's interpreter one."""
    if ALL or engine.quick:
        return cases_of(mode, MODES)
    few = [*IN_ENGINES, SIGNS]
    return [few[list(MODES.values()).index(mode) % len(few)]]


def extremes(steps):
    """Numbers, and gradients for some steps: in whole vectors and blocks as in the rest of them."""
    pairs = PAIRS.clone()
    pairs[pairs.isnan()] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounding carries over
    numbers, grads = pairs.unbind(1)
    ordinary = torch.randn(1000, generator=torch.Generator().manual_seed(13))
    numbers = torch.cat((ordinary, numbers, ordinary, numbers)).repeat(2)
    grads = torch.cat((ordinary.roll(9), grads, ordinary.roll(3), grads)).repeat(2)
    grads[300] = math.inf  # alone in its block
    assert numbers.numel() >= MIN_QUANTIZED  # states of smaller ones are not in 8 bits
    assert numbers.numel() % 256
    every = [*(grads.roll(100 * number) for number in range(3)), grads * 1e-30, ordinary.repeat(6)[: numbers.numel()]]
    return numbers, every[-steps:]


@by_engine
@by_mode
def test_every_format_has_the_references_bits(mode, engine):
    """Tensors of extreme numbers too, and weights of theirs that somebody has set to zero or NaN."""
    dtypes = stored_as(mode)
    numbers, extreme = extremes(5 if engine.quick else 3)

    def before(optimizer, number):
        for param in optimizer.param_groups[0]["params"][-len(dtypes) :] if number else ():
            with torch.no_grad():
                param[number:900:7] = (0.0, -0.0, math.nan)[number % 3]

    for case in cases_in(mode, engine):
        generator = torch.Generator().manual_seed(5)
        sizes = [n for n in (BLOCKS if engine.quick else FEW_BLOCKS) for _ in dtypes]
        values = normal(sizes, generator, dtypes)
        grads = [normal(sizes, generator, dtypes), normal(sizes, generator)]
        for number, given in enumerate(grads):
            given[5 * number] = None
        grads += [[None] * len(values) for _ in extreme[2:]]
        values += [numbers.to(dtype) for dtype in dtypes]
        for given, each_has in zip(grads, extreme, strict=True):
            given += [each_has.to(dtype) for dtype in dtypes]
        grads[-1][-len(dtypes) :] = [extreme[-1]] * len(dtypes)  # fp32
        beside_the_reference("formats", case, engine, values, grads, before=before, **mode)


@by_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_that_were_written_beside_remainders_have_the_references_bits(dtype, engine):
    """With gradients for which there is no kernel of whole vectors, and with those for which there is one."""
    generator = torch.Generator().manual_seed(8)

    def before(optimizer, number):
        optimizer.param_groups[0]["params"][0].data.mul_(torch.arange(5000, device=engine.device) % 2)

    values, *grads = (normal([5000], generator, (torch.bfloat16, dtype)[k > 0 :]) for k in range(3))
    mode = MODES["split-own"]
    optimizer = beside_the_reference("zeros", CASES[0], engine, values, grads, before=before, **mode)
    assert optimizer.param_groups[0]["params"][0].isfinite().all()
