"""A step of a rule that reduces, with torch operations: the order in which `Rule` says its functions are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..lines import Lines, Sum
from ..numerics import Number, narrowed, square_root
from ..rule import Rule

# Takes turns with whoever adds up: it gives its sums of a pass, in float64, and gets those of whole tensors.
Updating: TypeAlias = Generator[list[Tensor], list[Tensor], tuple[Tensor, dict[str, Tensor]]]


def updating(
    rule: type[Rule],
    lines: Lines,
    weight: Callable[[], Tensor],
    grad: Callable[[], Tensor],
    states: Mapping[str, Callable[[], Tensor]],
    scalars: Any,
) -> Updating:
    """The new parameter and states, in the shapes of the old ones; nothing is written.

    Args:
        lines: how the tensors are taken.
        weight, grad, states: give tensors in the arithmetic dtype. Numbers for each element are asked for anew in each
            pass, and not kept in between: many tensors go through the passes together.
    """
    squares = rule.square(grad(), scalars)
    arithmetic = squares.dtype
    _, of_rows, _ = lines.passes(rule)
    spans = [(span, each) for span, each in lines.spans() if rule.names_of(span)]
    asked = [_sum(squares, each) for _, each in spans]
    if rule.finish is not None:
        asked.append(sum_of_squares(weight()))
    flat = [squares] if lines.is_flat else []
    del squares
    totals = yield asked
    means = flat or [_mean(total, each, arithmetic) for total, (_, each) in zip(totals, spans, strict=False)]
    new: dict[str, Tensor] = {}
    firsts: dict[str, Tensor] = {}
    of_lines: dict[str, tuple[Tensor, ...]] = {}  # factors
    for span, mean in zip(["flat"] if lines.is_flat else [span for span, _ in spans], means, strict=True):
        names = rule.names_of(span)
        line = rule.line(mean, *(states[name]().reshape(mean.shape) for name in names), scalars)
        new.update(zip(names, line, strict=False))
        firsts[span], of_lines[span] = line[0], line[len(names) :]
    of_matrices = yield [_sum(firsts["row"], each) for each in of_rows]
    for total, each in zip(of_matrices, of_rows, strict=True):
        factor, *others = of_lines["row"]
        of_lines["row"] = (factor * rule.matrix(_mean(total, each, arithmetic), scalars), *others)

    def factors() -> tuple[Tensor, ...]:
        one, *other = of_lines.values()
        return tuple(a * b for a, b in zip(one, other[0], strict=True)) if other else one

    asked = [] if rule.finish is None else [sum_of_squares(rule.direction(grad(), *factors(), scalars))]
    of_directions = yield asked
    finish, param = None, weight()
    if rule.finish is not None:
        rms, of_update = (_root_mean(total, lines.tensor.count) for total in (totals[-1], *of_directions))
        finish = narrowed(rule.finish(scalars, rms, of_update), param.dtype)
        new.update((name, torch.as_tensor(rms, dtype=param.dtype)) for name in rule.names_of("tensor"))
    names = rule.names_of("element")
    old = [states[name]().reshape(param.shape) if name in states else None for name in names]
    has = rule.has(state is not None for state in old)
    updated, *elements = rule.update(param, grad(), *factors(), *old, scalars, finish, has)
    new.update((name, state) for name, state in zip(names, elements, strict=True) if state is not None)
    return updated, new


def alone(process: Updating) -> tuple[Tensor, dict[str, Tensor]]:
    """The result where nobody else has parts of the sums."""
    try:
        sums = next(process)
        while True:
            sums = process.send(sums)
    except StopIteration as end:
        return end.value


def sum_of_squares(tensor: Tensor) -> Tensor:
    return tensor.double().square().sum()


def _root_mean(total: Tensor, count: int) -> Number:
    """Of squares; a number on a device stays there. Not a number for an empty tensor."""
    if count and total.device.type == "cpu":
        return math.sqrt(total.item() / count)
    return square_root(total / count)


def _sum(numbers: Tensor, each: Sum) -> Tensor:
    return numbers.sum(each.dims, keepdim=True, dtype=torch.float64)


def _mean(total: Tensor, each: Sum, dtype: torch.dtype) -> Tensor:
    return (total / each.count).to(dtype)
