"""The reference backend: each optimizer's own `update`, tensor by tensor, with torch operations on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import averages, layout
from .base import Backend
from .plan import Call, Plan, Slot

if TYPE_CHECKING:
    from ..schedules.on_device import DeviceSchedules


class ReferencePlan(Plan):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.shapes = [self._shapes(slot) for slot in self.slots]

    @staticmethod
    def _shapes(slot: Slot) -> list[torch.Size]:
        return [slot.param.shape, *(state.shape for state in slot.states if state is not None)]

    def gather(self, grads: list[Tensor | None] | None = None) -> bool:
        self.grads, self.given = [], grads
        sparse = []
        for index, slot in enumerate(self.slots):
            grad = self._grad_of(index, grads)
            if grad is not None and (
                slot.tensor is None
                or layout.overlaps_itself(layout.local(slot.tensor))
                or self._shapes(slot) != self.shapes[index]
            ):
                return False
            if grad is not None and grad.layout == torch.sparse_coo:
                sparse.append((index, grad))
                grad = None
            self.grads.append(grad)
        self._take_rows(sparse)
        return True

    def grads_in_use(self) -> list[tuple[int, Tensor]]:
        return [(i, layout.local(grad)) for i, grad in enumerate(self.grads) if grad is not None]

    def grads_as_used(self) -> list[Tensor]:
        return [layout.local(grad) for grad in self.grads if grad is not None]

    def replace_grad(self, index: int, grad: Tensor) -> None:
        self.grads[index] = grad

    @torch.no_grad()
    def step(self, call: Call) -> int:
        self._step_rows(call)
        grads, self.grads = self.grads, []
        skipped = call.skipped
        numbers = tuple(float(value) for value in call.hyper)
        for index, (slot, grad) in enumerate(zip(self.slots, grads, strict=True)):
            if grad is None:
                continue
            if not skipped:
                self.update(slot, grad, call._replace(hyper=numbers))
            if self.zero_grads:
                grad.zero_()
            own = self._own_grad(index)
            if own is not None and own is not grad:  # those of rows are their plan's
                self._leave_in(own, grad, skipped)
        self.given = None
        return 0

    def update(self, slot: Slot, stored_grad: Tensor, call: Call) -> None:
        grad = layout.local(stored_grad)
        if grad.is_complex():
            grad = torch.view_as_real(grad.resolve_conj())
        memory = real_memory(slot.tensor)
        arithmetic = torch.float64 if memory.dtype == torch.float64 else torch.float32
        grad = grad.to(arithmetic)
        if call.grad_scale is not None:
            grad = grad / call.grad_scale.to(grad.device, arithmetic)
        if call.coefficient is not None:
            grad = grad * call.coefficient.to(grad.device, arithmetic)
        if self.write_grads:
            stored = layout.local(stored_grad)
            stored.copy_(torch.view_as_complex(grad) if stored.is_complex() else grad)
        if call.maximize:
            grad = -grad
        slot.step.add_(1)
        scalars = self.optimizer.prepare(call.hyper, int(slot.step.item()))
        states = zip(self.states, slot.states, strict=True)
        targets = {name: real_memory(state) for name, state in states if state is not None}
        states = [targets[n].to(arithmetic) if n in targets else None for n in self.optimizer.state_names]
        param, *states = self.optimizer.update(memory.to(arithmetic), grad, *states, scalars)
        memory.copy_(param)
        followers = [None if tensor is None else real_memory(tensor) for tensor in (slot.average, slot.copy)]
        averages.follow(memory, *followers, self.average_weight)
        if layout.is_wrapper(slot.tensor):  # the copy was counted by the tensor inside
            torch.autograd.graph.increment_version(slot.tensor)
        for name, state in zip(self.optimizer.state_names, states, strict=True):
            if name in targets:
                targets[name].copy_(state)


def real_memory(tensor: Tensor) -> Tensor:
    """A parameter's or state's memory as real numbers."""
    return layout.as_real(layout.local(tensor))


class ReferenceBackend(Backend):
    name = "reference"

    def reasons(self, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            return [f"{dtype} is not a floating or complex dtype"]
        return []

    def memory(self, param: Tensor, contiguous: bool = False) -> Tensor:
        return param

    def state_memory(self, state: Tensor, tensor: Tensor) -> Tensor:
        return state

    def advance_schedules(self, schedules: DeviceSchedules, found_inf: Tensor | None) -> int:
        if found_inf is None or found_inf.item() == 0:
            schedules.set_count(schedules.count + 1)
        return 0

    def plan(self, *args) -> ReferencePlan:
        return ReferencePlan(self, *args)
