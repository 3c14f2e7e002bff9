"""Parameters whose sums cross processes: the reference's step, in passes between which the processes add up."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from .. import layout, numerics
from ..counts import count_of, counter_value
from ..lines import Lines
from ..record import Step
from . import reference_reducing
from .reference import ReferenceBackend, ReferencePlan, Stored, Used


class PartsPlan(ReferencePlan):
    """`fusedstep.shared_sums` takes the parameters through the passes; `step` is what is left to do after them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counts: list[int] = []  # updates so far, of each record
        self.scalars: dict[int, Any] = {}  # of this step, by such a count

    def foresee(self, hyper: tuple[float | Tensor, ...]) -> None:
        counters = [record.step for record in self.records if record.step is not None]
        # Of a GPU all are asked for at once.
        values = iter(torch.stack(counters).tolist() if counters else ())
        self.counts = [0 if record.step is None else count_of(next(values)) for record in self.records]
        h = self._numbers(hyper)
        active = {n for n, grad in zip(self.counts, self.grads, strict=True) if grad is not None}
        self.scalars = {count: self.functions.prepare(h, count + 1) for count in active}

    def start(self, index: int, lines: Lines, step: Step) -> Generator[list[Tensor], list[Tensor], None]:
        """The update of a record: gives its sums of each pass, gets those of whole tensors, and writes in the end."""
        record, grad, count = self.records[index], self.grads[index], self.counts[index]
        used = Used(record, torch.zeros_like(layout.local(record.owner)) if grad is None else grad, step)
        if count not in self.scalars:
            self.scalars[count] = self.functions.prepare(self._numbers(step.hyper), count + 1)
        scalars = numerics.narrowed(self.scalars[count], used.arithmetic)
        stored = Stored(record, used.memory, used.arithmetic)
        param, states = yield from reference_reducing.updating(
            self.functions, lines, stored.weight, used, self.reading(stored), scalars
        )
        record.step.fill_(counter_value(count + 1))
        self.write(stored, used, param, states)

    @torch.inference_mode()
    def step(self, step: Step) -> int:
        grads, self.grads = self.grads, []
        for index, grad in enumerate(grads):
            if grad is not None and self.writes_grads and self._own_grad(index) is not None:
                self._leave_in(index, grad, step.skipped)
        self.given = None
        return 0


class PartsBackend(ReferenceBackend):
    """Chosen by no name: whatever the backend is, such parameters are updated so."""

    def plan(self, *args: Any) -> PartsPlan:
        return PartsPlan(self, *args)


PARTS = PartsBackend()
