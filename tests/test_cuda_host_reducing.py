"""The CUDA kernels of rules that reduce, their source run thread by thread on the host, against the reference.

The optimizers are whole, only the launch is replaced: layouts, dtypes, missing gradients and skipped steps go through
the plan that a GPU would have. It proves nothing of a GPU.
"""

import pytest
import torch
from host_plan import FLOATS, HostPlan, built
from kinds import ALL, each

import fusedstep
from fusedstep import backends
from fusedstep.backends.cpu import CpuBackend, CpuPlan
from fusedstep.cases import REDUCING, gradient, layouts
from fusedstep.counts import count_of
from fusedstep.verification import same_bits


class ReducingHostPlan(HostPlan):
    def run(self, scalars, gradients, tensors):
        return self.library.host_reducing_step(self.rule.encode(), len(self.states), scalars, *gradients, *tensors)


class HostBackend(CpuBackend):
    def plan(self, optimizer, group, options, variant, *args):
        kind = ReducingHostPlan if optimizer.rule_of(variant)[1] else CpuPlan
        return kind(self, optimizer, group, options, variant, *args)


@pytest.fixture
def library():
    return built("reducing", "reducing.cpp", "cuda_reducing_table.cpp")


@pytest.fixture
def on_host(library, monkeypatch):
    """Makes backend="cpu" run the CUDA kernels on the host."""
    monkeypatch.setattr(HostPlan, "library", library)
    monkeypatch.setitem(backends.BACKENDS, "cpu", HostBackend())
    monkeypatch.setattr(backends, "_selected", {})
    yield monkeypatch
    library.set_reverse(0)


by_case = pytest.mark.parametrize("case", REDUCING, ids=str)
MOMENTUM, TORCH = REDUCING[3], REDUCING[4]
RULES = [MOMENTUM, TORCH, REDUCING[6], REDUCING[7]]  # those of Amos for rows, and for columns
by_kind = pytest.mark.parametrize("case", [MOMENTUM, TORCH], ids=str)

# Flat, small (for a thread and for a warp each), and tiles: one and several strips, rows narrower than a warp, rows of
# whole packs and others, more columns than an item has, several blocks of rows.
SHAPES = [
    *((), (1,), (17,), (8200,), (0,), (3, 0), (0, 3), (2, 0, 4)),
    *((1, 1), (2, 3), (700, 1, 3, 3), (40, 5, 7), (3, 32, 32)),
    *((200, 12), (1030, 3), (3, 2100), (2, 66, 36), (70, 1300), (65, 517), (1, 33_000), (9000, 4)),
]
FEW_SHAPES = [(), (300,), (0, 3), (50, 3, 3), (2, 20, 31), (70, 136), (65, 517)]
# Sums are in another order than the reference's, in the arithmetic type: this is far above what that makes of them, and
# far below what a missing term would. A stored number may round to the neighbour.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make(case, values, backend, **options):
    params = [torch.nn.Parameter(value.detach().clone()) for value in values]
    for param in params:
        param.grad_dtype = None
    return getattr(fusedstep, case.optimizer)(params, backend=backend, **case.options, **options)


def pair(case, values, **options):
    return [make(case, values, backend, **options) for backend in ("cpu", "reference")]


def random(shapes, generator, dtypes=(torch.float32,)):
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    ]


def step(optimizers, grads, **attributes):
    for optimizer in optimizers:
        for name, value in attributes.items():
            setattr(optimizer, name, value)
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()


def tensors(optimizer):
    params = optimizer.param_groups[0]["params"]
    return [p.detach() for p in params] + [
        value for p in params for value in optimizer.state.get(p, {}).values() if isinstance(value, torch.Tensor)
    ]


def assert_close(optimizers):
    for mine, expected in zip(*map(tensors, optimizers), strict=True):
        if mine.numel():
            bound = TOLERANCE[mine.dtype]
            largest = expected.abs().nan_to_num().max().item()
            atol = 0.1 * bound * max(largest, 1.0)  # a number near zero is what two larger ones have left
            torch.testing.assert_close(mine, expected, rtol=bound, atol=atol, equal_nan=True)


def launches_of(case):
    """For tensors of one dtype: two or three passes over tiles of whole vectors, and over everything else."""
    passes = 2 * (2 if case.optimizer == "Amos" else 3)
    # Amos' scalars are updated by an elementwise rule, its vectors by rows whatever is reduced.
    return {(-1,): passes + 1, (0,): 2 * passes + 1}.get(case.options.get("reduce"), passes)


@by_case
def test_every_shape_is_close_to_the_reference(on_host, case):
    """The large ones with a case of each rule alone: their threads are many."""
    shapes = SHAPES if ALL or case in RULES else FEW_SHAPES
    generator = torch.Generator().manual_seed(1)
    optimizers = pair(case, random(shapes, generator))
    for _ in range(2):
        step(optimizers, random(shapes, generator))
    assert_close(optimizers)
    assert optimizers[0].kernel_calls == launches_of(case)


@by_kind
def test_steps_are_counted_beyond_what_fp32_holds(on_host, case):
    generator = torch.Generator().manual_seed(9)
    optimizers = pair(case, random(FEW_SHAPES, generator))
    step(optimizers, random(FEW_SHAPES, generator))
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["step"].fill_(2**24)
    for _ in range(3):
        step(optimizers, random(FEW_SHAPES, generator))
    assert_close(optimizers)
    counters = [state["step"] for optimizer in optimizers for state in optimizer.state.values()]
    assert {count_of(counter) for counter in counters} == {2**24 + 3}


@by_kind
def test_many_steps_stay_close_to_the_reference(on_host, case):
    generator = torch.Generator().manual_seed(2)
    shapes = [(), (30,), (5, 3, 3), (20, 31), (70, 36)]
    optimizers = pair(case, random(shapes, generator))
    for _ in range(20):
        step(optimizers, random(shapes, generator))
    assert_close(optimizers)


@by_kind
@each(param=FLOATS, grad=FLOATS)
def test_every_mixture_of_dtypes_is_close_to_the_reference(on_host, case, param, grad):
    generator = torch.Generator().manual_seed(3)
    shapes = [(17,), (3, 5, 7), (66, 24), (40, 33)]
    optimizers = pair(case, random(shapes, generator, (param,)))
    for dtype in (torch.float32, param):  # the states' too
        step(optimizers, random(shapes, generator, (grad,)))
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if name != "step":
                        state[name] = value.to(dtype)
    step(optimizers, random(shapes, generator, (grad,)))
    assert_close(optimizers)


@by_kind
def test_a_group_of_mixed_dtypes_and_layouts_is_close_to_the_reference(on_host, case):
    generator = torch.Generator().manual_seed(4)
    values = [value for dtype in FLOATS for value in layouts(dtype, "cpu", generator).values()]
    optimizers = pair(case, values)
    for number in range(2):
        params = optimizers[0].param_groups[0]["params"]
        step(optimizers, [gradient(p, p.dtype, generator, (i + number) % 3 == 0) for i, p in enumerate(params)])
    assert_close(optimizers)


@each(case=[MOMENTUM, TORCH], dtype=[torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_grid_threads_and_addresses_nor_on_other_tensors(on_host, library, case, dtype):
    generator = torch.Generator().manual_seed(5)
    values, grads = (random(FEW_SHAPES, generator, (dtype,)) for _ in range(2))
    results = []
    for blocks, reverse, offset, alone in [(1, 0, 0, False), (7, 1, 0, False), (40, 0, 1, False), (3, 1, 3, True)]:
        on_host.setattr(HostPlan, "blocks", blocks)
        library.set_reverse(reverse)
        optimizers = [make(case, part, "cpu") for part in ([[v] for v in values] if alone else [values])]
        for index, value in enumerate(values):
            optimizer, place = (optimizers[index], 0) if alone else (optimizers[0], index)
            param = optimizer.param_groups[0]["params"][place]
            buffers = [torch.zeros(value.numel() + 16, dtype=dtype) for _ in range(2)]
            parts = [b[offset : offset + value.numel()].view(value.shape) for b in buffers]
            param.data, param.grad = parts[0].copy_(value), parts[1].copy_(grads[index])
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.step()
        if alone:
            results.append([t for optimizer in optimizers for t in tensors(optimizer)[:1]])
        else:
            results.append(tensors(optimizers[0])[: len(values)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@by_kind
def test_gradients_come_and_go_scaled_and_steps_are_skipped(on_host, case):
    generator = torch.Generator().manual_seed(6)
    shapes = [(5,), (0, 2), (40, 30), (3, 4, 4), (70, 24)]
    optimizers = pair(case, random(shapes, generator))
    for number in range(6):
        grads = [g if number >= i else None for i, g in enumerate(random(shapes, generator))]
        step(optimizers, grads, grad_scale=torch.tensor(3.0), found_inf=torch.tensor(float(number in (0, 3))))
    assert_close(optimizers)


def test_the_kernels_themselves_skip_and_count_nothing(on_host):
    optimizer = make(MOMENTUM, [torch.ones(40, 30), torch.ones(7)], "cpu")
    params = optimizer.param_groups[0]["params"]
    lr = optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = [t.clone() for t in tensors(optimizer)]
    (plan,) = optimizer.stepper.plans_that_fit(optimizer)
    hyper = optimizer.hyper(optimizer.param_groups[0], None)
    plan.launch(plan.step_with(hyper, True, found_inf=torch.tensor(float("inf"))))
    assert all(same_bits(a, b) for a, b in zip(before, tensors(optimizer), strict=True))
    assert plan.gather()
    lr.zero_()  # read by the kernel: only the momentum is left to move the parameter
    plan.launch(plan.step_with(hyper, True, found_inf=torch.tensor(0.0)))
    assert optimizer.state[params[0]]["step"] == 2
    torch.testing.assert_close(
        params[0].detach() - before[0], 0.5 * 0.5 * 0.05 * torch.ones(40, 30), rtol=1e-4, atol=1e-7
    )


def test_many_tensors_take_few_launches(on_host):
    generator = torch.Generator().manual_seed(7)
    on_host.setattr(HostPlan, "blocks", 1)
    optimizers = pair(TORCH, random([(2, 2)] * 4001, generator))
    step(optimizers, random([(2, 2)] * 4001, generator))
    assert optimizers[0].kernel_calls == 6  # no tiles
    assert_close(optimizers)


@by_kind
@each(dtype=[torch.float32, torch.bfloat16], kept=[{}, {"zero_grads": True}, {"write_grads": True}])
def test_clipped_gradients_and_what_is_left_of_them(on_host, case, dtype, kept):
    generator = torch.Generator().manual_seed(12)
    optimizers = pair(case, random(FEW_SHAPES, generator, (dtype,)), max_grad_norm=1.0, skip_nonfinite=True, **kept)
    for number in range(3):
        grads = random(FEW_SHAPES, generator, (dtype,))
        if number == 1:
            grads[1][7] = torch.inf
        before = [t.clone() for t in tensors(optimizers[0])]
        step(optimizers, grads)
        if number == 1:
            for a, b in zip(tensors(optimizers[0]), before, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b, grad in zip(*[o.param_groups[0]["params"] for o in optimizers], grads, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
            assert "zero_grads" not in kept or not a.grad.any()
            assert kept or torch.equal(a.grad, grad)
    assert_close(optimizers)


@each(case=[MOMENTUM, TORCH], dtype=[torch.float32, torch.bfloat16, torch.float64])
def test_averages_and_copies_follow_the_parameters(on_host, case, dtype):
    generator = torch.Generator().manual_seed(13)
    values = random(FEW_SHAPES, generator, (dtype,))
    optimizer = make(case, values, "cpu", ema_decay=0.75, weights_copy=torch.float16)
    params = optimizer.param_groups[0]["params"]
    expected = [v.to(torch.promote_types(dtype, torch.float32)) for v in values]
    for _ in range(3):
        step([optimizer], random(FEW_SHAPES, generator, (dtype,)))
        for i, param in enumerate(params):
            expected[i] = expected[i] + 0.25 * (param.detach().to(expected[i].dtype) - expected[i])
            assert same_bits(optimizer.state[param]["ema"], expected[i])
            assert same_bits(optimizer.copies[param], param.detach().to(torch.float16))
