"""Plans: the tensors of one group on one device, ready for a kernel call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, layout

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer
    from . import Backend


class Slot(NamedTuple):
    """A parameter's place in a plan."""

    index: int  # among all parameters of the optimizer
    name: str | None
    param: Tensor  # whose gradient is read
    tensor: Tensor | None  # the memory to update; None: no gradient so far, hence no state
    step: Tensor | None
    states: tuple[Tensor, ...]


class Plan:
    """What every backend's plan has; `gather` and `step` are the backend's."""

    def __init__(
        self,
        backend: Backend,
        optimizer: type[FusedOptimizer],
        group: int,
        states: tuple[str, ...],
        slots: list[Slot],
    ) -> None:
        self.backend = backend
        self.optimizer = optimizer
        self.group = group
        self.states = states
        self.slots = slots

    def gather(self) -> bool:
        """Read and check this step's gradients; False if the plan no longer fits and must be built anew."""
        raise NotImplementedError

    def step(
        self, hyper: tuple[float | Tensor, ...], maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> int:
        """Update the parameters whose gradients `gather` found; returns the number of kernel calls."""
        raise NotImplementedError

    def _grad_of(self, slot: Slot) -> Tensor | None:
        grad = slot.param.grad
        if grad is not None:
            what = checks.describe(slot.index, slot.name, slot.param)
            checks.check_grad(self.optimizer.__name__, slot.param, grad, what)
        return grad


class KernelPlan(Plan):
    """A plan for a kernel that takes addresses of flat memory; what is not flat is staged through dense copies."""

    borrows_grads = False  # whether `launch` keeps the interpreter lock while the kernel is called

    def __init__(self, backend: Backend, optimizer: type[FusedOptimizer], group: int, states: Any, slots: Any) -> None:
        super().__init__(backend, optimizer, group, states, slots)
        from .. import _C

        self.native = _C.Plan(
            optimizer.rule,
            len(states),
            [slot.param for slot in slots],
            [slot.tensor for slot in slots],
            [slot.step for slot in slots],
            [slot.states for slot in slots],
        )
        self.stand_ins = [
            (i, slot)
            for i, slot in enumerate(slots)
            if slot.tensor is not None and slot.tensor is not layout.local(slot.param)
        ]
        self.wrappers = [(i, slot.param) for i, slot in enumerate(slots) if layout.is_wrapper(slot.param)]
        # The compiled plan sees the memory that it updates; whether that still stands for the parameter is seen here.
        apart = [slot.param for _, slot in self.stand_ins] + [param for _, param in self.wrappers]
        self.places = [(param, layout.place(layout.local(param))) for param in apart]

    def gather(self) -> bool:
        moved = any(layout.place(layout.local(param)) != place for param, place in self.places)
        if moved or not self.native.gather(self.borrows_grads):
            self.native.release_grads()
            return False
        for i in self.native.odd_grads():
            slot = self.slots[i]
            try:
                grad = layout.local(self._grad_of(slot))
                known = grad.dtype in checks.ARITHMETIC_DTYPES
                if not known or layout.is_lazy(grad) or not layout.same_layout(grad, slot.tensor):
                    grad = layout.laid_out_as(grad, slot.tensor, None if known else torch.float32)
                self.native.set_grad(i, grad)
            except BaseException:
                self.native.release_grads()
                raise
        return True

    def step(
        self, hyper: tuple[float | Tensor, ...], maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> int:
        if not self.native.any_active():
            return 0
        if not self.stand_ins and not self.wrappers:
            return self.launch(hyper, maximize, grad_scale, found_inf)
        active = set(self.native.active())
        staged = [slot for i, slot in self.stand_ins if i in active]
        with torch.no_grad():
            for slot in staged:
                slot.tensor.copy_(layout.local(slot.param))
            calls = self.launch(hyper, maximize, grad_scale, found_inf)
            for slot in staged:
                layout.local(slot.param).copy_(slot.tensor)
        torch.autograd.graph.increment_version([param for i, param in self.wrappers if i in active])
        return calls

    def launch(
        self, hyper: tuple[float | Tensor, ...], maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> int:
        """Call the kernel on what `gather` found; returns the number of calls."""
        raise NotImplementedError
