"""The CUDA kernel's source, compiled by the C++ compiler and run thread by thread on the host, against the reference.

This proves the kernel's own logic: chunks, dtypes, tails, skipped tensors, step counters. It proves nothing of a GPU.
"""

import ctypes
import itertools
import math

import numpy as np
import pytest
import torch
from host_plan import FLOATS, MAX_HYPER, TAG, Scalar, at, step_library
from kinds import ALL, CHOOSING, choosing_grads
from support import WITH_STATES, by_case, by_kind_in_engines, each, parametrize_cases

import fusedstep
from fusedstep import _C, codecs, schedules
from fusedstep.backends import BACKENDS
from fusedstep.cases import CASES
from fusedstep.counts import count_of
from fusedstep.kept.states import scale_name
from fusedstep.record import memory_layout
from fusedstep.schedules import on_device
from fusedstep.verification import same_bits


@pytest.fixture
def library():
    return step_library()


def inside(values, offset):
    """The values in a larger buffer full of sentinels, ``offset`` elements from its 64-byte aligned start."""
    buffer = torch.full((values.numel() + 64,), 7.0, dtype=values.dtype)
    start = (-buffer.data_ptr() // buffer.element_size()) % (64 // buffer.element_size()) + offset
    view = buffer[start : start + values.numel()]
    view.copy_(values)
    return buffer, view


def address_of(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def tag_of(state, param, signed):
    """How csrc/numeric.h's Dtype numbers the format of a state."""
    if state is None:
        return TAG[param.dtype]
    packed = codecs.quantizer_of(state, param) is codecs.FOUR_BITS
    return (7 if signed else 8) if packed else TAG[state.dtype]


def fill(record, optimizer, index, param, grad):
    """Make a record of a parameter, as a plan does."""
    options, state = optimizer.stepper.kept.weights, optimizer.state[param]
    states = [state.get(name) for name in optimizer.state_names]
    form = options.format_of(param)
    record["param"], record["numel"], record["param_dtype"] = param.data_ptr(), param.numel(), TAG[param.dtype]
    record["grad_dtype"] = TAG[param.dtype if grad is None else grad.dtype]
    record["step"] = state.get("step", optimizer.stepper.kept.step.beside.get(param)).data_ptr()
    record["states"][: len(states)] = [address_of(value) for value in states]
    record["state_dtypes"][: len(states)] = [
        tag_of(v, param, name not in optimizer.non_negative)
        for v, name in zip(states, optimizer.state_names, strict=True)
    ]
    record["companion"] = address_of(state.get(form.key))
    record["scales"][: len(states)] = [address_of(state.get(scale_name(name))) for name in optimizer.state_names]
    record["seed"], record["index"], record["form"] = options.seed, index, form.number
    quantizers = {codecs.quantizer_of(v, param) for v, scale in zip(states, record["scales"], strict=False) if scale}
    record["state_bits"] = max((quantizer.bits for quantizer in quantizers), default=0)


def run_on_host(
    library,
    optimizer,
    grads,
    *,
    grad_scale=None,
    found_inf=None,
    coefficient=None,
    zero=False,
    write=False,
    average_weight=0.0,
    followers=None,
    tensor_hyper=False,
    general=False,
    threads=64,
):
    """One step of ``optimizer`` by the kernel; ``grads`` has None where a parameter takes no part."""
    group = optimizer.param_groups[0]
    states = optimizer.states_of(group)
    records, keep = np.zeros(len(grads), memory_layout()), []
    for index, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
        fill(records[index], optimizer, index, param, grad)
    for record, (average, copy) in zip(records, followers or (), strict=False):
        record["average"], record["copy"] = average.data_ptr(), copy.data_ptr()
        record["copy_dtype"] = TAG[copy.dtype]
    hyper = (Scalar * MAX_HYPER)()
    for scalar, value in zip(hyper, optimizer.hyper(group, optimizer.variant_of(group, None, None)), strict=False):
        if tensor_hyper:
            keep.append(torch.tensor(float(value), dtype=torch.float64))
            scalar.tensor, scalar.dtype = keep[-1].data_ptr(), TAG[torch.float64]
        else:
            scalar.value = float(value)
    addresses = [None if g is None else (g.data_ptr() or 64) for g in grads]
    flags = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (grad_scale, found_inf, coefficient)]
    return library.host_step(
        _C.rule_id(optimizer.rule, states),
        hyper,
        ctypes.c_bool(group["maximize"]),
        ctypes.c_bool(zero),
        ctypes.c_bool(write),
        *flags,
        ctypes.c_double(average_weight),
        at(records),
        ctypes.c_int64(len(records)),
        (ctypes.c_void_p * len(addresses))(*addresses),
        2,
        ctypes.c_bool(general),
        threads,
    )


class Pair:
    """The same case twice: one for the kernel, in sentinel-filled buffers, and one for the reference."""

    def __init__(self, case, sizes, param=torch.float32, state=None, offset=0):
        generator = torch.Generator().manual_seed(1)
        values = [torch.randn(n, generator=generator).to(param) for n in sizes]
        self.buffers, views = zip(*[inside(v, offset) for v in values], strict=True)
        self.kernel = getattr(fusedstep, case.optimizer)([torch.nn.Parameter(v) for v in views], **case.options)
        self.reference = getattr(fusedstep, case.optimizer)(
            [torch.nn.Parameter(v.clone()) for v in values], backend="reference", **case.options
        )
        for optimizer in (self.kernel, self.reference):
            group = optimizer.param_groups[0]
            for p in group["params"]:
                p.grad_dtype = None
                if optimizer.step_form != "absent":
                    optimizer.state[p]["step"] = torch.tensor(0.0)
                else:
                    optimizer.stepper.kept.step.beside[p] = torch.tensor(0.0)
                for name in optimizer.states_of(group):
                    _, optimizer.state[p][name] = inside(torch.zeros(p.numel(), dtype=state or param), offset)

    def step(self, library, grads, offset=0, grad_scale=None, found_inf=None, **options):
        for p, g in zip(self.reference.param_groups[0]["params"], grads, strict=True):
            p.grad = None if g is None else g.clone()
        self.reference.grad_scale, self.reference.found_inf = grad_scale, found_inf
        self.reference.step()
        grads = self.grads = [None if g is None else inside(g, offset)[1] for g in grads]
        options.update(grad_scale=grad_scale, found_inf=found_inf)
        return run_on_host(library, self.kernel, grads, **options)

    def assert_same(self):
        for i, (a, b) in enumerate(
            zip(self.kernel.param_groups[0]["params"], self.reference.param_groups[0]["params"], strict=True)
        ):
            assert same_bits(a.detach(), b.detach()), f"parameter {i} of {a.numel()} elements"
            for name in self.kernel.state.get(a, {}):
                assert same_bits(self.kernel.state[a][name], self.reference.state[b][name]), (name, i)
        for buffer, param in zip(self.buffers, self.kernel.param_groups[0]["params"], strict=True):
            assert (buffer == 7.0).sum() >= buffer.numel() - param.numel()


SIZES = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 5000]


def random_grads(sizes, generator, dtype=torch.float32):
    return [torch.randn(n, generator=generator).to(dtype) for n in sizes]


@by_case
def test_every_size_and_offset_has_the_references_bits(library, case):
    for offset, general in [(0, False), (1, False), (3, False), (1, True)]:
        generator = torch.Generator().manual_seed(2)
        pair = Pair(case, SIZES, offset=offset)
        for _ in range(2):
            assert pair.step(library, random_grads(SIZES, generator), offset, general=general) == 1
        pair.assert_same()


@pytest.mark.parametrize("case", CHOOSING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("general", [False, True])
def test_elements_for_which_a_rule_chooses_another_number_have_the_references_bits(library, case, dtype, general):
    generator = torch.Generator().manual_seed(12)
    sizes = [1024, 5000]
    pair = Pair(case, sizes, dtype)
    for _ in range(12):
        pair.step(library, [grad.to(dtype) for grad in choosing_grads(sizes, generator)], general=general)
    pair.assert_same()


@pytest.mark.parametrize("case", [c for c in CASES if "lr_decay" in c.options or "decay" in c.options], ids=str)
def test_steps_are_counted_beyond_what_fp32_holds(library, case):
    generator = torch.Generator().manual_seed(8)
    pair = Pair(case, [5, 1200])
    counters = [state["step"] for optimizer in (pair.kernel, pair.reference) for state in optimizer.state.values()]
    for counter in counters:
        counter.fill_(2**24)
    for _ in range(3):
        pair.step(library, random_grads([5, 1200], generator))
    pair.assert_same()
    assert [count_of(counter) for counter in counters] == [2**24 + 3] * 4


@parametrize_cases(WITH_STATES, [c for c in CASES if c.options.get("amsgrad") or "dampening" in c.options])
@pytest.mark.parametrize("param", FLOATS, ids=str)
def test_every_mixture_of_dtypes_has_the_references_bits(library, case, param):
    for grad, state in itertools.product(FLOATS, repeat=2):
        check_mixture(library, case, param, grad, state)


def check_mixture(library, case, param, grad, state):
    generator = torch.Generator().manual_seed(3)
    sizes = [1, 15, 16, 33, 1500]
    pair = Pair(case, sizes, param, state)
    for _ in range(2):
        pair.step(library, random_grads(sizes, generator, grad))
    pair.assert_same()


@by_case
@pytest.mark.parametrize("tensor_hyper", [False, True] if ALL else [True])
def test_scaled_gradients_missing_ones_and_skips_have_the_references_bits(library, case, tensor_hyper):
    generator = torch.Generator().manual_seed(4)
    sizes = [5, 0, 1200, 40, 3000]
    pair = Pair(case, sizes)
    for number in range(6):
        grads = random_grads(sizes, generator)
        grads = [None if number < i else g for i, g in enumerate(grads)]  # each joins one step later
        skip = torch.tensor(1.0 if number in (0, 3) else 0.0)
        pair.step(library, grads, grad_scale=torch.tensor(3.0), found_inf=skip, tensor_hyper=tensor_hyper)
    pair.assert_same()


@by_kind_in_engines
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 0)], ids=str)
@pytest.mark.parametrize("kept", ["as they are", "zero", "write"])
def test_clipped_gradients_and_what_is_left_of_them_have_the_references_bits(library, case, dtype, offset, kept):
    """The reference's step is the one after torch's clipping; both know the same coefficient."""
    generator = torch.Generator().manual_seed(7)
    sizes = [5, 0, 1200, 40, 3001]
    pair = Pair(case, sizes, offset=offset)
    options = {"zero": kept == "zero", "write": kept == "write"}
    scale = torch.tensor(3.0)
    for number in range(3):
        grads = random_grads(sizes, generator, dtype)
        skipped = number == 1
        flag = torch.tensor(float(skipped))
        coefficient = torch.tensor(0.3, dtype=torch.float64)
        clipped = [(g.float() / scale) * torch.tensor(0.3) for g in grads]
        for p, g in zip(pair.reference.param_groups[0]["params"], clipped, strict=True):
            p.grad = g
        if not skipped:
            pair.reference.step()
        mine = [inside(g, offset) for g in grads]
        run_on_host(
            *(library, pair.kernel, [view for _, view in mine]),
            **{"grad_scale": scale, "found_inf": flag, "coefficient": coefficient, **options},
        )
        for (buffer, view), grad, changed in zip(mine, grads, clipped, strict=True):
            left = grad if skipped else changed.to(dtype)
            expected = {"as they are": grad, "zero": torch.zeros_like(grad), "write": left}[kept]
            assert same_bits(view, expected)
            assert (buffer == 7.0).sum() >= 64
    pair.assert_same()


@by_kind_in_engines
@pytest.mark.parametrize(
    ("dtype", "copy_dtype", "offset"),
    [
        (torch.float32, torch.bfloat16, 0),
        (torch.float32, torch.float16, 1),
        (torch.bfloat16, torch.float16, 0),
        (torch.float64, torch.bfloat16, 0),
    ],
    ids=str,
)
def test_averages_and_copies_have_the_references_bits(library, case, dtype, copy_dtype, offset):
    generator = torch.Generator().manual_seed(9)
    sizes = [5, 0, 1200, 40, 9001]
    pair = Pair(case, sizes, dtype, offset=offset)
    wide = torch.promote_types(dtype, torch.float32)
    followers = []
    for param in pair.kernel.param_groups[0]["params"]:
        followers.append(
            (inside(param.detach().to(wide), offset), inside(torch.zeros(param.numel()).to(copy_dtype), 1))
        )
    expected = [average.clone() for (_, average), _ in followers]
    for number in range(4):
        grads = random_grads(sizes, generator, dtype)
        grads[3] = None if number == 2 else grads[3]
        pair.step(
            *(library, grads, offset),
            found_inf=torch.tensor(float(number == 1)),
            average_weight=0.3,
            followers=[(average, copy) for (_, average), (_, copy) in followers],
        )
        for i, param in enumerate(pair.reference.param_groups[0]["params"]):
            if number != 1 and grads[i] is not None:
                expected[i] = expected[i] + 0.3 * (param.detach().to(wide) - expected[i])
                assert same_bits(followers[i][1][1], param.detach().to(copy_dtype))
            assert same_bits(followers[i][0][1], expected[i])
            for buffer, values in followers[i]:
                assert (buffer == 7.0).sum() >= buffer.numel() - values.numel()
    pair.assert_same()


def host_norm(library, plans, limits, grad_scale=None, found_inf=None):
    """(sum of squares, largest, norm, coefficient, whether the step is skipped) of the gradients of several plans."""
    norm, flag = torch.full((4,), float("nan"), dtype=torch.float64), torch.full((), 5.0)
    values = (ctypes.c_double * 6)(*limits)
    for number, grads in enumerate(plans):
        records = np.zeros(len(grads), memory_layout())
        records["numel"] = [0 if grad is None else grad.numel() for grad in grads]
        records["grad_dtype"] = [0 if grad is None else TAG[grad.dtype] for grad in grads]
        addresses = [None if g is None else (g.data_ptr() or 64) for g in grads]
        launches = library.host_norm(
            at(records),
            ctypes.c_int64(len(records)),
            (ctypes.c_void_p * len(addresses))(*addresses),
            *[None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (grad_scale, found_inf)],
            values,
            ctypes.c_void_p(flag.data_ptr()),
            ctypes.c_void_p(norm.data_ptr()),
            ctypes.c_bool(number == 0),
            ctypes.c_bool(number == len(plans) - 1),
        )
        assert launches == max(1, -(-len(records) // 4000))
    return (*norm.tolist(), flag.item())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_norm_of_several_plans_is_that_of_all_their_gradients(library, dtype, offset):
    generator = torch.Generator().manual_seed(8)
    plans = [random_grads(SIZES, generator, dtype), random_grads([40_000, 3], generator), [torch.ones(0), None]]
    plans[0][4] = None
    plans[2][1] = torch.full((1,), -9.0, dtype=torch.bfloat16)
    plans = [[None if g is None else inside(g, offset)[1] for g in plan] for plan in plans]
    flat = torch.cat([g.double().reshape(-1) for plan in plans for g in plan if g is not None])
    scale = torch.tensor(4.0)
    for by_largest in (False, True):
        limits = (0.5, 1e-6, by_largest, False, True, False)
        seen = host_norm(library, plans, limits, grad_scale=scale)
        norm = (flat.abs().max() if by_largest else flat.norm()).item() / 4
        assert seen[0] == pytest.approx((flat / 4).square().sum().item(), rel=1e-6)
        assert seen[1] == flat.abs().max().item()
        assert seen[2] == pytest.approx(norm, rel=1e-6)
        assert seen[3] == pytest.approx(0.5 / (norm + 1e-6), rel=1e-6)
        assert seen[4] == 0.0
        # The same bits from any order and address.
        library.set_reverse(True)
        assert host_norm(library, plans, limits, grad_scale=scale) == seen
        library.set_reverse(False)
        moved = [[None if g is None else inside(g, offset + 1)[1] for g in plan] for plan in plans]
        assert host_norm(library, moved, limits, grad_scale=scale) == seen


@pytest.mark.parametrize("n", [1, 4001, 8500])
def test_the_norm_of_many_tensors_takes_few_launches(library, n):
    grads = [torch.full((3,), 2.0)] * n
    seen = host_norm(library, [grads], (math.inf, 1e-6, False, False, False, False))
    assert seen[:4] == (12.0 * n, 2.0, math.sqrt(12.0 * n), 1.0)


@each(dtype=FLOATS, place=[0, 1, 2000], bad=[math.inf, -math.inf, math.nan])
def test_any_gradient_that_is_not_finite_skips_the_step(library, dtype, bad, place):
    grads = [torch.ones(7, dtype=dtype), torch.ones(2001, dtype=dtype)]
    grads[place > 0][place] = bad
    plain = host_norm(library, [grads], (1.0, 1e-6, False, False, False, False))
    assert plain[4] == 0.0
    assert not math.isfinite(plain[1])
    assert math.isnan(plain[3]) if math.isnan(bad) else plain[3] == 0.0
    assert math.isnan(host_norm(library, [grads], (1.0, 0.0, False, True, False, False))[3])
    assert host_norm(library, [grads], (1.0, 1e-6, False, False, True, False))[4] == 1.0
    assert host_norm(library, [grads], (1.0, 1e-6, False, False, False, True))[4] == 1.0


def test_a_norm_that_overflows_and_a_step_that_is_skipped_anyway(library):
    grads = [torch.full((9,), 3e38)]
    assert host_norm(library, [grads], (1.0, 1e-6, False, False, True, False))[2:] == (math.inf, 0.0, 0.0)
    assert host_norm(library, [grads], (1.0, 1e-6, False, False, True, True))[4] == 1.0
    grads = [torch.ones(4)]
    for flag in (0.0, 1.0, 2.0):
        limits = (1.0, 1e-6, False, False, True, True)
        seen = host_norm(library, [grads], limits, found_inf=torch.tensor(flag))
        assert seen[4] == float(flag != 0)


@pytest.mark.parametrize("n", [65, 513, 4001, 9000])
def test_many_tensors_take_few_launches(library, n):
    case = next(c for c in CASES if "momentum" in c.options)
    generator = torch.Generator().manual_seed(5)
    pair = Pair(case, [3] * n)
    assert pair.step(library, random_grads([3] * n, generator)) == -(-n // 4000)
    pair.assert_same()


@each(in_reverse=[False, True], threads=[32, 96, 128])
@pytest.mark.parametrize("general", [False, True])
def test_any_order_and_number_of_threads_has_the_references_bits(library, general, threads, in_reverse):
    library.set_reverse(in_reverse)
    case = next(c for c in CASES if c.options.get("amsgrad"))
    generator = torch.Generator().manual_seed(6)
    sizes = [300, 9000, 1, 20_000]
    pair = Pair(case, sizes)
    for _ in range(2):
        pair.step(library, random_grads(sizes, generator), general=general, threads=threads)
    library.set_reverse(False)
    pair.assert_same()


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize(
    "sizes",
    [[0], [5_000_000_000], [2**31 - 1, 2**31, 2**31 + 17, 3, 0, 1023, 1024], [1] * 10_001],
    ids=["empty", "one", "several", "many"],
)
def test_every_element_is_dealt_out_once_beyond_32_bits(library, sizes, multiprocessors):
    numels = (ctypes.c_int64 * len(sizes))(*sizes)
    chunks = library.check_chunks(numels, ctypes.c_int64(len(sizes)), multiprocessors)
    assert chunks >= sum(-(-n // 65_536) for n in sizes)


@pytest.mark.parametrize(("n", "blocks", "threads"), [(1, 1, 32), (7, 1, 32), (70, 2, 32), (9, 3, 2)])
def test_schedules_have_the_bits_of_the_python_functions(library, n, blocks, threads):
    kinds = [
        schedules.CosineScheduler(30, 0.05, 0.001, warmup_steps=6),
        schedules.SquareRootScheduler(0.7),
        schedules.FactorScheduler(0.93, 1e-3, 0.4),
        schedules.MultiFactorScheduler([2, 5, 11], 0.3, 0.2),
        schedules.WarmUp(schedules.PolyScheduler(30, 0.1, 2.5), 5, 0.5),
        schedules.get_schedule("cosine_with_restarts", 0.1, 3, 30, {"num_cycles": 4}),
    ]
    made = [kinds[i % len(kinds)] for i in range(n)]
    part = on_device.DeviceSchedules(made, 0, torch.device("cpu"), BACKENDS["reference"])
    flags = [torch.tensor(0.0), None, torch.tensor(1.0)]
    count = 0
    for number in range(60):
        flag = flags[number % 3]
        library.host_advance_schedules(
            ctypes.c_void_p(part.values.data_ptr()),
            ctypes.c_void_p(part.table.data_ptr()),
            n,
            None if flag is None else ctypes.c_void_p(flag.data_ptr()),
            blocks,
            threads,
        )
        count += number % 3 != 2
        assert part.values.tolist() == [[count] * n, [schedule(count) for schedule in made]]


@each(offset=[0, 3], zero=[False, True])
@pytest.mark.parametrize(
    ("dtype", "grad"),
    [*((torch.float32, g) for g in FLOATS), (torch.float64, torch.float64), (torch.float64, torch.bfloat16)],
    ids=str,
)
def test_accumulating_has_the_references_bits_and_zeroes_what_it_read(library, dtype, grad, zero, offset):
    generator = torch.Generator().manual_seed(2)
    sizes = [0, 1, 7, 9, 33, 1000, 5001]
    sums = [inside(torch.full((n,), float("nan"), dtype=dtype), offset) for n in sizes]
    steps = [torch.zeros(()) for _ in sizes]
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    expected = [None] * len(sizes)
    for number, weight in enumerate((0.7, 1.3, 2.0)):
        grads = [inside(g, offset) for g in random_grads(sizes, generator, grad)]
        values = [g.clone() for _, g in grads]
        records = np.zeros(len(grads), memory_layout())
        records["param_dtype"], records["grad_dtype"] = TAG[dtype], TAG[grad]
        for record, (_, total), step in zip(records, sums, steps, strict=True):
            record["param"], record["step"], record["numel"] = total.data_ptr(), step.data_ptr(), total.numel()
        hyper = (Scalar * MAX_HYPER)()
        hyper[0].value = weight
        skipped = 5 if number == 1 else None
        addresses = [None if i == skipped else (g.data_ptr() or 64) for i, (_, g) in enumerate(grads)]
        launches = library.host_step(
            _C.rule_id("accumulate", []),
            hyper,
            ctypes.c_bool(False),
            ctypes.c_bool(zero),
            ctypes.c_bool(False),
            *(None, None, None, ctypes.c_double(0.0)),
            at(records),
            ctypes.c_int64(len(records)),
            (ctypes.c_void_p * len(addresses))(*addresses),
            *(2, ctypes.c_bool(False), 64),
        )
        assert launches == 1
        for i, value in enumerate(values):
            if i != skipped:
                value = weight * value.to(arithmetic)
                expected[i] = value if expected[i] is None else expected[i] + value
                assert torch.equal(grads[i][1], torch.zeros_like(values[i]) if zero else values[i])
                assert (grads[i][0] == 7.0).sum() >= 64
    for i, (buffer, total) in enumerate(sums):
        assert same_bits(total, expected[i].to(dtype))
        assert (buffer == 7.0).sum() >= 64
    for i, step in enumerate(steps):
        assert step.item() == (2.0 if i == 5 else 3.0)
