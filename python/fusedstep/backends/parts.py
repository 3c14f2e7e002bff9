"""Parameters whose sums cross processes: their steps are made in passes, between which the processes add up."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import layout, numerics
from ..counts import count_of, counter_value
from ..lines import Lines
from ..record import Step
from . import reference_reducing
from .base import Backend
from .cpu import CpuBackend, CpuPlan
from .cuda import CudaBackend, CudaPlan
from .native import _C
from .plan import Plan
from .reference import ReferenceBackend, ReferencePlan, Stored, Used


class Passes(Protocol):
    """A step of some records, between `Plan.gather` and `Plan.step`, which does what is left to do."""

    def begin(self, step: Step, lines: Mapping[int, Lines]) -> dict[int, list[Tensor]]:
        """The sums of the first pass, in float64, of each record that takes part.

        They are listed as `Lines.passes` says; the caller puts those over whole tensors in their place. Nothing is
        written, and all can be begun anew.
        """

    def advance(self, found_inf: Tensor | None) -> dict[int, list[Tensor]]:
        """The same of the next pass; states may be written, unless ``found_inf`` says that the step is skipped."""

    def write(self) -> None:
        """After three passes: write the new parameters and states, or leave that to `Plan.step`."""


def wholes_of(lines: Mapping[int, Lines], count: int) -> list[tuple[int, int, int]]:
    """Rows, columns and elements of the tensors of which a plan's records are parts, as the engines take them."""
    known = (lines[index] for index in range(count))
    return [
        (0, 0, each.tensor.count) if each.is_flat else (each.column.count, each.row.count, each.tensor.count)
        for each in known
    ]


class PartsPlan(ReferencePlan):
    """With torch's operations, on any device."""

    host_decides = True  # whether the host must know if a step is skipped before it is gone on with

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counts: list[int] = []  # updates so far, of each record
        self.scalars: dict[int, Any] = {}  # of this step, by such a count
        self.updates: dict[int, Generator[list[Tensor], list[Tensor], None]] = {}
        self.asked: dict[int, list[Tensor]] = {}

    def foresee(self, hyper: tuple[float | Tensor, ...]) -> None:
        counters = [record.step for record in self.records if record.step is not None]
        # Of a GPU all are asked for at once.
        values = iter(torch.stack(counters).tolist() if counters else ())
        self.counts = [0 if record.step is None else count_of(next(values)) for record in self.records]
        h = self._numbers(hyper)
        active = {n for n, grad in zip(self.counts, self.grads, strict=True) if grad is not None}
        self.scalars = {count: self.functions.prepare(h, count + 1) for count in active}

    def begin(self, step: Step, lines: Mapping[int, Lines]) -> dict[int, list[Tensor]]:
        self.updates = {
            index: self._update(index, lines[index], step) for index, grad in enumerate(self.grads) if grad is not None
        }
        self.asked = {index: next(update) for index, update in self.updates.items()}
        return self.asked

    def advance(self, found_inf: Tensor | None) -> dict[int, list[Tensor]]:
        self.asked = {index: update.send(self.asked[index]) for index, update in self.updates.items()}
        return self.asked

    def write(self) -> None:
        for index, update in self.updates.items():
            with contextlib.suppress(StopIteration):
                update.send(self.asked[index])
        self.updates, self.asked = {}, {}

    def _update(self, index: int, lines: Lines, step: Step) -> Generator[list[Tensor], list[Tensor], None]:
        record, count = self.records[index], self.counts[index]
        used = Used(record, self.grads[index], step)
        scalars = numerics.narrowed(self.scalars[count], used.arithmetic)
        stored = Stored(record, used.memory, used.arithmetic)
        param, states = yield from reference_reducing.updating(
            self.functions, lines, stored.weight, used, self.reading(stored), scalars
        )
        record.step.fill_(counter_value(count + 1))
        self.write_record(stored, used, param, states)

    @torch.inference_mode()
    def step(self, step: Step) -> int:
        grads, self.grads = self.grads, []
        for index, grad in enumerate(grads):
            if grad is not None and self.writes_grads and self._own_grad(index) is not None:
                self._leave_in(index, grad, step.skipped)
        self.given = None
        return 0


class CpuPartsPlan(CpuPlan):
    """The phases of the compiled CPU engine, one pass after the other."""

    borrows_grads = False  # the interpreter runs between the passes
    steps_at_once = False
    host_decides = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stages: Any = None
        self.buffers: tuple[tuple[int, ...], list[Tensor], list[dict[int, list[Tensor]]]] | None = None
        self.number = 0

    def begin(self, step: Step, lines: Mapping[int, Lines]) -> dict[int, list[Tensor]]:
        active = tuple(self.native.active())
        if not active:
            return {}
        if self.buffers is None or self.buffers[0] != active:
            self.buffers = (active, *self._made(active, lines))
        wholes = wholes_of(lines, len(self.records))
        self.stages = _C.CpuParts(self.native, step, wholes, torch.get_num_threads())
        self.number = -1
        return self.advance(None)

    def _made(
        self, active: tuple[int, ...], lines: Mapping[int, Lines]
    ) -> tuple[list[Tensor], list[dict[int, list[Tensor]]]]:
        """For each pass the memory of all sums, and which are whose."""
        passes = {index: lines[index].passes(self.functions) for index in active}
        buffers, views = [], []
        for number in range(3):
            sizes = {i: [each.lines(self.records[i].param.shape) for each in passes[i][number]] for i in active}
            buffer = torch.zeros(sum(map(sum, sizes.values())), dtype=torch.float64)
            pieces = iter(buffer.split([size for each in sizes.values() for size in each]) if len(buffer) else ())
            buffers.append(buffer)
            views.append({i: [next(pieces) if len(buffer) else buffer for _ in sizes[i]] for i in active})
        return buffers, views

    def advance(self, found_inf: Tensor | None) -> dict[int, list[Tensor]]:
        if self.stages is None:
            return {}
        self.number += 1
        _, buffers, views = self.buffers
        self.stages.run(self.number, buffers[self.number].data_ptr(), len(buffers[self.number]))
        return views[self.number]

    def write(self) -> None:
        if self.stages is not None:
            self.stages.run(3, 0, 0)

    def launch(self, step: Step) -> int:
        self.stages = None
        if step.skipped:
            return super().launch(step)
        self.native.increment_written(step.zero_grads or step.write_grads)
        self.native.release_grads()
        return 1


class CudaPartsPlan(CudaPlan):
    """The stages of the CUDA engine: a few launches each for all parts. The host waits for none of them."""

    borrows_grads = False
    host_decides = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.wholes: list[tuple[int, int, int]] = []
        self.numbers: list[Tensor] = []  # of each stage, the sums of all records
        self.views: list[list[list[Tensor]]] = []  # and those of each
        self.number = 0
        self.begun: Step | None = None  # on the device
        self.active: list[int] = []  # which take part in it
        self.calls = 0  # of kernels, for it

    def begin(self, step: Step, lines: Mapping[int, Lines]) -> dict[int, list[Tensor]]:
        self.begun, self.active = None, self.native.active()
        if not self.active:
            return {}
        self.wholes = wholes_of(lines, len(self.records))
        self.upload_if_changed()
        self.begun, self.number, self.calls = self.on_device(step), 0, 0
        self._run(self.begun)
        return self._sums()

    def advance(self, found_inf: Tensor | None) -> dict[int, list[Tensor]]:
        if self.begun is None:
            return {}
        self.number += 1
        self._run(self.begun._replace(found_inf=self.flag(found_inf)))
        return self._sums()

    def write(self) -> None:
        self.begun = None

    def launch(self, step: Step) -> int:
        self.number = 3
        self._run(self.on_device(step))
        return self.calls

    def _run(self, step: Step) -> None:
        addresses = [numbers.data_ptr() for numbers in self.numbers]
        given = self.memory.data_ptr(), self.work.data_ptr(), addresses, self.number
        self.calls += _C.cuda_stage(self.native, self.table, *given, step)

    def _sums(self) -> dict[int, list[Tensor]]:
        return {index: self.views[self.number][index] for index in self.active}

    def new_table(self) -> Any:
        table = _C.CudaTable(self.native, _C.cuda_multiprocessors(self.device.index), self.wholes)
        self.lay_out(table.sums)
        return table

    def lay_out(self, sums: list[list[list[int]]]) -> None:
        """Make the memory for the sums of each stage, given the sizes of those of each record."""
        self.numbers, self.views = [], []
        for sizes in sums:
            flat = [size for each in sizes for size in each]
            numbers = torch.zeros(sum(flat), dtype=torch.float64, device=self.device)
            pieces = iter(numbers.split(flat) if flat else ())
            self.numbers.append(numbers)
            self.views.append([[next(pieces) for _ in each] for each in sizes])

    def used_memory(self) -> list[Tensor]:
        return [self.memory, self.work, *self.numbers]


class PartsBackend(ReferenceBackend):
    def plan(self, *args: Any) -> PartsPlan:
        return PartsPlan(self, *args)


class CpuPartsBackend(CpuBackend):
    def plan(self, *args: Any) -> CpuPartsPlan:
        return CpuPartsPlan(self, *args)


class CudaPartsBackend(CudaBackend):
    def plan(self, *args: Any) -> CudaPartsPlan:
        return CudaPartsPlan(self, *args)


# Chosen by no name, but in the place of the backend that is.
PARTS, CPU_PARTS, CUDA_PARTS = PartsBackend(), CpuPartsBackend(), CudaPartsBackend()


def backend_of_parts(chosen: Backend, param: Tensor) -> Backend:
    """What takes the place of a backend: its passes where there are some, else torch's operations.

    Triton has none of its own: those of the CUDA engine are taken, if that can run there.
    """
    own = {"cpu": CPU_PARTS, "cuda": CUDA_PARTS, "triton": CUDA_PARTS}.get(chosen.name, PARTS)
    if chosen.name == "triton" and own.reasons(param.device):
        return PARTS
    return own if chosen.memory(param, contiguous=True) is layout.local(param) else PARTS


def has_parts(plan: Plan) -> bool:
    """Whether the steps of a plan are made in passes."""
    return isinstance(plan, (PartsPlan, CpuPartsPlan, CudaPartsPlan))
