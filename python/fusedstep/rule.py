"""What an optimizer's class declares: its rule's names and arithmetic, and what its groups' options mean for it.

No plan, no backend and no state is known here.
"""

from __future__ import annotations

import functools
import math
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from . import shards


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

    step_form: ClassVar[Literal["tensor", "int", "absent"]] = "tensor"  # of "step" in the parent class's state_dict
    state_at_construction: ClassVar[bool] = False  # whether the parent class has states before the first step

    non_negative: ClassVar[tuple[str, ...]] = ()  # states that are quantized without a sign

    variant_options: ClassVar[tuple[str, ...]] = ()  # keys of a group that `variant_of` looks at

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

    # What an optimizer asks of it, group by group.

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError for an option of a group that is out of range."""
        raise NotImplementedError

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Those of `state_names` that the options of a group need, in their order."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any], variant: Any) -> tuple[float | Tensor, ...]:
        """The values of `Hyper` for parameters of a group: numbers, or one-element tensors."""
        raise NotImplementedError

    def variant_of(self, group: dict[str, Any], name: str | None, param: Tensor) -> Any:
        """What `hyper` needs to know of a parameter; those of a group with equal variants share a kernel call."""
        return None

    def clips(self) -> bool:
        """Whether `clip` is to be called in a step."""
        return False

    def clips_by_norm(self, group: dict[str, Any]) -> bool:
        """Whether `clip` takes the norm of each gradient of a group."""
        return False

    def clip(
        self, grads: list[tuple[dict[str, Any], Tensor]], norms: Callable[[list[Tensor | None]], list[Tensor | None]]
    ) -> list[Tensor]:
        """The gradients as a step shall take them, from unscaled ones, each with its group.

        Args:
            norms: gives the norm of each whole gradient whose part, changed already, stands in its place; None: it is
                not asked for. To be called once where `clips_by_norm` holds for a group, with gradients or without.
        """
        raise NotImplementedError

    @classmethod
    def check_sparse(cls, group: dict[str, Any], what: str) -> None:
        """Raise RuntimeError if the parameter that ``what`` describes cannot take its sparse gradient."""
        raise RuntimeError(
            f"{cls.__name__} does not support sparse gradients ({what}); call .to_dense() on the gradient, "
            "or create the embedding with sparse=False"
        )

    @classmethod
    def changes_rows_alone(cls, group: dict[str, Any]) -> bool:
        """Whether a step with a sparse gradient leaves the rows that it does not name as they are."""
        return True

    @classmethod
    def rule_of(cls, variant: Any) -> tuple[str, bool]:
        """The compiled rule for parameters of a variant, and whether it has sums over rows, columns or tensors."""
        return cls.rule, cls.reduces

    def matrix_dims(self, group: dict[str, Any], name: str | None, param: Tensor) -> tuple[int, int] | None:
        """For a rule that reduces: with which dimensions the rows and the columns of a parameter's matrices begin.

        Rows go up to the columns, these to the end; what is before the rows is the batch. None: it is taken as flat.
        """
        raise NotImplementedError

    def matrices(
        self, group: dict[str, Any], name: str | None, param: Tensor, shape: Sequence[int]
    ) -> tuple[int, int, int] | None:
        """(batch, rows, columns) of a contiguous part, of that shape, of a parameter; None: it is taken as flat."""
        split = self.matrix_dims(group, name, param)
        if split is None:
            return None
        rows, columns = split
        return math.prod(shape[:rows]), math.prod(shape[rows:columns]), math.prod(shape[columns:])

    def state_shape(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> torch.Size | None:
        """The shape of the state ``key`` of a parameter; None if this parameter does not have the state."""
        return param.shape

    def kept_dims(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> list[int | None]:
        """For each dimension of the state ``key`` the one of the parameter that it has in common; None: it has none."""
        dims: list[int | None] = list(range(param.dim()))
        functions = self.rule_named(self.rule_of(self.variant_of(group, name, param))[0])
        span = functions.spans.get(key, "element")
        if span == "tensor":
            return []
        if span not in ("row", "column"):
            return dims
        rows, columns = self.matrix_dims(group, name, param)
        summed = dims[columns:] if span == "row" else dims[rows:columns]
        kept = [None if dim in summed else dim for dim in dims]
        keeps_all = len(self.state_shape(key, group, name, param)) == len(dims)
        return kept if keeps_all else [dim for dim in kept if dim is not None]

    def zeros(self, key: str, group: dict[str, Any], name: str | None, param: Tensor, dtype: torch.dtype) -> Tensor:
        """The state ``key`` of a rule that reduces before its first step, shared out as the parameter is."""
        shape = self.state_shape(key, group, name, param)
        return shards.zeros(param, shape, self.kept_dims(key, group, name, param), dtype)

    def exact_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Those of `states_of` that stay in fp32 where ``state_dtype`` is less: the rule takes their difference."""
        return ()

    def begins_anew(self, group: dict[str, Any]) -> bool:
        """Whether a step that finds no states differs from one that finds those of `init_state`."""
        return False

    def init_state(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> Tensor:
        """The state ``key`` of a parameter before its first step."""
        return torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)


@functools.cache
def _names_of(rule: type[Rule], span: str) -> tuple[str, ...]:
    return tuple(name for name, other in rule.spans.items() if other == span)


@functools.cache
def _flags(names: tuple[str, ...]) -> type:
    return namedtuple("Has", names)
