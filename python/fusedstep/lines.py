"""The sums that a rule that reduces takes of a tensor, of which a process may have a part: over what, and with whom."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from . import exchange, shards

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer
    from .rule import Rule


class Sum(NamedTuple):
    """A sum over some dimensions, for each index of the others."""

    dims: tuple[int, ...]
    count: int  # how many numbers of the whole tensor each sum is of
    crosses: bool = False  # whether processes have parts of it
    over: exchange.Over = ()  # those that this process adds up with

    @classmethod
    def of(cls, param: Tensor, dims: tuple[int, ...]) -> Sum:
        count = math.prod(param.shape[dim] for dim in dims)
        return cls(dims, count, bool(shards.sharded_dims(param) & {*dims}), exchange.over_dims(param, dims))

    def lines(self, shape: tuple[int, ...]) -> int:
        """How many sums there are of a tensor of this shape."""
        return math.prod(size for dim, size in enumerate(shape) if dim not in self.dims)


class Lines(NamedTuple):
    """How a tensor is taken: as matrices, of whose rows and columns there are sums, or as flat."""

    tensor: Sum
    row: Sum | None = None  # over the columns; None: it is flat
    column: Sum | None = None  # over the rows
    matrix: Sum | None = None  # of what there is one of for each row, over the rows

    @classmethod
    def of_matrices(cls, matrices: tuple[int, int, int] | None, numel: int) -> Lines:
        """Those of a tensor that one process has, in the shape ``matrices`` if it has some, else flat."""
        if matrices is None:
            return cls(Sum((0,), numel))
        _, rows, columns = matrices
        return cls(Sum((0, 1, 2), numel), Sum((2,), columns), Sum((1,), rows), Sum((1, 2), rows))

    @classmethod
    def of_part(cls, optimizer: FusedOptimizer, group: dict[str, Any], name: str | None, param: Tensor) -> Lines:
        """Those of a parameter in its own shape."""
        dims = tuple(range(param.dim()))
        split = optimizer.matrix_dims(group, name, param)
        if split is None:
            return cls(Sum.of(param, dims))
        rows, columns = dims[split[0] : split[1]], dims[split[1] :]
        of_rows = Sum.of(param, rows)
        return cls(Sum.of(param, dims), Sum.of(param, columns), of_rows, of_rows._replace(dims=rows + columns))

    @property
    def is_flat(self) -> bool:
        return self.row is None

    def spans(self) -> list[tuple[str, Sum]]:
        """The sums of each line of matrices, by what `Rule.spans` calls it."""
        return [] if self.is_flat else [("row", self.row), ("column", self.column)]

    def passes(self, rule: type[Rule]) -> tuple[list[Sum], list[Sum], list[Sum]]:
        """The sums that `reference_reducing.updating` asks for, one pass after the other."""
        of_tensor = [] if rule.finish is None else [self.tensor]
        of_lines = [each for span, each in self.spans() if rule.names_of(span)]
        of_rows = [] if rule.matrix is None or self.is_flat else [self.matrix]
        return of_lines + of_tensor, of_rows, of_tensor


def crosses(optimizer: FusedOptimizer, group: dict[str, Any], name: str | None, param: Tensor) -> bool:
    """Whether the step of a parameter takes sums of which other processes have parts."""
    if not shards.sharded_dims(param):
        return False
    rule, reduces = optimizer.rule_of(optimizer.variant_of(group, name, param))
    if not reduces:
        return False
    passes = Lines.of_part(optimizer, group, name, param).passes(optimizer.rule_named(rule))
    return any(each.crosses for sums in passes for each in sums)
