"""What an update rule is: its names and its arithmetic. Knows no groups, tensors in memory, plans or backends."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterable
from typing import Any, ClassVar


class Rule:
    """The names and the arithmetic of a rule, which the reference runs as it stands and Triton compiles.

    Hence its functions use operators, ``if`` on numbers and flags, and the functions of `numerics`, no method of a
    tensor: a number of theirs is a float or a tensor of torch or of Triton. Every division and root is one of
    `numerics`, which rounds it correctly.

    A rule that reduces has statistics of the rows, the columns, or both, of contiguous matrices [batch, rows, columns];
    a tensor that is flat has a line of its own for each element. An engine calls in this order `prepare`; `square` of
    each element; `line` for each row or column; `matrix`; `direction` of each element; `finish`; `update` of each
    element. The factors of an element are those of its line; where rows and columns both have some, their product, the
    row's first multiplied by the matrix's. An engine adds in an order of its own: backends agree to rounding.
    """

    rule: ClassVar[str]  # the name of the compiled rule
    Hyper: ClassVar[type]  # the hyperparameters, a NamedTuple, in the order of the compiled rule
    Scalars: ClassVar[type]  # the scalars of a step, a NamedTuple of float, or bool for a flag, or `numerics.Double`
    state_names: ClassVar[tuple[str, ...]]  # every state the rule can have, in the order of `update`

    reduces: ClassVar[bool] = False  # whether there are sums over rows, columns or tensors
    # What each state of a rule that reduces has a number for: each "row", "column" or "element"; each element of a
    # "flat" tensor, and of no other; the "tensor", of which it is the RMS before the step.
    spans: ClassVar[dict[str, str]] = {}
    Finish: ClassVar[type]  # what `finish` returns, a NamedTuple like `Scalars`

    @staticmethod
    def prepare(h: Any, step: int) -> Any:
        """The scalars of a parameter's step number ``step`` (from 1), computed in float64 from the `Hyper` ``h``."""
        raise NotImplementedError

    @staticmethod
    def update(param: Any, grad: Any, *states_scalars_and_flags: Any) -> tuple[Any, ...]:
        """The new parameter and states, from the old ones, the scalars ``s`` and ``has``, which says what states exist.

        Nothing is computed with an absent state; it is handed back. For a rule that reduces, the states are those with
        a number for each element; before them come the factors, and after ``s`` what `finish` returned, or None.
        """
        raise NotImplementedError

    @staticmethod
    def square(grad: Any, s: Any) -> Any:
        """What is averaged over a line."""
        raise NotImplementedError

    @staticmethod
    def line(mean: Any, *states_and_scalars: Any) -> tuple[Any, ...]:
        """From the mean of a line's squares and its states: the new states, then its factors."""
        raise NotImplementedError

    # These are None where a rule does without. `matrix(mean, s)`: what the factors of a matrix's rows are multiplied
    # by, from the mean of their first states. `direction(grad, factor, s)`: the update before its scale is known.
    # `finish(s, param_rms, update_rms)`: scalars, in float64, from the RMS of the old parameter and of the directions.
    matrix: ClassVar[Callable | None] = None
    direction: ClassVar[Callable | None] = None
    finish: ClassVar[Callable | None] = None

    @classmethod
    def rule_named(cls, rule: str) -> type[Rule]:
        """The class with the functions of a rule that `rule_of` names."""
        return cls

    @classmethod
    def has(cls, present: Iterable[bool]) -> Any:
        """What `update` takes as ``has``: a flag for each of its states, by name."""
        return _flags(cls.names_of("element") if cls.reduces else cls.state_names)(*present)

    @classmethod
    def names_of(cls, span: str) -> tuple[str, ...]:
        """The states that have a number for each of what ``span`` names."""
        return _names_of(cls, span)


@functools.cache
def _names_of(rule: type[Rule], span: str) -> tuple[str, ...]:
    return tuple(name for name, other in rule.spans.items() if other == span)


@functools.cache
def _flags(names: tuple[str, ...]) -> type:
    return namedtuple("Has", names)
