"""Rules that reduce on the CPU engine: precision, one order of sums, layouts, dtypes, and plans that check."""

import multiprocessing

import pytest
import torch
from kinds import ALL, OF_EACH_REDUCING, each

import fusedstep
from fusedstep import _C
from fusedstep.cases import REDUCING, chain_cases, gradient, layouts
from fusedstep.record import Record
from fusedstep.verification import REDUCING_ULP_PER_STEP, same_bits, ulp_distance, verify

by_case = pytest.mark.parametrize("case", REDUCING, ids=str)
OF_EACH_RULE = REDUCING if ALL else OF_EACH_REDUCING
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around the widest pack, the length of a run, the rows of a block, the columns of a block; and much in one dimension.
SHAPES = (
    *[(n,) for n in (1, 15, 16, 17, 33, 1023, 1025, 70_001)],
    *((1, 1), (3, 341), (31, 33), (32, 33), (127, 16), (128, 17), (129, 15), (257, 100), (5, 513), (130, 1200)),
    *((70_001, 1), (1, 70_001), (9_000, 3), (3, 9_000), (300, 3, 3), (170, 6, 1), (9, 40, 41), (700, 2, 1, 1)),
    *((1_037, 2), (1_203, 4), (515, 8), (3, 195, 8), (333, 12), (200, 16)),
)


def build(case, params, backend="cpu"):
    return getattr(fusedstep, case.optimizer)(params, backend=backend, **case.options)


def run(case, dtype, shapes=SHAPES, backend="cpu", steps=2, wide=False, watch=None):
    """The case's optimizer after some steps from the same numbers; ``watch`` sees the parameters before each."""
    generator = torch.Generator().manual_seed(3)

    def normal(shape):
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.double() if wide else values

    params = [torch.nn.Parameter(normal(shape)) for shape in shapes]
    optimizer = build(case, params, backend)
    for _ in range(steps):
        if watch:
            watch([param.detach() for param in params])
        for param in params:
            param.grad = normal(param.shape)
        optimizer.step()
    return optimizer


def tensors_of(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        yield param.detach()
        yield from optimizer.state[param].values()


def assert_same_bits(a, b):
    for i, (x, y) in enumerate(zip(tensors_of(a), tensors_of(b), strict=True)):
        assert same_bits(x, y), f"tensor {i}: {(x != y).sum().item()} of {x.numel()} differ"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each(case=REDUCING, dtype=FLOATS)
def test_bits_depend_neither_on_threads_nor_on_the_instruction_set(case, dtype, threads):
    before = _C.cpu_isa()
    threads(1)
    expected = run(case, dtype)
    try:
        for isa, n in (*((isa, 1) for isa in _C.cpu_isas()), (before, 2), (before, 3)):
            _C.set_cpu_isa(isa)
            threads(n)
            assert_same_bits(run(case, dtype), expected)
    finally:
        _C.set_cpu_isa(before)


@by_case
def test_float32_stays_within_the_stated_distance_of_float64(case):
    steps, scales = 4, [torch.zeros(shape) for shape in SHAPES]

    def watch(params):  # nothing is known better than the largest number on the way to it
        scales[:] = [torch.maximum(scale, param.abs()) for scale, param in zip(scales, params, strict=True)]

    tested, exact = run(case, torch.float32, steps=steps, watch=watch), run(case, torch.float32, steps=steps, wide=True)
    for param, true, scale in zip(*(o.param_groups[0]["params"] for o in (tested, exact)), scales, strict=True):
        distance = ulp_distance(param.detach(), true.detach(), torch.maximum(scale, param.detach().abs()))
        assert distance <= REDUCING_ULP_PER_STEP * steps, tuple(param.shape)


@each(case=OF_EACH_RULE, dtype=[torch.bfloat16, torch.float16])
def test_a_low_precision_step_is_the_float32_step_rounded(case, dtype):
    generator = torch.Generator().manual_seed(4)
    for shape in SHAPES:
        low = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        low.grad = torch.randn(shape, generator=generator).to(dtype)
        wide = torch.nn.Parameter(low.detach().float())
        wide.grad = low.grad.float()
        for param in (low, wide):
            build(case, [param]).step()
        assert same_bits(low.detach(), wide.detach().to(dtype))


@each(case=OF_EACH_RULE, param_dtype=FLOATS, grad_dtype=FLOATS)
def test_gradients_of_any_dtype_count_with_their_values(case, param_dtype, grad_dtype):
    generator = torch.Generator().manual_seed(4)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(param_dtype)) for s in ((7,), (5, 3), (40, 33))]
    same = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for a, b in zip(params, same, strict=True):
        grad = torch.randn(a.shape, generator=generator).bfloat16().half()  # exact in all of them, but for the range
        grad = torch.where(grad.bfloat16() == grad, grad, 0.5)
        a.grad, b.grad = None, grad.to(param_dtype)
        a.grad_dtype = None
        a.grad = grad.to(grad_dtype)
    for some in (params, same):
        build(case, some).step()
    for a, b in zip(params, same, strict=True):
        assert same_bits(a.detach(), b.detach())


@each(case=OF_EACH_RULE, other_layout=[False, True])
def test_every_layout_gives_the_numbers_of_contiguous_memory(case, other_layout):
    starts = layouts(torch.float32, "cpu", torch.Generator().manual_seed(0))
    params = {name: torch.nn.Parameter(value) for name, value in starts.items()}
    plain = {name: torch.nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
             for name, value in starts.items()}  # fmt: skip
    places = {name: (param.data_ptr(), param.stride()) for name, param in params.items()}
    optimizers = build(case, list(params.values())), build(case, list(plain.values()))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, param in params.items():
            param.grad = gradient(param, torch.float32, generator, other_layout)
            plain[name].grad = param.grad.clone(memory_format=torch.contiguous_format)
        before = {name: param._version for name, param in params.items()}
        for optimizer in optimizers:
            optimizer.step()
        assert all(param._version > before[name] for name, param in params.items())
    for name, param in params.items():
        assert places[name] == (param.data_ptr(), param.stride())
        assert same_bits(param.detach(), plain[name].detach()), name
        for key, value in optimizers[0].state[param].items():
            assert same_bits(value, optimizers[1].state[plain[name]][key]), (name, key)


# Several threads' worth together, and each too small for torch to use threads of its own, which hang in a forked child.
SMALL = ((120, 150),) * 8 + ((20_001,), (900, 3, 3))


def in_child(case, queue):
    queue.put([tensor.tolist() for tensor in tensors_of(run(case, torch.float32, SMALL))])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_steps_with_threads_too(threads):
    threads(2)
    expected = [tensor.tolist() for tensor in tensors_of(run(REDUCING[1], torch.float32, SMALL))]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(REDUCING[1], queue), daemon=True)
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(timeout=60)
    assert child.exitcode == 0


def plan(param, matrices, row, column):
    states = (row, column, None) if matrices else (None, None, row)
    step = torch.zeros(())
    record = Record(0, None, param, param, states, step, matrices=matrices)
    return _C.Plan("torch_adafactor", ["row_var", "col_var", "variance"], [record])


@pytest.mark.parametrize(
    ("shape", "matrices", "row", "column", "text"),
    [
        ((4, 3), (1, 4, 4), 4, 4, "is not made of these matrices"),
        ((4, 3), (1, 4, 3), 3, 3, "is laid out differently"),
        ((4, 3), (1, 4, 3), 4, 4, "is laid out differently"),
        ((4, 3), None, 4, None, "is laid out differently"),
        ((4, 3), (1, 4, 3), 4, None, "are not those that the rule needs"),
    ],
)
def test_a_plan_refuses_states_that_do_not_fit(shape, matrices, row, column, text):
    row, column = (None if n is None else torch.zeros(n) for n in (row, column))
    with pytest.raises(ValueError, match=text):
        plan(torch.zeros(shape), matrices, row, column)


def test_a_plan_refuses_memory_in_another_order():
    with pytest.raises(ValueError, match="is not contiguous"):
        plan(torch.zeros(3, 4).t(), (1, 4, 3), torch.zeros(4), torch.zeros(3))
    with pytest.raises(ValueError, match="is laid out differently"):
        plan(torch.zeros(4, 3), (1, 4, 3), torch.zeros(8)[::2], torch.zeros(3))
    record = Record(0, None, torch.zeros(2), torch.zeros(2), step=torch.zeros(()), matrices=(1, 1, 2))
    with pytest.raises(ValueError, match="its matrices are for rules that reduce"):
        _C.Plan("sgd", [], [record])


def test_verify_covers_rules_that_reduce():
    report = verify(["TorchAdafactor"], backend="cpu", dtypes=["fp32", "bf16"], steps=3)
    assert report.ok
    rows = [(str(case), dtype) for case in REDUCING for dtype in ("fp32", "bf16")]
    rows += [(str(case), dtype) for case, dtype in chain_cases() if dtype == "fp32"]
    assert [(row.case, row.dtype) for row in report.rows] == [row for row in rows if row[0].startswith("TorchAda")]


def test_verify_sees_an_engine_that_differs(monkeypatch):
    prepare = fusedstep.TorchAdafactor.prepare
    monkeypatch.setattr(
        fusedstep.TorchAdafactor,
        "prepare",
        lambda hyper, step: prepare(hyper, step)._replace(decay=1.0 - 1e-5),  # of the reference alone
    )
    assert not verify(["TorchAdafactor"], backend="cpu", dtypes=["fp32"], steps=1).ok
