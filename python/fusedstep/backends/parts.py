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
from .reference import ReferenceBackend, ReferencePlan, Stored, Used


class Passes(Protocol):
    """A step of some records, between `Plan.gather` and `Plan.step`, which does what is left to do."""

    def begin(self, step: Step, lines: Mapping[int, Lines]) -> dict[int, list[Tensor]]:
        """The sums of the first pass, in float64, of each record that takes part.

        They are listed as `Lines.passes` says; the caller puts those over whole tensors in their place. Nothing is
        written, and all can be begun anew.
        """

    def advance(self) -> dict[int, list[Tensor]]:
        """The same of the next pass."""

    def write(self) -> None:
        """After three passes: write the new parameters and states."""


class PartsPlan(ReferencePlan):
    """With torch's operations, on any device."""

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

    def advance(self) -> dict[int, list[Tensor]]:
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

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stages: Any = None
        self.buffers: tuple[tuple[int, ...], list[Tensor], list[dict[int, list[Tensor]]]] | None = None
        self.number = 0

    def begin(self, step: Step, lines: Mapping[int, Lines]) -> dict[int, list[Tensor]]:
        from .. import _C

        active = tuple(self.native.active())
        if not active:
            return {}
        if self.buffers is None or self.buffers[0] != active:
            self.buffers = (active, *self._made(active, lines))
        self.stages = _C.CpuParts(self.native, step, self._wholes(lines), torch.get_num_threads())
        self.number = -1
        return self.advance()

    def _wholes(self, lines: Mapping[int, Lines]) -> list[tuple[int, int, int]]:
        known = (lines[index] for index in range(len(self.records)))
        return [
            (0, 0, each.tensor.count) if each.is_flat else (each.column.count, each.row.count, each.tensor.count)
            for each in known
        ]

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

    def advance(self) -> dict[int, list[Tensor]]:
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


class PartsBackend(ReferenceBackend):
    def plan(self, *args: Any) -> PartsPlan:
        return PartsPlan(self, *args)


class CpuPartsBackend(CpuBackend):
    def plan(self, *args: Any) -> CpuPartsPlan:
        return CpuPartsPlan(self, *args)


# Chosen by no name, but in the place of the backend that is.
PARTS, CPU_PARTS = PartsBackend(), CpuPartsBackend()


def backend_of_parts(chosen: Backend, param: Tensor) -> Backend:
    """What takes the place of a backend: its passes where there are some, else torch's operations."""
    if chosen.name == "cpu" and chosen.memory(param, contiguous=True) is layout.local(param):
        return CPU_PARTS
    return PARTS
