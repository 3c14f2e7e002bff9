"""The reference backend: each optimizer's own `update`, tensor by tensor, with torch operations on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layout
from .base import Backend
from .plan import Plan, Slot


class ReferencePlan(Plan):
    def gather(self) -> bool:
        self.grads = []
        for slot in self.slots:
            grad = self._grad_of(slot)
            if grad is not None and (
                slot.tensor is None
                or layout.overlaps_itself(layout.local(slot.param))
                or any(state.shape != slot.param.shape for state in slot.states)
            ):
                return False
            self.grads.append(grad)
        return True

    @torch.no_grad()
    def step(
        self, hyper: tuple[float | Tensor, ...], maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> int:
        grads, self.grads = self.grads, []
        if found_inf is not None and found_inf.item() != 0:
            return 0
        numbers = tuple(float(value) for value in hyper)
        for slot, grad in zip(self.slots, grads, strict=True):
            if grad is not None:
                self.update(slot, grad, numbers, maximize, grad_scale)
        return 0

    def update(
        self, slot: Slot, grad: Tensor, hyper: tuple[float, ...], maximize: bool, grad_scale: Tensor | None
    ) -> None:
        grad = layout.local(grad)
        if grad.is_complex():
            grad = torch.view_as_real(grad.resolve_conj())
        memory = real_memory(slot.param)
        arithmetic = torch.float64 if memory.dtype == torch.float64 else torch.float32
        grad = grad.to(arithmetic)
        if grad_scale is not None:
            grad = grad / grad_scale.to(grad.device, arithmetic)
        if maximize:
            grad = -grad
        slot.step.add_(1)
        scalars = self.optimizer.prepare(hyper, int(slot.step.item()))
        targets = [real_memory(state) for state in slot.states]
        states = [target.to(arithmetic) for target in targets]
        absent = [None] * (len(self.optimizer.state_names) - len(states))
        param, *states = self.optimizer.update(memory.to(arithmetic), grad, *states, *absent, scalars)
        memory.copy_(param)
        if layout.is_wrapper(slot.param):  # the copy was counted by the tensor inside
            torch.autograd.graph.increment_version(slot.param)
        for target, state in zip(targets, states, strict=False):
            target.copy_(state)


def real_memory(tensor: Tensor) -> Tensor:
    """A parameter's or state's memory as real numbers."""
    return layout.as_real(layout.local(tensor))


class ReferenceBackend(Backend):
    name = "reference"

    def reasons(self, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            return [f"{dtype} is not a floating or complex dtype"]
        return []

    def memory(self, param: Tensor) -> Tensor:
        return param

    def state_memory(self, state: Tensor, tensor: Tensor) -> Tensor:
        return state

    def plan(self, *args) -> ReferencePlan:
        return ReferencePlan(self, *args)
