"""The contract of the engines for rules that reduce: the reference's numbers but for the order of sums, and bits that
depend on nothing but a tensor's own numbers.

Each statement goes through the CPU engine, the CUDA source run on the host, at once and in the stages of a step on
parts, Triton's kernels under their interpreter, and on a GPU through both engines. On the host the CUDA source proves
its logic, nothing of a GPU.
"""

import math

import pytest
import torch
from contract import Beside, Fences, engine_named, normal, params_of
from host_plan import (
    HostPlan,
    launches_of,
    reducing_library,
    run_reducing_on_the_host,
    run_stages_on_the_host,
)
from kinds import ALL, OF_EACH_REDUCING, each
from on_gpu import DRY

import fusedstep
from fusedstep.cases import REDUCING, gradient, layouts
from fusedstep.counts import count_of
from fusedstep.verification import same_bits

ENGINES = [
    *("cpu", "cuda on the host", "cuda in stages on the host", "triton interpreted"),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.cuda_engine]),
    pytest.param("triton", marks=[pytest.mark.gpu, pytest.mark.triton_engine]),
]
pytestmark = pytest.mark.parametrize("engine", ENGINES, indirect=True)
by_case = pytest.mark.parametrize("case", REDUCING, ids=str)
MOMENTUM, TORCH = REDUCING[3], REDUCING[4]
by_kind = pytest.mark.parametrize("case", [MOMENTUM, TORCH], ids=str)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Flat, small (for a thread and for a warp each), and tiles: one and several strips, rows narrower than a warp, rows of
# whole packs and others, more columns than an item has, several blocks of rows, several matrices.
FEW_SHAPES = [(), (300,), (0, 3), (3, 0), (50, 3, 3), (2, 20, 31), (2, 9, 170)]
SOME_SHAPES = [*FEW_SHAPES, (70, 136), (65, 517)]
SHAPES = [
    *SOME_SHAPES,
    *((1,), (17,), (8200,), (0,), (2, 0, 4), (1, 1), (2, 3), (700, 1, 3, 3), (40, 5, 7), (3, 32, 32)),
    *((200, 12), (300, 150), (1030, 3), (3, 2100), (2, 66, 36), (70, 1300), (1, 33_000), (9000, 4)),
]
LARGE_SHAPES = [(640, 3, 3), (768, 768), (5000, 512), (1, 70_000)]


@pytest.fixture
def engine(request, monkeypatch):
    run = run_stages_on_the_host if "stages" in request.param else run_reducing_on_the_host
    yield engine_named(request.param, lambda: run(monkeypatch))
    if request.param.endswith("on the host"):
        reducing_library().set_reverse(0)


def shapes_for(engine):
    return SOME_SHAPES if engine.quick else FEW_SHAPES


def numbers_of(optimizer):
    states = [optimizer.state.get(param, {}) for param in params_of(optimizer)]
    return [p.detach() for p in params_of(optimizer)] + [
        value for state in states for value in state.values() if isinstance(value, torch.Tensor)
    ]


@by_case
def test_every_shape_has_the_references_numbers(case, engine):
    """Where threads or programs are simulated, the large ones with a case of each rule alone."""
    if engine.device == "cuda":
        shapes = [*SHAPES, *LARGE_SHAPES]
    elif engine.name == "cpu" or (engine.quick and (ALL or case in OF_EACH_REDUCING)):
        shapes = SHAPES
    else:
        shapes = shapes_for(engine)
    generator = torch.Generator().manual_seed(1)
    both = Beside(case, engine, normal(shapes, generator))
    for _ in range(2):
        both.step(normal(shapes, generator))
    both.check()


@by_kind
def test_many_steps_stay_with_the_reference(case, engine):
    """They are counted beyond what fp32 holds."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(), (30,), (5, 3, 3), (20, 31), (70, 36)]
    both = Beside(case, engine, normal(shapes, generator))
    for number in range(10 if engine.quick else 5):
        if number == 2:
            for optimizer in both.optimizers:
                for state in optimizer.state.values():
                    state["step"].fill_(2**24)
        both.step(normal(shapes, generator))
    both.check()
    counters = {count_of(state["step"]) for optimizer in both.optimizers for state in optimizer.state.values()}
    assert counters == {2**24 + (8 if engine.quick else 3)}


@each(case=[MOMENTUM, TORCH], param=FLOATS, grad=FLOATS)
def test_every_mixture_of_dtypes_has_the_references_numbers(case, param, grad, engine):
    generator = torch.Generator().manual_seed(3)
    shapes = [(17,), (3, 5, 7), (66, 24), (40, 33)]
    both = Beside(case, engine, normal(shapes, generator, (param,)))
    for dtype in (torch.float32, param):  # the states' too
        both.step(normal(shapes, generator, (grad,)))
        for optimizer in both.optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if name != "step":
                        state[name] = value.to(dtype)
    both.step(normal(shapes, generator, (grad,)))
    both.check()


@by_kind
def test_a_group_of_mixed_dtypes_and_layouts_has_the_references_numbers(case, engine):
    generator = torch.Generator().manual_seed(4)
    values = [value for dtype in FLOATS for value in layouts(dtype, "cpu", generator).values()]
    both = Beside(case, engine, values if engine.quick else values[::3])
    for number in range(2):
        params = params_of(both.mine)
        both.step([gradient(p, p.dtype, generator, (i + number) % 3 == 0) for i, p in enumerate(params)])
    both.check()


@by_kind
def test_gradients_come_and_go_scaled_and_steps_are_skipped(case, engine):
    generator = torch.Generator().manual_seed(6)
    shapes = [(5,), (0, 2), (40, 30), (3, 4, 4), (70, 24)]
    both = Beside(case, engine, normal(shapes, generator))
    for number in range(6):
        grads = [g if number >= i else None for i, g in enumerate(normal(shapes, generator))]
        both.step(grads, grad_scale=3.0, found_inf=float(number in (0, 3)))
    both.check()


def test_the_kernels_themselves_skip_and_count_nothing(engine):
    """On CPU tensors an optimizer looks at the flag; a plan does not, if it is told not to wait."""
    if engine.name == "cpu" or DRY:
        pytest.skip("the CPU engine is not called")
    make = getattr(fusedstep, MOMENTUM.optimizer)
    values = [torch.ones(shape, device=engine.device) for shape in ((40, 30), (7,))]
    optimizer = make([torch.nn.Parameter(v) for v in values], backend=engine.backend, **MOMENTUM.options)
    lr = optimizer.param_groups[0]["lr"] = torch.tensor(0.05, device=engine.device)
    params = params_of(optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = [t.clone() for t in numbers_of(optimizer)]
    (plan,) = optimizer.stepper.plans_that_fit(optimizer)
    hyper = optimizer.hyper(optimizer.param_groups[0], None)
    for flag in (math.inf, 1.0):
        plan.launch(plan.step_with(hyper, True, found_inf=torch.tensor(flag, device=engine.device)))
        assert all(map(same_bits, before, numbers_of(optimizer)))
        assert plan.gather()
    lr.zero_()  # read by the kernel: only the momentum is left to move the parameter
    plan.launch(plan.step_with(hyper, True, found_inf=torch.tensor(0.0, device=engine.device)))
    assert [optimizer.state[param]["step"] for param in params] == [2, 2]
    moved = (params[0].detach() - before[0]).cpu()
    torch.testing.assert_close(moved, 0.5 * 0.5 * 0.05 * torch.ones(40, 30), rtol=1e-4, atol=1e-7)


@each(case=[MOMENTUM, TORCH], dtype=[torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_addresses_nor_on_other_tensors(case, dtype, engine, monkeypatch):
    """On the host neither on the grid, and on the order of blocks and threads."""
    generator = torch.Generator().manual_seed(5)
    shapes = shapes_for(engine)
    values, grads = ([v.to(engine.device) for v in normal(shapes, generator, (dtype,))] for _ in range(2))
    make = getattr(fusedstep, case.optimizer)
    results = []
    for blocks, reverse, offset, alone in [(1, 0, 0, False), (7, 1, 0, False), (40, 0, 1, False), (3, 1, 3, True)]:
        if engine.name.endswith("on the host"):
            monkeypatch.setattr(HostPlan, "blocks", blocks)
            reducing_library().set_reverse(reverse)
        fences = Fences()
        params = [torch.nn.Parameter(fences.around(value, offset)) for value in values]
        for param, grad in zip(params, grads, strict=True):
            param.grad = fences.around(grad, offset)
        groups = [[param] for param in params] if alone else [params]
        optimizers = [make(group, backend=engine.backend, **case.options) for group in groups]
        for _ in range(2 if engine.quick else 1):
            for optimizer in optimizers:
                optimizer.step()
        fences.check()
        results.append([param.detach() for param in params])
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@each(
    case=[MOMENTUM, TORCH],
    dtype=[torch.float32, torch.bfloat16],
    kept=[{}, {"zero_grads": True}, {"write_grads": True}],
)
def test_clipped_gradients_and_what_is_left_of_them(case, dtype, kept, engine):
    """By the largest gradient, which is the same number on every backend. One step is skipped."""
    generator = torch.Generator().manual_seed(12)
    shapes = shapes_for(engine)
    options = {"max_grad_norm": 0.7, "norm_type": math.inf, "skip_nonfinite": True, **kept}
    both = Beside(case, engine, normal(shapes, generator, (dtype,)), **options)
    for number in range(3):
        grads = normal(shapes, generator, (dtype,))
        if number == 1:
            grads[1][7] = math.inf
        before = [t.clone() for t in numbers_of(both.mine)]
        both.step(grads)
        if number == 1:
            assert all(map(same_bits, numbers_of(both.mine), before))
        for a, b, grad in zip(*map(params_of, both.optimizers), grads, strict=True):
            assert same_bits(a.grad, b.grad)
            assert "zero_grads" not in kept or not a.grad.any()
            assert kept or torch.equal(a.grad.cpu(), grad)
    both.check()


@each(case=[MOMENTUM, TORCH], dtype=FLOATS)
def test_averages_and_copies_follow_the_parameters(case, dtype, engine):
    generator = torch.Generator().manual_seed(13)
    shapes = shapes_for(engine)
    options = {"ema_decay": 0.75, "weights_copy": torch.float16}
    both = Beside(case, engine, normal(shapes, generator, (dtype,)), **options)
    params, copies = params_of(both.mine), both.mine.copies
    expected = [p.detach().to(torch.promote_types(dtype, torch.float32), copy=True) for p in params]
    for _ in range(3 if engine.quick else 2):
        both.step(normal(shapes, generator, (dtype,)))
        for i, param in enumerate(params):
            expected[i] = expected[i] + 0.25 * (param.detach().to(expected[i].dtype) - expected[i])
            assert same_bits(both.mine.state[param]["ema"], expected[i])
            assert same_bits(copies[param], param.detach().to(torch.float16))
    both.check()


@pytest.mark.parametrize("case", REDUCING if ALL else OF_EACH_REDUCING, ids=str)
def test_a_step_is_a_few_launches(case, engine):
    if engine.name == "cpu" or DRY:
        pytest.skip("the CPU engine launches nothing")
    generator = torch.Generator().manual_seed(7)
    shapes = [*shapes_for(engine), (64, 40), (8192,)]  # tiles of whole vectors too
    stages = "stages" in engine.name
    many = engine.quick and case == TORCH and (ALL or not stages)
    if many:
        shapes += [(2, 2)] * 4001  # more than one launch has room for
    both = Beside(case, engine, normal(shapes, generator), offsets=1)
    both.step(normal(shapes, generator))
    both.check()
    if "triton" in engine.name:
        # Amos: two for rows, two for columns (a vector is one row), one for the scalar, which has nothing to reduce.
        assert both.mine.kernel_calls == (5 if case.options.get("reduce") == (0,) else 3)
    else:
        assert both.mine.kernel_calls == launches_of(case, stages) + (7 if stages else 3) * many
