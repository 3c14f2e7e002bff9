"""What becomes of the text of a rule in Triton: any number of states, float64 constants, helpers, names."""

import importlib.util
from typing import NamedTuple

import numpy as np
import pytest
import torch
from kinds import each

from fusedstep.backends import BACKENDS
from fusedstep.numerics import divide, narrowed, power, real, square_root, where
from fusedstep.record import memory_layout, words_of
from fusedstep.rule import Rule

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Hyper(NamedTuple):
    lr: float
    beta: float
    flag: float


class Scalars(NamedTuple):
    lr: float
    beta: float
    tenth: float
    flag: bool


def mixed(a, b, s):
    return s.beta * a + (1.0 - s.beta) * b


class NoState(Rule):
    Hyper, Scalars = Hyper, Scalars
    state_names = ()

    @staticmethod
    def prepare(h, step):
        tenth = where(h.flag != 0, 1e-1 * real(step), 0.1)
        return Scalars(divide(h.lr, 1.0 - power(h.beta, step)), h.beta, tenth, h.flag != 0)

    @staticmethod
    def update(param, grad, s, has):
        return (param - where(s.flag, s.lr, s.tenth) * grad,)


class TwoStates(NoState):
    state_names = ("first", "second")

    @staticmethod
    def update(param, grad, first, second, s, has):
        first = mixed(first, grad, s)
        if has.second:
            second = mixed(second, first * s.tenth, s)
            first = first + second
        return param - divide(s.lr * first, square_root(1.0 + first * first)), first, second


class FiveStates(NoState):
    state_names = ("a", "b", "c", "d", "e")

    @staticmethod
    def update(param, grad, a, b, c, d, e, s, has):
        a = mixed(a, grad, s)
        b = mixed(b, a, s)
        if has.c:
            c = mixed(c, b, s)
        d = mixed(d, grad * grad, s)
        e = mixed(e, a - b, s)
        return param - s.lr * (a + b + d + e), a, b, c, d, e


@each(
    of={
        "none": (NoState, ()),
        "two": (TwoStates, ()),
        "one of two": (TwoStates, ("second",)),
        "five": (FiveStates, ()),
        "four of five": (FiveStates, ("c",)),
    },
    dtype=[torch.float32, torch.float64],
    flag=[0.0, 1.0],
)
def test_a_rule_has_any_number_of_states_and_the_references_bits(of, dtype, flag):
    rule, absent = of
    reasons = BACKENDS["triton"].reasons(torch.device("cpu"))
    if reasons:
        pytest.skip("; ".join(reasons))
    from fusedstep.triton_kernels import step
    from fusedstep.triton_kernels.numeric import NONE

    from fusedstep.backends.triton import DTYPES

    n, steps, hyper = 333, 6.0, rule.Hyper(0.3, 0.7, flag)
    param, grad, *states = (torch.randn(n, dtype=dtype) for _ in range(2 + len(rule.state_names)))
    states = [None if name in absent else t for name, t in zip(rule.state_names, states, strict=True)]
    scalars = narrowed(rule.prepare(hyper, 7), dtype)
    expected = rule.update(param, grad, *states, scalars, rule.has(state is not None for state in states))

    counter = torch.tensor(steps)
    record = np.zeros(1, memory_layout())
    record["param"], record["step"], record["numel"] = param.data_ptr(), counter.data_ptr(), n
    record["states"][0, : len(states)] = [0 if state is None else state.data_ptr() for state in states]
    table = torch.from_numpy(words_of(record))
    number = DTYPES[dtype]
    dtypes = (number, number, *(NONE.value if state is None else number for state in states))
    kernel = step.prepare(rule, dtypes, (NONE.value, NONE.value), False, "", step.block_size())
    done = torch.zeros(1, dtype=torch.int32)
    memory = table, torch.tensor([[0, n, 0]]), torch.tensor([grad.data_ptr()]), torch.tensor(hyper, dtype=torch.float64)
    kernel(param.device, 1, *memory, done, None, None, None, None, 1)
    assert counter == steps + 1
    assert torch.equal(param, expected[0])
    for state, new in zip(states, expected[1:], strict=True):
        assert (state is None and new is None) or torch.equal(state, new)
