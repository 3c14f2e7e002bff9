"""A step of a rule that reduces, with torch operations: the order in which `Rule` says its functions are called."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..numerics import narrowed
from ..rule import Rule


def update(
    rule: type[Rule],
    param: Tensor,
    grad: Tensor,
    states: dict[str, Tensor],
    matrices: tuple[int, int, int] | None,
    scalars: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The new parameter and states, from tensors in the arithmetic dtype.

    Args:
        matrices: (batch, rows, columns) as which the tensors are taken; None: as flat.
    """
    shape, states = param.shape, dict(states)
    param, grad = (tensor.reshape(matrices or (-1,)) for tensor in (param, grad))
    squares = rule.square(grad, scalars)
    factors: tuple[Tensor, ...] = ()
    for span, dim in (("row", -1), ("column", -2)) if matrices else (("flat", None),):
        names = [name for name in rule.names_of(span) if name in states]
        if not names:
            continue
        mean = squares if dim is None else squares.mean(dim, keepdim=True)
        old = (states[name].reshape(mean.shape) for name in names)
        line = rule.line(mean, *old, scalars)
        states.update((name, new.reshape(states[name].shape)) for name, new in zip(names, line, strict=False))
        of_line = line[len(names) :]
        if span == "row" and rule.matrix is not None:
            first = of_line[0] * rule.matrix(line[0].mean(-2, keepdim=True), scalars)
            of_line = (first, *of_line[1:])
        factors = tuple(a * b for a, b in zip(factors, of_line, strict=True)) if factors else of_line
    finish = None
    if rule.finish is not None:
        rms = root_mean_square(param)
        of_update = root_mean_square(rule.direction(grad, *factors, scalars))
        finish = narrowed(rule.finish(scalars, rms, of_update), param.dtype)
        states.update((name, states[name].new_full((), rms)) for name in rule.names_of("tensor"))
    names = rule.names_of("element")
    old = [states[name].reshape(param.shape) if name in states else None for name in names]
    has = rule.has(state is not None for state in old)
    param, *new = rule.update(param, grad, *factors, *old, scalars, finish, has)
    states.update((name, state.reshape(shape)) for name, state in zip(names, new, strict=True) if state is not None)
    return param.reshape(shape), states


def root_mean_square(tensor: Tensor) -> float:
    """The root of the mean of squares, summed in float64; not a number for an empty tensor."""
    return math.sqrt(tensor.double().square().sum().item() / tensor.numel()) if tensor.numel() else math.nan
