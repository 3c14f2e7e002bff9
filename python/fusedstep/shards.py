"""Which elements of a whole tensor a process has of it: what is drawn for each at random must be as if it had all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layout


class ElementMap(NamedTuple):
    """Which element of the whole tensor, in the order of its memory, each element of a part is, as in csrc/table.h.

    The elements lie in runs of ``run``, of which ``runs`` begin ``stride`` apart from each other, and groups of these
    ``outer`` apart; a ``run`` of 0 never ends.
    """

    first: int = 0
    run: int = 0
    runs: int = 1
    stride: int = 0
    outer: int = 0

    def elements(self, own: Tensor) -> Tensor:
        """The numbers of elements in the whole tensor, from those in the part."""
        if self.run == 0:
            return self.first + own
        begun = own // self.run
        return self.first + own % self.run + begun % self.runs * self.stride + begun // self.runs * self.outer

    @property
    def keeps_groups(self) -> bool:
        """Whether eight elements of the part from a multiple of eight on are such ones of the whole tensor."""
        return all(number % 8 == 0 for number in (self.first, self.run, self.stride, self.outer))


IDENTITY = ElementMap()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; what is no part of torch.distributed is not imported for that."""
    return layout.is_wrapper(tensor) and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_flattened(tensor: Tensor) -> bool:
    """Whether a tensor is a flat parameter of `FullyShardedDataParallel`, or a parameter that lies in one."""
    return getattr(tensor, "_fsdp_flattened", False)


def wraps(tensor: Tensor, memory: Tensor | None) -> bool:
    """Whether a DTensor is made of ``memory`` in the way that csrc/plan.cpp knows."""
    return is_sharded(tensor) and getattr(tensor, "_local_tensor", None) is memory and hasattr(tensor, "_spec")


def sharded_dims(tensor: Tensor) -> set[int]:
    """The dimensions along which processes have parts of a tensor."""
    if not is_sharded(tensor):
        return set()
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return {placement.dim for placement, size in sizes if size > 1 and hasattr(placement, "dim")}


def part_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of the part that this process has of a parameter; of the parameter's dimensions in any case."""
    memory = layout.local(param.detach())
    return tuple(memory.shape) if memory.dim() == param.dim() else (0,) * param.dim()


def lines_placements(param: Tensor, kept: Sequence[int | None]) -> list[Any]:
    """How a tensor is placed whose dimensions are those ``kept`` of a parameter's, None for others."""
    from torch.distributed.tensor import Replicate

    places = {dim: element_map for element_map, dim in enumerate(kept) if dim is not None}
    return [
        _moved(placement, places[placement.dim]) if getattr(placement, "dim", None) in places else Replicate()
        for placement in param.placements
    ]


def _moved(placement: Any, dim: int) -> Any:
    """A way to shard, of another dimension."""
    if placement.dim == dim:
        return placement
    strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(dim, **strided)


def zeros(param: Tensor, shape: Sequence[int], kept: Sequence[int | None], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of zeros, whose dimensions ``kept`` are a parameter's, as shared out to processes as that."""
    if not is_sharded(param):
        return torch.zeros(shape, dtype=dtype, device=param.device)
    memory = layout.local(param.detach())
    if not shape:  # each process has such numbers by itself, as it counts steps
        return torch.zeros((), dtype=dtype, device=memory.device)
    from torch.distributed.tensor import DTensor

    if param.device_mesh.get_coordinate() is None:
        own = memory.new_zeros(0, dtype=dtype)
    else:
        sizes = [size if dim is None else memory.shape[dim] for size, dim in zip(shape, kept, strict=True)]
        own = memory.new_zeros(sizes, dtype=dtype)
    strides = torch.empty(shape, device="meta").stride()
    placements = lines_placements(param, kept)
    return DTensor.from_local(
        own, param.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def element_map_of(param: Tensor, what: str) -> ElementMap:
    """Where the local memory of a parameter lies in the whole one, which ``what`` describes.

    Raises:
        ValueError: its elements are too scattered for an `ElementMap`.
    """
    if not is_sharded(param):
        return IDENTITY
    memory = layout.local(param.detach())
    strides, first = list(param.stride()), 0
    for dim, size in enumerate(param.shape):
        indices = _indices(param, dim, size)
        if memory.numel() == 0:
            return IDENTITY
        step = int(indices[1] - indices[0]) if len(indices) > 1 else 1
        if len(indices) != memory.shape[dim] or not torch.equal(
            indices, torch.arange(len(indices)) * step + indices[:1]
        ):
            raise _too_scattered(what)
        first += int(indices[0]) * strides[dim]
        strides[dim] *= step
    # From the fastest dimension on, as far as each continues where the last one ends.
    levels: list[tuple[int, int]] = []
    for _, size, stride in sorted((s, n, strides[d]) for d, (s, n) in enumerate(_dims(memory)) if n > 1):
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if levels and levels[0][1] != 1:
        levels.insert(0, (1, 1))
    if len(levels) <= 1:
        return ElementMap(first)
    if len(levels) > 3:
        raise _too_scattered(what)
    (run, _), (runs, stride), outer = levels[0], levels[1], (levels[2][1] if len(levels) > 2 else 0)
    return ElementMap(first, run, runs, stride, outer)


def keeps_rows(param: Tensor, size: int) -> bool:
    """Whether each ``size`` elements of a part, from a multiple of that on, are such ones of the whole tensor."""
    if not is_sharded(param):
        return False
    memory = layout.local(param.detach())
    return param.dim() > 0 and memory.is_contiguous() and param.shape[-1] % size == memory.shape[-1] % size == 0


def _dims(memory: Tensor) -> list[tuple[int, int]]:
    return list(zip(memory.stride(), memory.shape, strict=True))


def _indices(param: Any, dim: int, size: int) -> Tensor:
    """Which indices of a dimension this process has, in torch's own way to shard it."""
    indices = torch.arange(size)
    coordinate = param.device_mesh.get_coordinate()
    for mesh_dim, placement in enumerate(param.placements):
        if getattr(placement, "dim", None) != dim or coordinate is None:
            continue
        shaped = indices.reshape([1] * dim + [-1])
        chunks, _ = placement._split_tensor(shaped, param.device_mesh.size(mesh_dim), with_padding=False)
        indices = chunks[coordinate[mesh_dim]].reshape(-1)
    return indices


def _too_scattered(what: str) -> ValueError:
    return ValueError(
        "rounding='stochastic' does not support a parameter that is sharded so that its elements do not lie in runs at "
        f"equal distances ({what}): shard fewer of its dimensions"
    )
