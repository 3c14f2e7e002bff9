"""The same training as with the class that is replaced."""

import pytest
import torch
from kinds import ALL, ELEMENTWISE
from parents import parent
from support import by_case

import fusedstep
from fusedstep.cases import CASES, gradient, layouts

# Relative to the size of the numbers. Below fp32 the comparison is with torch's fp32 step, rounded: its own loop in
# bf16 and fp16 rounds after each operation, and in fp16 it divides by an eps that has become zero. Two results that
# differ in fp32's last place may round to neighbours.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def parameters(dtype):
    values = layouts(dtype, "cpu", torch.Generator().manual_seed(3))
    del values["large_matrix"]  # the tolerance is for the worst of some thousand elements
    return [torch.nn.Parameter(value.detach()) for value in values.values()]


def train(optimizer, steps, first=0, dtype=None):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = gradient(param, dtype or param.dtype, generator).to(param.dtype)
        optimizer.step()
    return params


def ours(case, params, backend):
    return getattr(fusedstep, case.optimizer)(params, backend=backend, **case.options)


@pytest.mark.parametrize(
    ("backend", "case"),
    # Every case by the reference; the CPU engine, which has its bits, beside the parent once more by kind.
    [("reference", case) for case in CASES] + [("cpu", case) for case in (CASES if ALL else ELEMENTWISE)],
    ids=str,
)
def test_training_matches_the_parent(case, backend):
    for dtype in DTYPES:
        check_training(case, backend, dtype)


def check_training(case, backend, dtype):
    low = dtype not in (torch.float32, torch.float64)
    steps = 1 if low else 12
    a = ours(case, parameters(dtype), backend)
    b = parent(case, [torch.nn.Parameter(p.detach().float()) if low else p for p in parameters(dtype)])
    for mine, expected in zip(train(a, steps), train(b, steps, dtype=dtype), strict=True):
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(mine, expected.to(dtype), rtol=tolerance, atol=tolerance / 8)
    if dtype == torch.float64:
        assert_same_states(a, b)


@by_case
def test_every_option_changes_the_result(case):
    """Guards the rows: an option that is ignored by both sides would be tested by nobody."""

    def results(options):
        optimizer = getattr(fusedstep, case.optimizer)(parameters(torch.float64), **options)
        params = train(optimizer, 8)  # a rectified optimizer begins in earnest with the sixth
        return params + [value for state in optimizer.state.values() for value in state.values()]

    base = results(case.options)
    for option in case.options:
        if option in ("lr", "eps", "epsilon") or (option == "momentum" and "nesterov" in case.options):
            continue
        options = {key: value for key, value in case.options.items() if key != option}
        if option == "weight_decay":
            options[option] = 0.0
        other = results(options)
        assert len(other) != len(base) or any(not torch.equal(x, y) for x, y in zip(base, other, strict=True)), option


def assert_same_states(a, b):
    mine, expected = a.state_dict()["state"], b.state_dict()["state"]
    assert mine.keys() == expected.keys()
    for key in expected:
        assert list(mine[key]) == list(expected[key])
        for name, value in expected[key].items():
            torch.testing.assert_close(mine[key][name], value, rtol=1e-13, atol=1e-13)
