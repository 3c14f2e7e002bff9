"""Plans: the tensors of one group on one device, ready for a kernel call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, layout

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer
    from ..precision import Storage
    from . import Backend
    from .sparse import Rows


class Slot(NamedTuple):
    """A parameter's place in a plan."""

    index: int  # among all parameters of the optimizer
    name: str | None
    param: Tensor  # whose gradient is read
    tensor: Tensor | None  # the memory to update; None: no gradient so far, hence no state
    step: Tensor | None
    states: tuple[Tensor | None, ...]  # None: the optimizer has the state, but not for this parameter
    into: Tensor | None = None  # what the gradient updates, if not `param` itself
    storage: Storage | None = None  # None: weight and states are numbers of their dtypes

    @property
    def target(self) -> Tensor:
        return self.param if self.into is None else self.into


class Plan:
    """What every backend's plan has; `gather` and `step` are the backend's."""

    zero_grads = False  # whether a step sets each gradient to zero as it reads it

    def __init__(
        self,
        backend: Backend,
        optimizer: type[FusedOptimizer],
        group: int,
        options: dict[str, Any],
        variant: Any,
        states: tuple[str, ...],
        slots: list[Slot],
    ) -> None:
        self.backend = backend
        self.optimizer = optimizer
        self.group = group  # its index among the optimizer's
        self.options = options  # the group itself
        self.variant = variant
        self.states = states
        self.slots = slots
        self.rows: list[Rows] = []  # of this step's sparse gradients
        self.rows_plan: Plan | None = None

    def gather(self, grads: list[Tensor | None] | None = None) -> bool:
        """Read and check this step's gradients; False if the plan no longer fits and must be built anew.

        Args:
            grads: a gradient or None for each slot, to use in place of the parameters' own.
        """
        raise NotImplementedError

    def step(
        self, hyper: tuple[float | Tensor, ...], maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> int:
        """Update the parameters whose gradients `gather` found; returns the number of kernel calls."""
        raise NotImplementedError

    def grads_in_use(self) -> list[tuple[int, Tensor]]:
        """The gradients that `gather` found, by the index of their slot."""
        raise NotImplementedError

    def replace_grad(self, index: int, grad: Tensor) -> None:
        """Use ``grad`` for a slot in this step, in place of what `gather` found."""
        raise NotImplementedError

    def _grad_of(self, index: int, grads: list[Tensor | None] | None) -> Tensor | None:
        """A parameter's gradient, checked; a sparse one only if the rows that it names are all that a step changes."""
        slot = self.slots[index]
        grad = slot.param.grad if grads is None else grads[index]
        if grad is None:
            return None
        what = checks.describe(slot.index, slot.name, slot.param)
        checks.check_grad(self.optimizer, self.options, slot.param, grad, what)
        # Rows cannot be taken out of blocks, and a weight has more to it than its row: both stay as they are in a dense
        # step without gradient.
        rows_alone = self.optimizer.changes_rows_alone(self.options) and slot.storage is None
        if grad.layout == torch.sparse_coo and not (rows_alone and grad.sparse_dim()):
            grad = grad.to_dense()
        return grad

    def _take_rows(self, sparse: list[tuple[int, Tensor]]) -> None:
        """Plan this step's sparse gradients, given with the index of their slots."""
        from .sparse import Rows

        self.rows = [Rows(self.slots[i], grad) for i, grad in sparse]
        self.rows_plan = None
        if self.rows:
            slots = [rows.slot for rows in self.rows]
            plan = self.backend.plan(self.optimizer, self.group, self.options, self.variant, self.states, slots)
            plan.gather()
            for i, rows in enumerate(self.rows):
                plan.replace_grad(i, rows.grad)
            self.rows_plan = plan

    def _step_rows(self, *step: Any) -> int:
        if self.rows_plan is None:
            return 0
        calls = self.rows_plan.step(*step)
        for rows in self.rows:
            rows.write_back()
        self.rows, self.rows_plan = [], None
        return calls


class KernelPlan(Plan):
    """A plan for a kernel that takes addresses of flat memory; what is not flat is staged through dense copies."""

    borrows_grads = False  # whether `launch` keeps the interpreter lock while the kernel is called

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        from .. import _C

        slots = self.slots
        self.native = _C.Plan(
            self.optimizer.rule,
            self.states,
            [slot.param for slot in slots],
            [slot.tensor for slot in slots],
            [slot.step for slot in slots],
            [slot.states for slot in slots],
            [self._matrices(slot) for slot in slots] if self.optimizer.reduces else [],
            [self._precision(slot) for slot in slots] if any(slot.storage for slot in slots) else [],
        )
        self.stand_ins = [
            (i, slot)
            for i, slot in enumerate(slots)
            if slot.tensor is not None and slot.tensor is not layout.local(slot.target)
        ]
        self.wrappers = [(i, slot.target) for i, slot in enumerate(slots) if layout.is_wrapper(slot.target)]
        # The compiled plan sees the memory that it updates; whether that still stands for the parameter is seen here.
        apart = [slot.target for _, slot in self.stand_ins] + [target for _, target in self.wrappers]
        self.places = [(target, layout.place(layout.local(target))) for target in apart]

    def _matrices(self, slot: Slot) -> tuple[int, int, int] | None:
        return None if slot.tensor is None else self.optimizer.matrices(slot.tensor)

    @staticmethod
    def _precision(slot: Slot) -> tuple[Any, ...] | None:
        if slot.storage is None:
            return None
        form, companion, scales, seed = slot.storage
        return int(form), companion, scales, seed, slot.index

    def gather(self, grads: list[Tensor | None] | None = None) -> bool:
        moved = any(layout.place(layout.local(target)) != place for target, place in self.places)
        borrow = self.borrows_grads and grads is None and not self.zero_grads
        if moved or not self.native.gather(borrow, grads):
            self.native.release_grads()
            return False
        self.odd_grads = []
        try:
            sparse = []
            for i in self.native.odd_grads():
                grad = self._grad_of(i, grads)
                if grad.layout == torch.sparse_coo:
                    self.native.drop_grad(i)
                    sparse.append((i, grad))
                else:
                    self.odd_grads.append(layout.local(grad))
                    self.replace_grad(i, self.odd_grads[-1])
            self._take_rows(sparse)
        except BaseException:
            self.native.release_grads()
            raise
        return True

    def grads_in_use(self) -> list[tuple[int, Tensor]]:
        return [(i, layout.local(self.slots[i].param.grad)) for i in self.native.active()]

    def replace_grad(self, index: int, grad: Tensor) -> None:
        tensor = self.slots[index].tensor
        known = grad.dtype in checks.ARITHMETIC_DTYPES
        if not known or layout.is_lazy(grad) or not layout.same_layout(grad, tensor):
            grad = layout.laid_out_as(grad, tensor, None if known else torch.float32)
        self.native.set_grad(index, grad)

    def step(
        self, hyper: tuple[float | Tensor, ...], maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> int:
        if self.rows_plan is not None:
            rows_calls = self._step_rows(hyper, maximize, grad_scale, found_inf)
            return rows_calls + self.step(hyper, maximize, grad_scale, found_inf)
        if not self.native.any_active():
            return 0
        if not self.stand_ins and not self.wrappers:
            calls = self.launch(hyper, maximize, grad_scale, found_inf)
        else:
            calls = self._staged_launch(hyper, maximize, grad_scale, found_inf)
        if self.zero_grads and self.odd_grads:  # the kernel saw copies
            with torch.no_grad():
                for grad in self.odd_grads:
                    grad.zero_()
        self.odd_grads = []
        return calls

    def _staged_launch(
        self, hyper: tuple[float | Tensor, ...], maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> int:
        active = set(self.native.active())
        staged = [slot for i, slot in self.stand_ins if i in active]
        with torch.no_grad():
            for slot in staged:
                slot.tensor.copy_(layout.local(slot.target))
            calls = self.launch(hyper, maximize, grad_scale, found_inf)
            for slot in staged:
                layout.local(slot.target).copy_(slot.tensor)
        torch.autograd.graph.increment_version([target for i, target in self.wrappers if i in active])
        return calls

    def launch(
        self, hyper: tuple[float | Tensor, ...], maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> int:
        """Call the kernel on what `gather` found; returns the number of calls."""
        raise NotImplementedError
