"""The reference backend: each optimizer's own `update`, tensor by tensor, with torch operations on any device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import codecs, layout, numerics
from ..counts import count_of, counter_value
from ..kept.ema import follow
from ..lines import Lines
from ..record import Record, Step
from . import reference_reducing
from .base import Backend
from .plan import Plan

if TYPE_CHECKING:
    from ..schedules.on_device import DeviceSchedules


class ReferencePlan(Plan):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.seen = [self._looks(record) for record in self.records]

    @staticmethod
    def _looks(record: Record) -> list[tuple]:
        """What a plan is made for: a parameter that gets another dtype, for one, may get another form."""
        kept = record.average, record.copy, record.aux, *record.scales
        tensors = [record.owner, record.step, *record.states, *kept]
        return [
            (t.shape, t.stride(), t.dtype, t.device, layout.has_memory(layout.local(t)))
            for t in tensors
            if t is not None
        ]

    def gather(self, grads: list[Tensor | None] | None = None) -> bool:
        """As in every plan; gradients that a step writes into are copied, since others may share their memory."""
        self.grads, self.given = [], grads
        sparse = []
        for index, record in enumerate(self.records):
            grad = self._grad_of(index, grads)
            if grad is not None and (
                record.param is None
                or layout.overlaps_itself(layout.local(record.param))
                or self._looks(record) != self.seen[index]
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
        updated = (record for record, grad in zip(self.records, self.grads, strict=True) if grad is not None)
        for count in {record.step.item() for record in updated}:
            self.functions.prepare(h, int(count) + 1)

    def _numbers(self, hyper: tuple[float | Tensor, ...]) -> Any:
        return self.functions.Hyper(*map(float, hyper))

    @torch.inference_mode()  # in which inference tensors can be written, and any other one as always
    def step(self, step: Step) -> int:
        self._step_rows(step)
        grads, self.grads = self.grads, []
        skipped = step.skipped
        step = step._replace(hyper=self._numbers(step.hyper))
        for index, (record, grad) in enumerate(zip(self.records, grads, strict=True)):
            if grad is None:
                continue
            if not skipped:
                self.update(record, grad, step)
            if self.writes_grads and self._own_grad(index) is not None:  # those of rows are their plan's
                self._leave_in(index, grad, skipped)
        self.given = None
        return 0

    def update(self, record: Record, stored_grad: Tensor, step: Step) -> None:
        """Update a parameter, and with ``write_grads`` the copy of its gradient."""
        used = Used(record, stored_grad, step)
        count = count_of(record.step) + 1
        rule, stored = self.functions, Stored(record, used.memory, used.arithmetic)
        scalars = numerics.narrowed(rule.prepare(step.hyper, count), used.arithmetic)
        record.step.fill_(counter_value(count))
        if rule.reduces:
            lines = Lines.of_matrices(record.matrices, used.memory.numel())
            reading = self.reading(stored)
            shape = record.matrices or (-1,)
            param, states = reference_reducing.alone(
                reference_reducing.updating(
                    rule, lines, lambda: stored.weight().reshape(shape), lambda: used().reshape(shape), reading, scalars
                )
            )
        else:
            states = {name: read() for name, read in self.reading(stored).items()}
            has = rule.has(name in states for name in rule.state_names)
            param, *new = rule.update(stored.weight(), used(), *map(states.get, rule.state_names), scalars, has)
            states = dict(zip(rule.state_names, new, strict=True))
        self.write_record(stored, used, param, states)

    def reading(self, stored: Stored) -> dict[str, Callable[[], Tensor]]:
        """What gives each state that a parameter has."""
        signed = {name: name not in self.functions.non_negative for name in self.states}
        present = (k for k, state in enumerate(stored.record.states) if state is not None)
        return {self.states[k]: functools.partial(stored.state, k, signed[self.states[k]]) for k in present}

    def write_record(self, stored: Stored, used: Used, param: Tensor, states: dict[str, Tensor]) -> None:
        """Store the new parameter and states, in whatever shapes they are, and with ``write_grads`` the gradient."""
        record = stored.record
        stored.set_weight(param.reshape(stored.memory.shape))
        followers = [None if tensor is None else real_memory(tensor) for tensor in (record.average, record.copy)]
        follow(stored.followed(), *followers, used.step.average_weight)
        if used.step.write_grads:
            used.write_grad()
        if layout.is_wrapper(record.param):  # the copy was counted by the tensor inside
            torch.autograd.graph.increment_version(record.param)
        for k, name in enumerate(self.states):
            if record.states[k] is not None:
                stored.set_state(k, name not in self.functions.non_negative, states[name])


class Used:
    """The gradient of a parameter as its rule takes it: made anew from the stored one each time."""

    def __init__(self, record: Record, stored: Tensor, step: Step) -> None:
        self.stored, self.step = layout.local(stored), step
        self.memory = real_memory(record.param)
        self.arithmetic = torch.float64 if self.memory.dtype == torch.float64 else torch.float32

    def _clipped(self) -> Tensor:
        grad, step = self.stored, self.step
        if grad.is_complex():
            grad = torch.view_as_real(grad.resolve_conj())
        grad = grad.to(self.arithmetic)
        if step.grad_scale is not None:
            grad = grad / step.grad_scale.to(grad.device, self.arithmetic)
        if step.coefficient is not None:
            grad = grad * step.coefficient.to(grad.device, self.arithmetic)
        return grad

    def __call__(self) -> Tensor:
        grad = self._clipped()
        return -grad if self.step.maximize else grad

    def write_grad(self) -> None:
        grad = self._clipped()
        self.stored.copy_(torch.view_as_complex(grad) if self.stored.is_complex() else grad)


class Stored:
    """A parameter and its states as a rule sees them: numbers in the arithmetic dtype."""

    def __init__(self, record: Record, memory: Tensor, arithmetic: torch.dtype) -> None:
        self.record = record
        self.memory = memory
        self.arithmetic = arithmetic
        self.aux = None if record.aux is None else layout.local(record.aux)

    def weight(self) -> Tensor:
        if self.aux is None:
            return self.memory.to(self.arithmetic)
        return self.record.weight_format.join(self.memory, self.aux)

    def set_weight(self, weight: Tensor) -> None:
        record, memory, random = self.record, self.memory, None
        if record.weight_format.is_random:
            elements = record.element_map.elements(codecs.elements_of(memory))
            random = codecs.random_16(elements, record.seed, record.index, count_of(record.step))
        narrowed, aux = record.weight_format.split(weight, memory.dtype, random)
        memory.copy_(narrowed)
        if self.aux is not None:
            self.aux.copy_(aux)

    def followed(self) -> Tensor:
        return self.weight() if self.record.weight_format.is_exact else self.memory

    def state(self, index: int, signed: bool) -> Tensor:
        state, scales = self._stored_state(index)
        if scales is None:
            return real_memory(state).to(self.arithmetic)
        return codecs.dequantize(state, scales, codecs.quantizer_of(state, self.memory), signed, self.memory)

    def set_state(self, index: int, signed: bool, value: Tensor) -> None:
        state, scales = self._stored_state(index)
        if scales is None:
            memory = real_memory(state)
            memory.copy_(value.reshape(memory.shape))
            return
        quantizer = codecs.quantizer_of(state, self.memory)
        wide = torch.empty_strided(value.shape, codecs.strides_of(state, quantizer, value), device=value.device)
        codes, fresh = codecs.quantize(wide.copy_(value), quantizer, signed)
        state.copy_(codes)
        scales.copy_(fresh)

    def _stored_state(self, index: int) -> tuple[Tensor, Tensor | None]:
        return self.record.states[index], self.record.scales[index] if self.record.scales else None


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
