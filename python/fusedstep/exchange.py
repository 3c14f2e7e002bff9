"""What processes tell each other that have parts of the same tensors: sums, whether they agree, and errors.

Nothing here depends on which gradients a process has: all of them enter every collective, in the order of the
parameters. Sums travel in float64, and stay on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import layout, shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .optimizer import FusedOptimizer

Over: TypeAlias = "tuple[ProcessGroup, ...]"  # the groups over which the parts of a tensor add up; empty: it is whole

# The last two of the numbers that travel together reach everybody: whether a gradient is not finite, or is NaN; and
# whether the step is to be skipped, or cannot be made. Before them are sums of squares, or largest absolute values.
ODD, STOP = -2, -1
SKIP, FAIL = 1.0, 2.0**30
FAILURE = "failure"  # in what a process tells of its optimizer


def over(tensor: Tensor) -> Over:
    """The process groups over which the parts of a tensor add up."""
    return _groups(tensor, copies=False)


def over_dims(tensor: Tensor, dims: Collection[int]) -> Over:
    """The same of sums over some of its dimensions."""
    return _groups(tensor, copies=False, dims=dims)


def _groups(tensor: Tensor, copies: bool, dims: Collection[int] | None = None) -> Over:
    """Those along the dimensions of a tensor's mesh; ``copies``: also along those where others have the same part."""
    if not shards.is_sharded(tensor) or tensor.device_mesh.get_coordinate() is None:
        return ()
    mesh = tensor.device_mesh
    taken = [dim for dim, placement in enumerate(tensor.placements) if copies or not placement.is_replicate()]
    if dims is not None:
        taken = [dim for dim in taken if getattr(tensor.placements[dim], "dim", None) in dims]
    return tuple(mesh.get_group(dim) for dim in taken if mesh.size(dim) > 1)


class Pack(NamedTuple):
    """Numbers that travel together."""

    size: int
    members: list[tuple[ProcessGroup, Tensor | None]]  # each group with the places of its numbers; None: all
    decides: bool  # whether the last two are among them


class Exchange:
    """Between the processes that share some tensors out."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.kinds: dict[Over, int] = {(): 0}  # the place of each among numbers
        groups: dict[ProcessGroup, None] = {}
        device = None
        for param in params:
            self.kinds.setdefault(over(param), len(self.kinds))
            found = _groups(param, copies=True)
            if found and device is None:
                device = layout.local(param).device
            groups |= dict.fromkeys(found)
        self.device: torch.device = device or torch.device("cpu")
        # Whether the host sees numbers as soon as they are shared. Where it would have to wait for them, all processes
        # enter every exchange of a step, also of one that is skipped, and so does one that fails.
        self.host_sees = self.device.type == "cpu"
        self.groups: Over = tuple(groups)  # through which goes what all must know
        self._packs: dict[tuple[Over, ...], Pack] = {}

    def numbers(self, kinds: Sequence[Over] | Pack | None = None) -> Tensor:
        """A zero for each of these kinds, or of all, and the last two."""
        return torch.zeros(self._pack_of(kinds).size, dtype=torch.float64, device=self.device)

    def add(self, numbers: Tensor, kind: Over, sum_of_squares: Tensor, max_abs: Tensor, by_max_abs: bool) -> None:
        """Add sums over gradients of this process."""
        number = numbers[self.kinds[kind]]
        if by_max_abs:
            odd = max_abs.isnan()
            number.copy_(torch.maximum(number, torch.where(odd, 0.0, max_abs).to(self.device)))
        else:
            odd = ~max_abs.isfinite()
            number += sum_of_squares.to(self.device)
        numbers[ODD] += odd.to(self.device)

    def share(self, numbers: Tensor, by_max_abs: bool, kinds: Sequence[Over] | Pack | None = None) -> None:
        """Add up numbers of these kinds, or take the largest, over all processes that have parts of the tensors."""
        from torch.distributed import ReduceOp, all_reduce

        for group, indices in self._pack_of(kinds).members:
            part = numbers if indices is None else numbers.index_select(0, indices)
            all_reduce(part, op=ReduceOp.MAX if by_max_abs else ReduceOp.SUM, group=group)
            if indices is not None:
                numbers.index_copy_(0, indices, part)

    def _pack_of(self, kinds: Sequence[Over] | Pack | None) -> Pack:
        if isinstance(kinds, Pack):
            return kinds
        each = tuple(self.kinds if kinds is None else kinds)
        if each not in self._packs:
            self._packs[each] = self.pack([(kind, 1) for kind in each])
        return self._packs[each]

    def pack(self, parts: Sequence[tuple[Over, int]], decides: bool = True) -> Pack:
        """Of numbers in this order, so many of each kind, then the last two; these are left out unless it ``decides``.

        Without them, only those groups are entered through which some number goes.
        """
        if decides:
            parts = [*parts, (self.groups, 2)]
        size, members = sum(count for _, count in parts), []
        for group in self.groups:
            goes = torch.tensor([group in kind for kind, _ in parts], dtype=torch.bool)
            indices = goes.repeat_interleave(torch.tensor([count for _, count in parts], dtype=torch.int64)).nonzero()
            if len(indices):
                members.append((group, None if len(indices) == size else indices.reshape(-1).to(self.device)))
        return Pack(size, members, decides)

    def tell(self, mine: Any) -> list[tuple[int, Any]]:
        """What each process that shares tensors with this one, or with one of those, tells, with its rank."""
        from torch.distributed import all_gather_object, get_rank, get_world_size

        told = {get_rank(): mine}
        for group in self.groups:
            others: list[Any] = [None] * get_world_size(group)
            all_gather_object(others, told, group=group)
            for other in others:
                told |= other
        return sorted(told.items())

    def raise_failure(self, cls: str, mine: BaseException | None) -> None:
        """Once all know that a process cannot make the step: each raises, and names the error."""
        told = self.tell(None if mine is None else f"{type(mine).__name__}: {mine}")
        if mine is None:
            rank, text = next((rank, text) for rank, text in told if text is not None)
            raise failed(cls, rank, text)

    def check_agreement(self, optimizer: FusedOptimizer, asked: dict[str, str], check: Callable[[], object]) -> None:
        """Raise, in all processes, if one cannot make its first step or they differ: they would wait for ever.

        Args:
            asked: what of the step itself must be equal.
            check: raises what a step would raise before it changes anything.
        """
        from torch.distributed import ReduceOp, all_reduce

        failure = None
        try:
            check()
        except Exception as error:
            failure = error
        described = descriptions(optimizer)
        described[0][1].update(asked)
        if failure is not None:
            described[0][1][FAILURE] = f"{type(failure).__name__}: {failure}"
        digest = int.from_bytes(hashlib.sha256(repr(described).encode()).digest()[:7], "big")
        seen = torch.tensor([digest, -digest], dtype=torch.int64, device=self.device)
        for group in self.groups:
            all_reduce(seen, op=ReduceOp.MAX, group=group)
        highest, lowest = seen.tolist()
        told = self.tell(described) if highest != -lowest else []
        if failure is not None:
            raise failure
        if not told:
            return
        for rank, theirs in told:
            if FAILURE in theirs[0][1]:
                raise failed(type(optimizer).__name__, rank, theirs[0][1][FAILURE])
        (first, ours), *others = told
        for rank, theirs in others:
            for one, other in zip(ours, theirs, strict=False):
                if one != other:
                    raise disagreement(first, one, rank, other)
            if len(ours) != len(theirs):
                raise RuntimeError(
                    f"{type(optimizer).__name__}: process {first} has {len(ours) - 1} parameters, process {rank} "
                    f"{len(theirs) - 1}; every process must give the same ones"
                )


def descriptions(optimizer: FusedOptimizer) -> list[tuple[str, dict[str, str]]]:
    """What must be equal in all processes: of the optimizer, and of each parameter by name."""
    from .planning import named

    own = {key: _shown(value) for key, value in optimizer.stepper.options.items() if key != "backend"}
    found = [(type(optimizer).__name__, own)]
    for group in optimizer.param_groups:
        options = {key: _shown(value) for key, value in group.items() if key not in ("params", "param_names")}
        for name, param in named(group):
            what = f"parameter {len(found) - 1}" + ("" if name is None else f" '{name}'")
            placed = {"shape": str(tuple(param.shape)), "dtype": str(param.dtype)}
            if shards.is_sharded(param):
                placed |= {"placements": str(param.placements), "mesh": str(tuple(param.device_mesh.shape))}
            found.append((what, placed | options))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(each)}' for key, each in sorted(value.items()))}}}"
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype))
    return repr(value) if plain else type(value).__name__


def failed(cls: str, rank: int, text: str) -> RuntimeError:
    return RuntimeError(f"{cls}: process {rank} could not make this step, so no process did: {text}")


def disagreement(first: int, one: Any, rank: int, other: Any) -> RuntimeError:
    (what, mine), (others_what, theirs) = one, other
    if what != others_what:
        return RuntimeError(f"processes have different parameters: {what} in process {first}, {others_what} in {rank}")
    key = next(key for key in (mine | theirs) if mine.get(key) != theirs.get(key))
    return RuntimeError(
        f"processes differ in {key} of {what}: {mine.get(key)} in process {first}, {theirs.get(key)} in process "
        f"{rank}; every process must give the same parameters and options"
    )


def refuse_other_parts(
    owner: str, subject: str, tensor: Tensor, param: Tensor, what: str, kept: Sequence[int | None] | None = None
) -> None:
    """Raise RuntimeError unless ``tensor``, which ``subject`` names, is shared out to processes as ``param`` is.

    ``kept``: for each dimension of the tensor the one of the parameter that it has in common; None: all are the same.
    """
    is_part, of_part = shards.is_sharded(tensor), shards.is_sharded(param)
    if not (is_part or of_part):
        return
    if not (is_part and of_part):
        found, expected = ("DTensor", "plain tensor") if is_part else ("plain tensor", "DTensor")
        raise RuntimeError(f"{owner}: {subject} is a {found}, it must be a {expected} like {what}")
    if kept is None and tensor._spec is param._spec:
        return
    mesh = param.device_mesh
    if tensor.device_mesh != mesh:
        raise RuntimeError(f"{owner}: {subject} lies on {tensor.device_mesh}, it must be on {mesh}, the mesh of {what}")
    # Along a dimension of one process all placements are the same.
    placements = param.placements if kept is None else tuple(shards.lines_placements(param, kept))
    pairs = enumerate(zip(tensor.placements, placements, strict=True))
    differ = [own for dim, (own, other) in pairs if own != other and mesh.size(dim) > 1]
    if not differ:
        return
    to_sum = ", a sum that is still to be made" if any(placement.is_partial() for placement in differ) else ""
    raise RuntimeError(
        f"{owner}: {subject} has placements {tensor.placements}{to_sum}; they must be "
        f"{placements}, those of {what}: call .redistribute(placements=...) on it"
    )
