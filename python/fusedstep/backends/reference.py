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
            if grad is not None and slot.tensor is None:
                return False
            self.grads.append(grad)
        return all(slot.tensor is None or same_memory(slot) for slot in self.slots)

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
        arithmetic = torch.float64 if slot.tensor.dtype == torch.float64 else torch.float32
        grad = grad.to(arithmetic)
        if grad_scale is not None:
            grad = grad / grad_scale.to(grad.device, arithmetic)
        if maximize:
            grad = -grad
        slot.step.add_(1)
        scalars = self.optimizer.prepare(hyper, int(slot.step.item()))
        states = [state.to(arithmetic) for state in slot.states]
        absent = [None] * (len(self.optimizer.state_names) - len(states))
        param, *states = self.optimizer.update(slot.tensor.to(arithmetic), grad, *states, *absent, scalars)
        slot.tensor.copy_(param)
        for target, state in zip(slot.states, states, strict=False):
            target.copy_(state)


def same_memory(slot: Slot) -> bool:
    """True if the parameter still lies where it did when the slot was made."""
    return layout.as_real(layout.local(slot.param.detach())).data_ptr() == slot.tensor.data_ptr()


class ReferenceBackend(Backend):
    name = "reference"

    def reasons(self, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            return [f"{dtype} is not a floating or complex dtype"]
        return []

    def memory(self, param: Tensor) -> Tensor:
        return layout.as_real(layout.local(param.detach()))

    def state_memory(self, state: Tensor, tensor: Tensor) -> Tensor:
        return layout.as_real(layout.local(state))

    def plan(self, *args) -> ReferencePlan:
        return ReferencePlan(self, *args)
