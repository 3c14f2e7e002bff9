"""The bit contract: the compiled CPU engine gives the reference's bits, whatever the layout, dtype, size or threads."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kinds import CHOOSING, choosing_grads
from support import WITH_STATES, by_case, by_kind_in_engines, examples, parametrize_cases

import fusedstep
from fusedstep import _C
from fusedstep.cases import CASES, PRECISION, gradient, layouts
from fusedstep.kept.states import MIN_QUANTIZED
from fusedstep.verification import same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Every length below twice the widest pack, around powers of two, and enough for several threads.
SIZES = [*range(34), 255, 256, 257, 1023, 1024, 1025, 70_001]


def tensors_of(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield param.detach()
            yield from optimizer.state.get(param, {}).values()


def assert_same(a, b):
    for i, (x, y) in enumerate(zip(tensors_of(a), tensors_of(b), strict=True)):
        assert same_bits(x, y), f"tensor {i}: {(x != y).sum().item()} of {x.numel()} differ"


def pair(case, values, dtype):
    """The case's optimizer on both backends, on equal parameters."""
    return tuple(
        getattr(fusedstep, case.optimizer)(
            [torch.nn.Parameter(v.to(dtype).clone()) for v in values], backend=backend, **case.options
        )
        for backend in ("cpu", "reference")
    )


def step(optimizers, grads):
    for optimizer in optimizers:
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()


@by_case
def test_every_size_dtype_and_layout_has_the_references_bits_by_any_instruction_set(case):
    """All in one group, at different steps, with gradients of other layouts: the reference once, and each engine."""

    def values():
        generator = torch.Generator().manual_seed(5)
        sizes = [torch.randn(n, generator=generator).to(dtype) for dtype in FLOATS for n in SIZES]
        return sizes + [v for dtype in FLOATS for v in layouts(dtype, "cpu", generator).values()]

    optimizers = {}
    for name in ("reference", *_C.cpu_isas()):
        params = [torch.nn.Parameter(value.detach()) for value in values()]
        backend = "reference" if name == "reference" else "cpu"
        optimizers[name] = getattr(fusedstep, case.optimizer)(params, backend=backend, **case.options)
    generator = torch.Generator().manual_seed(6)
    before = _C.cpu_isa()
    try:
        for number in range(3):
            params = optimizers["reference"].param_groups[0]["params"]
            grads = [gradient(p, p.dtype, generator, (i + number) % 3 == 0) for i, p in enumerate(params)]
            grads = [None if (i + number) % 7 == 0 else grad for i, grad in enumerate(grads)]
            for name, optimizer in optimizers.items():
                if name != "reference":
                    _C.set_cpu_isa(name)
                for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                    param.grad = None if grad is None else grad.clone(memory_format=torch.preserve_format)
                optimizer.step()
    finally:
        _C.set_cpu_isa(before)
    for name, optimizer in optimizers.items():
        assert_same(optimizer, optimizers["reference"])
        assert optimizer.kernel_calls == (name != "reference")


@pytest.mark.parametrize("case", CHOOSING, ids=str)
def test_elements_for_which_a_rule_chooses_another_number_have_the_references_bits(case):
    generator = torch.Generator().manual_seed(12)
    optimizers = pair(case, [torch.randn(5000, generator=generator)], torch.float32)
    for _ in range(12):
        step(optimizers, choosing_grads([5000], generator))
    assert_same(*optimizers)


@by_kind_in_engines
def test_many_steps_have_the_references_bits(case):
    generator = torch.Generator().manual_seed(6)
    optimizers = pair(case, [torch.randn(97, generator=generator)], torch.float32)
    for _ in range(150):
        step(optimizers, [torch.randn(97, generator=generator)])
    assert_same(*optimizers)


@parametrize_cases(WITH_STATES, [c for c in CASES if c.optimizer == "AdamW" or "momentum" in c.options])
@pytest.mark.parametrize("param", FLOATS, ids=str)
def test_every_mixture_of_dtypes_has_the_references_bits(case, param):
    for grad, state in itertools.product(FLOATS, repeat=2):
        check_mixture(case, param, grad, state)


def check_mixture(case, param, grad, state):
    generator = torch.Generator().manual_seed(9)
    sizes = [1, 15, 16, 33, 700]
    optimizers = pair(case, [torch.randn(n, generator=generator) for n in sizes], param)
    for number in range(3):
        grads = [torch.randn(n, generator=generator).to(grad) for n in sizes]
        for optimizer in optimizers:
            for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                p.grad_dtype = None
                p.grad = g.clone()
            optimizer.step()
            if number == 0:
                for p in optimizer.param_groups[0]["params"]:
                    for name in optimizer.states_of(optimizer.param_groups[0]):
                        optimizer.state[p][name] = optimizer.state[p][name].to(state)
    assert_same(*optimizers)
    for p in optimizers[0].param_groups[0]["params"]:
        assert p.dtype == param
        assert all(
            optimizers[0].state[p][n].dtype == state for n in optimizers[0].states_of(optimizers[0].param_groups[0])
        )


@by_kind_in_engines
def test_threads_do_not_change_the_bits(case):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(12)
            sizes = [200_003, 17, 65_536 * 3 + 5, 1]
            values = [torch.randn(n, generator=generator) for n in sizes]
            optimizer, _ = pair(case, values, torch.float32)
            for _ in range(2):
                step([optimizer], [torch.randn(n, generator=generator) for n in sizes])
            results.append(optimizer)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(results[0], other)


@by_case
def test_extreme_numbers_have_the_references_bits(case):
    """Zeros of both signs, subnormals, infinities, NaN, largest and smallest: in gradients and parameters."""
    info = torch.finfo(torch.float32)
    edges = [0.0, -0.0, info.tiny, -info.tiny / 8, info.max, -info.max, float("inf"), float("nan"), 1e-20, 1e20, 1.0]
    left, right = torch.tensor(list(itertools.product(edges, edges))).unbind(1)
    optimizers = pair(case, [left], torch.float32)
    for grad in (right, right.flip(0), left):
        step(optimizers, [grad])
    assert_same(*optimizers)


def dtypes_of(options):
    """Of the weights that can be stored so."""
    yield torch.bfloat16
    if options.get("master_weights") != "split":
        yield torch.float16
    if options.keys() == {"state_dtype"}:
        yield torch.float32


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, options in PRECISION.items() for dtype in dtypes_of(options)], ids=str
)
def test_extreme_numbers_have_the_references_bits_in_every_format(name, dtype):
    """In whole vectors and blocks as in the rest of them; and weights that somebody has set to zero or NaN."""
    options = PRECISION[name]
    info = torch.finfo(torch.float32)
    edges = [0.0, -0.0, info.tiny, -info.tiny / 8, info.max, -info.max, float("inf"), float("nan"), 1e-20, 1e20, 1.0]
    pairs = torch.tensor(list(itertools.product(edges, edges)))
    pairs[pairs.isnan()] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounding carries over
    values, grads = pairs.unbind(1)
    generator = torch.Generator().manual_seed(13)
    ordinary = torch.randn(1000, generator=generator)
    values = torch.cat((ordinary, values, ordinary, values)).repeat(2)
    grads = torch.cat((ordinary.roll(9), grads, ordinary.roll(3), grads)).repeat(2)
    grads[300] = float("inf")  # alone in its block
    assert values.numel() >= MIN_QUANTIZED  # states of smaller ones are not in 8 bits
    assert values.numel() % 256
    before = _C.cpu_isa()
    try:
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            optimizers = [
                fusedstep.AdamW([torch.nn.Parameter(values.to(dtype))], lr=1e-3, backend=backend, **options)
                for backend in ("cpu", "reference")
            ]
            for number in range(3):
                step(optimizers, [grads.roll(100 * number).to(dtype)])
                assert_same(*optimizers)
                for optimizer in optimizers:
                    with torch.no_grad():
                        optimizer.param_groups[0]["params"][0][number:900:7] = (0.0, -0.0, float("nan"))[number]
            step(optimizers, [ordinary.repeat(5)[: values.numel()].to(dtype)])
            assert_same(*optimizers)
            assert optimizers[0].kernel_calls
    finally:
        _C.set_cpu_isa(before)


@hypothesis.given(
    numbers=st.lists(st.tuples(*[st.floats(width=32)] * 2), min_size=1, max_size=40),
    case=st.sampled_from(CASES),
    dtype=st.sampled_from(FLOATS),
)
@examples(150)
def test_any_numbers_have_the_references_bits(numbers, case, dtype):
    param, grad = torch.tensor(numbers, dtype=torch.float32).unbind(1)
    optimizers = pair(case, [param], dtype)
    for _ in range(2):
        step(optimizers, [grad.to(dtype)])
    assert_same(*optimizers)
