"""The reference backend: each optimizer's own `update`, tensor by tensor, with torch operations on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import averages, codecs, layout, numerics, precision
from ..counts import count_of, counter_value
from ..precision import Form, Storage
from . import reference_reducing
from .base import Backend
from .plan import Call, Plan, Slot

if TYPE_CHECKING:
    from ..schedules.on_device import DeviceSchedules


class ReferencePlan(Plan):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.seen = [self._looks(slot) for slot in self.slots]

    @staticmethod
    def _looks(slot: Slot) -> list[tuple]:
        """What a plan is made for: a parameter that gets another dtype, for one, may get another form."""
        kept = [] if slot.storage is None else [slot.storage.companion, *slot.storage.scales]
        tensors = [slot.param, slot.step, slot.average, slot.copy, *slot.states, *kept]
        return [
            (t.shape, t.stride(), t.dtype, t.device, layout.has_memory(layout.local(t)))
            for t in tensors
            if t is not None
        ]

    def gather(self, grads: list[Tensor | None] | None = None) -> bool:
        """As in every plan; gradients that a step writes into are copied, since others may share their memory."""
        self.grads, self.given = [], grads
        sparse = []
        for index, slot in enumerate(self.slots):
            grad = self._grad_of(index, grads)
            if grad is not None and (
                slot.tensor is None
                or layout.overlaps_itself(layout.local(slot.tensor))
                or self._looks(slot) != self.seen[index]
            ):
                return False
            if grad is not None and grad.layout == torch.sparse_coo:
                sparse.append((index, grad))
                grad = None
            if self.grads_change and grad is not None:
                grad = layout.local(grad).detach().clone()
            self.grads.append(grad)
        self._take_rows(sparse)
        return True

    def grads_in_use(self) -> list[tuple[int, Tensor]]:
        return [(i, layout.local(grad)) for i, grad in enumerate(self.grads) if grad is not None]

    def grads_as_used(self) -> list[Tensor]:
        return [layout.local(grad) for grad in self.grads if grad is not None]

    def replace_grad(self, index: int, grad: Tensor) -> None:
        self.grads[index] = grad

    def foresee(self, hyper: tuple[float | Tensor, ...]) -> None:
        h = self._numbers(hyper)
        for step in {slot.step.item() for slot, grad in zip(self.slots, self.grads, strict=True) if grad is not None}:
            self.functions.prepare(h, int(step) + 1)

    def _numbers(self, hyper: tuple[float | Tensor, ...]) -> Any:
        return self.functions.Hyper(*map(float, hyper))

    @torch.inference_mode()  # in which inference tensors can be written, and any other one as always
    def step(self, call: Call) -> int:
        self._step_rows(call)
        grads, self.grads = self.grads, []
        skipped = call.skipped
        call = call._replace(hyper=self._numbers(call.hyper))
        for index, (slot, grad) in enumerate(zip(self.slots, grads, strict=True)):
            if grad is None:
                continue
            if not skipped:
                self.update(slot, grad, call)
            if self.writes_grads and self._own_grad(index) is not None:  # those of rows are their plan's
                self._leave_in(index, grad, skipped)
        self.given = None
        return 0

    def update(self, slot: Slot, stored_grad: Tensor, call: Call) -> None:
        """Update a parameter, and with ``write_grads`` the copy of its gradient."""
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
        step = count_of(slot.step) + 1
        slot.step.fill_(counter_value(step))
        rule = self.functions
        scalars = numerics.narrowed(rule.prepare(call.hyper, step), arithmetic)
        stored = Stored(slot, memory, arithmetic)
        places = [(k, name) for k, name in enumerate(self.states) if slot.states[k] is not None]
        states = {name: stored.state(k, slot.states[k]) for k, name in places}
        if rule.reduces:
            param, states = reference_reducing.update(rule, stored.weight(), grad, states, slot.matrices, scalars)
        else:
            has = rule.has(name in states for name in rule.state_names)
            param, *new = rule.update(stored.weight(), grad, *map(states.get, rule.state_names), scalars, has)
            states = dict(zip(rule.state_names, new, strict=True))
        stored.set_weight(param)
        followers = [None if tensor is None else real_memory(tensor) for tensor in (slot.average, slot.copy)]
        averages.follow(stored.followed(), *followers, self.average_weight)
        if layout.is_wrapper(slot.tensor):  # the copy was counted by the tensor inside
            torch.autograd.graph.increment_version(slot.tensor)
        for k, name in places:
            stored.set_state(k, slot.states[k], states[name])


class Stored:
    """A parameter and its states as a rule sees them: numbers in the arithmetic dtype."""

    def __init__(self, slot: Slot, memory: Tensor, arithmetic: torch.dtype) -> None:
        self.slot = slot
        self.memory = memory
        self.arithmetic = arithmetic
        self.storage = slot.storage or PLAIN_STORAGE
        self.companion = None if self.storage.companion is None else layout.local(self.storage.companion)

    def weight(self) -> Tensor:
        if self.companion is None:
            return self.memory.to(self.arithmetic)
        return precision.exact_weight(self.storage.form, self.memory, self.companion)

    def set_weight(self, weight: Tensor) -> None:
        memory, form = self.memory, self.storage.form
        if form is Form.SPLIT:
            narrowed, companion = codecs.split(weight)
        elif form is Form.KAHAN:
            narrowed, companion = codecs.compensate(weight, memory.dtype)
        elif form is Form.STOCHASTIC:
            step = count_of(self.slot.step)
            random = codecs.random_16(codecs.elements_of(memory), self.storage.seed, self.slot.index, step)
            narrowed, companion = codecs.narrow_stochastic(weight, memory.dtype, random), None
        else:
            narrowed, companion = weight, weight
        memory.copy_(narrowed)
        if self.companion is not None:
            self.companion.copy_(companion)

    def followed(self) -> Tensor:
        return self.weight() if self.storage.form in precision.EXACT_FORMS else self.memory

    def state(self, place: int, state: Tensor) -> Tensor:
        if self.storage.scales and self.storage.scales[place] is not None:
            return codecs.decode(state, self.storage.scales[place])
        return real_memory(state).to(self.arithmetic)

    def set_state(self, place: int, state: Tensor, value: Tensor) -> None:
        if not self.storage.scales or self.storage.scales[place] is None:
            real_memory(state).copy_(value)
            return
        codes, scales = codecs.encode(layout.laid_out_as(value, state), state.dtype == torch.int8)
        state.copy_(codes)
        self.storage.scales[place].copy_(scales)


PLAIN_STORAGE = Storage(Form.PLAIN, None, (), 0)


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

    def state_memory(self, state: Tensor, tensor: Tensor) -> Tensor | None:
        memory = layout.local(state)
        return None if layout.overlaps_itself(memory) or memory._is_zerotensor() else state

    def advance_schedules(self, schedules: DeviceSchedules, found_inf: Tensor | None) -> int:
        if found_inf is None or found_inf.item() == 0:
            schedules.set_count(schedules.count + 1)
        return 0

    def plan(self, *args) -> ReferencePlan:
        return ReferencePlan(self, *args)
