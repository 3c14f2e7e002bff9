"""What the CUDA source owes beside the contract of `test_engines.py`, run thread by thread on the host.

This proves the kernels' own logic: chunks, launches, orders of threads, norms. It proves nothing of a GPU.
"""

import ctypes
import math

import numpy as np
import pytest
import torch
from contract import Engine, Fences, beside_the_reference, normal
from host_plan import FLOATS, MAX_HYPER, TAG, ElementwiseHostPlan, Scalar, at, run_on_the_host, step_library
from support import ADAMW, MOMENTUM, each, precision_modes

from fusedstep import _C, schedules
from fusedstep.backends import BACKENDS
from fusedstep.cases import CASES
from fusedstep.counts import count_of
from fusedstep.record import memory_layout
from fusedstep.schedules import on_device
from fusedstep.verification import same_bits

HOST = Engine("cuda on the host", "cpu")
MODES = {"plain": {}, **precision_modes("own", "8bit", "4bit")}
SIZES = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 5000]


@pytest.fixture
def library():
    return step_library()


@pytest.fixture
def on_host(monkeypatch):
    """Makes backend="cpu" run the kernels on the host."""
    run_on_the_host(monkeypatch)
    return monkeypatch


@pytest.mark.parametrize("case", [c for c in CASES if "lr_decay" in c.options or "decay" in c.options], ids=str)
def test_steps_are_counted_beyond_what_fp32_holds(on_host, case):
    generator = torch.Generator().manual_seed(8)

    def before(optimizer, number):
        if number == 1:
            for state in optimizer.state.values():
                state["step"].fill_(2**24)

    values, *grads = (normal([5, 1200], generator) for _ in range(5))
    optimizer = beside_the_reference("counts", case, HOST, values, grads, before=before)
    assert {count_of(state["step"]) for state in optimizer.state.values()} == {2**24 + 3}


@pytest.mark.parametrize("n", [513, 8001])
def test_many_tensors_take_few_launches(on_host, n):
    generator = torch.Generator().manual_seed(5)
    values, grads = (normal([3] * n, generator) for _ in range(2))
    assert beside_the_reference("many", MOMENTUM, HOST, values, [grads]).kernel_calls == -(-n // 4000)


@each(
    mode=["plain", "split-8bit", "stochastic-8bit", "kahan-own"],
    in_reverse=[False, True],
    threads=[32, 96, 128],
    case=[CASES[10], ADAMW],
    general=[False, True],
)
def test_any_order_and_number_of_threads_has_the_references_bits(
    on_host, library, case, mode, general, threads, in_reverse
):
    on_host.setattr(ElementwiseHostPlan, "threads", threads)
    on_host.setattr(ElementwiseHostPlan, "general", general)
    generator = torch.Generator().manual_seed(6)
    sizes = [300, 9000, 1, 20_000]
    dtype = torch.float32 if mode == "plain" else torch.bfloat16
    values, *grads = (normal(sizes, generator, (dtype,)) for _ in range(3))
    library.set_reverse(in_reverse)
    try:
        beside_the_reference(f"threads {in_reverse}", case, HOST, values, grads, **MODES[mode])
    finally:
        library.set_reverse(False)


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


@each(dtype=FLOATS, offset=[0, 1])
def test_the_norm_of_several_plans_is_that_of_all_their_gradients(library, dtype, offset):
    generator, fences = torch.Generator().manual_seed(8), Fences()
    plans = [normal(SIZES, generator, (dtype,)), normal([40_000, 3], generator), [torch.ones(0), None]]
    plans[0][4] = None
    plans[2][1] = torch.full((1,), -9.0, dtype=torch.bfloat16)
    plans = [[None if g is None else fences.around(g, offset) for g in plan] for plan in plans]
    flat = torch.cat([g.double().reshape(-1) for plan in plans for g in plan if g is not None])
    scale = torch.tensor(4.0)
    for by_max_abs in (False, True):
        limits = (0.5, 1e-6, by_max_abs, False, True, False)
        seen = host_norm(library, plans, limits, grad_scale=scale)
        norm = (flat.abs().max() if by_max_abs else flat.norm()).item() / 4
        assert seen[0] == pytest.approx((flat / 4).square().sum().item(), rel=1e-6)
        assert seen[1] == flat.abs().max().item()
        assert seen[2] == pytest.approx(norm, rel=1e-6)
        assert seen[3] == pytest.approx(0.5 / (norm + 1e-6), rel=1e-6)
        assert seen[4] == 0.0
        # The same bits from any order and address.
        library.set_reverse(True)
        assert host_norm(library, plans, limits, grad_scale=scale) == seen
        library.set_reverse(False)
        moved = [[None if g is None else fences.around(g, offset + 1) for g in plan] for plan in plans]
        assert host_norm(library, moved, limits, grad_scale=scale) == seen


@pytest.mark.parametrize("n", [1, 8500])
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


@each(
    sizes={
        "empty": [0],
        "one": [5_000_000_000],
        "several": [2**31 - 1, 2**31, 2**31 + 17, 3, 0, 1023, 1024],
        "many": [1] * 10_001,
    },
    multiprocessors=[1, 132],
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


@each(
    dtypes=[*((torch.float32, g) for g in FLOATS), (torch.float64, torch.float64), (torch.float64, torch.bfloat16)],
    offset=[0, 3],
    zero=[False, True],
)
def test_accumulating_has_the_references_bits_and_zeroes_what_it_read(library, dtypes, zero, offset):
    dtype, grad = dtypes
    generator = torch.Generator().manual_seed(2)
    sizes = [0, 1, 7, 9, 33, 1000, 5001]
    fences = Fences()
    sums = [fences.around(torch.full((n,), float("nan"), dtype=dtype), offset) for n in sizes]
    steps = [torch.zeros(()) for _ in sizes]
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    expected = [None] * len(sizes)
    for number, weight in enumerate((0.7, 1.3, 2.0)):
        grads = [fences.around(g, offset) for g in normal(sizes, generator, (grad,))]
        values = [g.clone() for g in grads]
        records = np.zeros(len(grads), memory_layout())
        records["param_dtype"], records["grad_dtype"] = TAG[dtype], TAG[grad]
        for record, total, step in zip(records, sums, steps, strict=True):
            record["param"], record["step"], record["numel"] = total.data_ptr(), step.data_ptr(), total.numel()
        hyper = (Scalar * MAX_HYPER)()
        hyper[0].value = weight
        skipped = 5 if number == 1 else None
        addresses = [None if i == skipped else (g.data_ptr() or 64) for i, g in enumerate(grads)]
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
                assert torch.equal(grads[i], torch.zeros_like(values[i]) if zero else values[i])
    fences.check()
    for i, total in enumerate(sums):
        assert same_bits(total, expected[i].to(dtype))
    for i, step in enumerate(steps):
        assert step.item() == (2.0 if i == 5 else 3.0)
