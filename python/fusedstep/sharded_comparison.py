"""What a process of sharded training compares with the training of one process, for one configuration."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import layout, shards
from .cases import Case
from .codecs import QUANTIZERS

TOLERANCE = 1e-6  # of the largest number of a part
INFINITY, SAVED, MODEL = (
    "an infinity in the last process",
    "saved and loaded into other parts",
    "fully_shard of a model",
)
BLOCKS = 512  # so many columns that the blocks of a quantized state lie in one row


@dataclass(frozen=True)
class Row:
    """What was found for one configuration, in all processes."""

    case: str
    dtype: str
    exact: bool  # whether each bit must be the same
    tensors: int  # parts of parameters and states
    different: int
    max_difference: float  # relative to the largest number of the part
    ok: bool
    error: str = ""


@dataclass(frozen=True)
class Configuration:
    """An optimizer to be tried, and how."""

    case: Case
    dtype: str = "fp32"
    exact: bool = True
    what: str = ""  # besides steps

    def __str__(self) -> str:
        return f"{self.what}{', ' if self.what else ''}{self.case}"


class Comparison:
    """Optimizers of parts and of whole tensors, which get the same gradients."""

    def __init__(
        self, configuration: Configuration, device: torch.device, backend: str | None, processes: int, folder: str
    ) -> None:
        from .verification import DTYPES

        self.configuration, self.device, self.processes, self.folder = configuration, device, processes, folder
        self.backend = backend
        self.dtype = DTYPES[configuration.dtype]
        self.generator = torch.Generator().manual_seed(1)
        self._make()

    def _make(self) -> None:
        quantized = self.configuration.case.options.get("state_dtype") in QUANTIZERS
        self.ways = [way for way in ways(self.processes, self.device.type) if not quantized or way[0][-1] == BLOCKS]
        self.whole = [torch.nn.Parameter(self._random(shape)) for shape, *_ in self.ways]
        self.expected = self._optimizer(self.whole)
        self.parts, self.mine = self._of_parts()

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def _optimizer(self, params: list[Tensor]) -> Any:
        from . import __dict__ as exported

        case = self.configuration.case
        return exported[case.optimizer](params, backend=self.backend, **case.options)

    def _of_parts(self) -> tuple[list[Tensor], Any]:
        parts = [torch.nn.Parameter(self.part(i, value.detach())) for i, value in enumerate(self.whole)]
        return parts, self._optimizer(parts)

    def part(self, index: int, value: Tensor) -> Tensor:
        """This process's part of a whole tensor that is like a parameter."""
        from torch.distributed.tensor import distribute_tensor

        _, mesh, placements = self.ways[index]
        return value.clone() if mesh is None else distribute_tensor(value.clone(), mesh, placements, src_data_rank=None)

    def step(self, odd: bool) -> None:
        """One of both; ``odd``: with an infinity in the last row of the last process."""
        for index, (whole, part) in enumerate(zip(self.whole, self.parts, strict=True)):
            grad = self._random(tuple(whole.shape))
            if odd and index == 0:
                grad[-1] = math.inf
            whole.grad, part.grad = grad.clone(), self.part(index, grad)
        self.expected.step()
        self.mine.step()

    def row(self, steps: int) -> Row:
        import torch.distributed as dist

        for number in range(steps):
            self.step(odd=self.configuration.what == INFINITY and number == steps // 2)
        if self.configuration.what == SAVED:
            self._reload()
            self.step(odd=False)
        found = torch.tensor([*self._compared()], dtype=torch.float64, device=self.device)
        totals, largest = found[:2].clone(), found[2].clone()
        dist.all_reduce(totals)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        tensors, different = (int(number) for number in totals.tolist())
        exact, difference = self.configuration.exact, largest.item()
        ok = different == 0 if exact else difference <= TOLERANCE
        return Row(str(self.configuration), self.configuration.dtype, exact, tensors, different, difference, ok)

    def _reload(self) -> None:
        """Go on with an optimizer of other parts that has loaded what this one has saved."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        where = f"{self.folder}/checkpoint"
        dcp.save(self._checkpoint(), checkpoint_id=where)
        self.ways = [(shape, mesh, _others(placements)) for shape, mesh, placements in self.ways]
        self.parts, self.mine = self._of_parts()
        for part in self.parts:
            layout.zero(part.detach())
        loaded = self._checkpoint()
        dcp.load(loaded, checkpoint_id=where)
        model = _Model(self.parts)
        model.load_state_dict(loaded["model"])
        set_optimizer_state_dict(model, self.mine, loaded["optimizer"])

    def _checkpoint(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        model = _Model(self.parts)
        return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, self.mine)}

    def _compared(self) -> tuple[int, int, float]:
        """Of parts in this process: how many, how many that differ, and the largest relative difference."""
        from .verification import same_bits

        tensors = different = 0
        largest = 0.0
        for part, expected in self._pairs():
            part, expected = layout.local(part.detach()), layout.local(expected.detach())
            tensors += 1
            if part.shape != expected.shape or part.dtype != expected.dtype:
                return tensors, different + 1, math.inf
            if not same_bits(part, expected):
                different += 1
                size = expected.double().abs().max().item()
                difference = (part.double() - expected.double()).abs().max().item() / (size or 1.0)
                largest = max(largest, difference if math.isfinite(difference) else math.inf)
        return tensors, different, largest

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each part of a parameter and state with what it must be; codes of a part are seen by what they do to it."""
        for index, (part, whole) in enumerate(zip(self.parts, self.whole, strict=True)):
            yield part, self.part(index, whole.detach())
            state, expected = self.mine.state.get(part, {}), self.expected.state.get(whole, {})
            for key, value in expected.items():
                if not isinstance(value, Tensor):
                    continue
                if shards.is_sharded(state[key]):
                    yield state[key], _placed_as(state[key], value)
                elif state[key].shape == value.shape:
                    yield state[key], value


def _placed_as(part: Tensor, value: Tensor) -> Tensor:
    """A whole tensor as the DTensor that ``part`` is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.clone(), part.device_mesh, part.placements, src_data_rank=None)


class ModelComparison(Comparison):
    """A model that `fully_shard` has shared out, whose gradients all processes take the mean of."""

    def _make(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(6, 11), torch.nn.Tanh(), torch.nn.Linear(11, 5))
        self.models = [copy.deepcopy(model).to(self.device), copy.deepcopy(model).to(self.device)]
        mesh = init_device_mesh(self.device.type, (self.processes,))
        for layer in (self.models[1][0], self.models[1]):
            fully_shard(layer, mesh=mesh)
        self.whole, self.parts = ([*model.parameters()] for model in self.models)
        self.expected, self.mine = self._optimizer(self.whole), self._optimizer(self.parts)
        self.ways = [(part.shape, part.device_mesh, part.placements) for part in self.parts]

    def step(self, odd: bool) -> None:
        data = self._random((7, 6))  # the same in all processes, so that the mean is that of one
        for model, optimizer in zip(self.models, (self.expected, self.mine), strict=True):
            model(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


class _Model(torch.nn.Module):
    """The parameters by names."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        for index, param in enumerate(params):
            self.register_parameter(f"p{index}", param)


def ways(processes: int, device: str) -> list[tuple[tuple[int, ...], Any, Any]]:
    """Shapes, each with the mesh and the placements by which a tensor is shared out; None: it is not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    n = processes
    line = init_device_mesh(device, (n,))
    found = [
        ((2 * n + 1, 5), line, [Shard(0)]),
        ((4 * n + 3,), line, [Shard(0)]),
        ((1, 33), line, [Shard(0)]),
        ((3, 2 * n + 1), line, [Shard(1)]),
        ((7, 3), line, [Replicate()]),
        ((4 * n, BLOCKS), line, [Shard(0)]),
        ((5, 3), None, []),
    ]
    if n >= 4 and n % 2 == 0:
        square = init_device_mesh(device, (2, n // 2))
        found += [
            ((2 * n + 1, 6), square, [Replicate(), Shard(0)]),
            ((4 * n, 3 * n), square, [Shard(0), Shard(1)]),
            ((4 * n, BLOCKS), square, [Shard(0), Replicate()]),
        ]
    return found


def _others(placements: Sequence[Any]) -> list[Any]:
    """Other ones: rows instead of copies, copies instead of rows and columns."""
    from torch.distributed.tensor import Replicate, Shard

    return [Shard(0) if placement.is_replicate() else Replicate() for placement in placements]


# The command.
