"""Plans: the tensors of one group on one device, ready for a kernel call."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import checks, layout, shards
from ..kept.ema import follow
from ..record import Record, Step, memory_layout
from .lifetime import Graphs, Streams
from .native import _C

if TYPE_CHECKING:
    from ..exchange import Over
    from ..optimizer import FusedOptimizer
    from . import Backend
    from .sparse import Rows


class Plan(ABC):
    """What every backend's plan has; `gather` and `step` are the backend's."""

    zero_grads = False  # whether a step sets each gradient to zero as it reads it
    write_grads = False  # or to what it was changed to before the rule took it
    grads_change = False  # whether this plan or another one of the same step does either
    steps_at_once = False  # whether `cpu.gather_and_step` may take the place of `gather` and `step`
    grads_moved = True  # whether a gradient may not be where it was in the last step
    average_weight = 0.0  # of the new parameter in its average
    over: Over = ()  # the process groups over which parts of its tensors add up

    def __init__(
        self,
        backend: Backend,
        optimizer: type[FusedOptimizer],
        group: int,
        options: dict[str, Any],
        variant: Any,
        states: tuple[str, ...],
        records: list[Record],
    ) -> None:
        self.backend = backend
        self.optimizer = optimizer
        self.group = group  # its index among the optimizer's
        self.options = options  # the group itself
        self.variant = variant
        self.rule, self.reduces = optimizer.rule_of(variant)
        self.functions = optimizer.rule_named(self.rule)
        self.states = states
        self.records = records
        self.given: list[Tensor | None] | None = None  # gradients in place of the parameters' own
        self.rows: list[Rows] = []  # of this step's sparse gradients
        self.rows_plan: Plan | None = None
        self.graphs = Graphs()  # the optimizer puts its own here, which lives longer

    @abstractmethod
    def gather(self, grads: list[Tensor | None] | None = None) -> bool:
        """Read and check this step's gradients; False if the plan no longer fits and must be built anew.

        Args:
            grads: a gradient or None for each record, to use in place of the parameters' own.
        """

    def foresee(self, hyper: tuple[float | Tensor, ...]) -> None:  # noqa: B027
        """Raise what `step` would raise for these hyperparameters."""

    def step_with(
        self, hyper: tuple[float | Tensor, ...], maximize: bool = False, found_inf: Tensor | None = None
    ) -> Step:
        """A step with these, and with what all steps of this plan have in common."""
        return Step(hyper, maximize, None, found_inf, None, self.zero_grads, self.write_grads, self.average_weight)

    @abstractmethod
    def step(self, step: Step) -> int:
        """Update the parameters whose gradients `gather` found; returns the number of kernel calls."""

    @abstractmethod
    def grads_in_use(self) -> list[tuple[int, Tensor]]:
        """The gradients that `gather` found, by the index of their record."""

    @abstractmethod
    def grads_as_used(self) -> list[Tensor]:
        """The gradients as the step will read them, replaced ones included."""

    @abstractmethod
    def replace_grad(self, index: int, grad: Tensor) -> None:
        """Use ``grad`` for a record in this step, in place of what `gather` found."""

    @property
    def writes_grads(self) -> bool:
        return self.zero_grads or self.write_grads

    def copied_grads(self) -> list[int]:
        """The records of which a step reads a copy of the gradient, and writes the gradient itself only then."""
        return [index for index, _ in self.grads_in_use()]

    def check_norm_is_known(self) -> None:
        """Raise RuntimeError if gradients that `gather` found may be parts of others, in a way that nobody knows."""
        for index, _ in self.grads_in_use():
            record = self.records[index]
            if layout.is_wrapper(record.target):
                what = checks.describe(record.index, record.name, record.owner)
                checks.check_norm_is_known(self.optimizer, record.target, what)

    def norm_device(self) -> torch.device | None:
        """Where the gradients that `gather` found are; None: there are none.

        Raises:
            RuntimeError: they may be parts of others, in a way that nobody knows.
        """
        self.check_norm_is_known()
        active = self.grads_in_use()
        return active[0][1].device if active else None

    def _grad_of(self, index: int, grads: list[Tensor | None] | None) -> Tensor | None:
        """A parameter's gradient, checked; a sparse one only if the rows that it names are all that a step changes."""
        record = self.records[index]
        grad = record.owner.grad if grads is None else grads[index]
        if grad is None:
            return None
        what = checks.describe(record.index, record.name, record.owner)
        checks.check_grad(self.optimizer, self.options, record.owner, grad, what)
        if grad.layout == torch.sparse_coo and not self._takes_rows_of(grad, record):
            grad = grad.to_dense()
        return grad

    def _takes_rows_of(self, grad: Tensor, record: Record) -> bool:
        # Rows cannot be taken out of blocks, and a weight in another form than its dtype's has more to it than its row.
        return bool(record.is_plain and grad.sparse_dim() and self.optimizer.changes_rows_alone(self.options))

    def _take_rows(self, sparse: list[tuple[int, Tensor]]) -> None:
        """Plan this step's sparse gradients, given with the index of their records."""
        from .sparse import Rows

        self.rows = [Rows(self.records[i], i, grad) for i, grad in sparse]
        self.rows_plan = None
        if self.rows:
            records = [rows.record for rows in self.rows]
            plan = self.backend.plan(self.optimizer, self.group, self.options, self.variant, self.states, records)
            plan.write_grads, plan.over = self.write_grads, self.over
            plan.gather()
            for i, rows in enumerate(self.rows):
                plan.replace_grad(i, rows.grad)
            self.rows_plan = plan

    def _step_rows(self, step: Step) -> int:
        if self.rows_plan is None:
            return 0
        calls = 0
        skipped = step.skipped  # to find the rows has made the host wait already
        if not skipped:
            calls = self.rows_plan.step(step)
        for rows in self.rows:
            if not skipped:
                rows.write_back()
                self._follow(self.records[rows.index], step)  # all rows move towards the parameter
            if self.writes_grads:
                self._leave_in(rows.index, rows.grad_of_rows(), skipped)
        self.rows, self.rows_plan = [], None
        return calls

    @torch.inference_mode()
    def _follow(self, record: Record, step: Step) -> None:
        follow(layout.local(record.owner.detach()), record.average, record.copy, step.average_weight)

    def _own_grad(self, index: int) -> Tensor:
        """What a step leaves zeros or the changed gradient in, where the kernel sees a copy."""
        return self.records[index].owner.grad if self.given is None else self.given[index]

    @torch.inference_mode()  # in which an inference tensor can be written, and any other one as always
    def _leave_in(self, index: int, changed: Tensor, skipped: bool) -> None:
        """Do to the gradient of a record what a kernel has done to the copy of it that it was given."""
        grad = self._own_grad(index)
        if self.zero_grads:
            layout.zero(grad)
        elif self.write_grads and not skipped:
            if grad._is_zerotensor():  # which has no memory to write to
                with torch.inference_mode(False), torch.no_grad():
                    self.records[index].owner.grad = layout.laid_out_as(changed, layout.dense_like(grad), grad.dtype)
            elif grad.layout != torch.sparse_coo:
                layout.write(layout.local(grad), changed)
            elif changed.layout == torch.strided:
                grad.copy_(changed.to(grad.dtype).sparse_mask(grad.coalesce()))
            else:
                grad.copy_(changed)


def _is_same(own: Tensor, grad: Tensor) -> bool:
    return own.layout == torch.strided and layout.local(own).data_ptr() == grad.data_ptr()


class KernelPlan(Plan):
    """A plan for a kernel that takes addresses of flat memory; what is not flat is staged through dense copies."""

    borrows_grads = False  # whether `launch` keeps the interpreter lock while the kernel is called

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.streams = Streams()
        self.native = _C.Plan(self.rule, self.states, self.records)
        self.staged = [
            (i, record)
            for i, record in enumerate(self.records)
            if record.param is not None and record.param is not layout.local(record.target)
        ]
        self.wrappers = []
        for i, record in enumerate(self.records):
            if record.into is None and shards.wraps(record.owner, record.param):
                self.native.watch_part(i)
            elif record.param is not None and layout.is_wrapper(record.target):
                self.wrappers.append((i, record.target))
        # The compiled plan sees the memory that it updates; whether that still stands for the parameter is seen here.
        apart = [record.target for _, record in self.staged] + [target for _, target in self.wrappers]
        self.memory_keys = [(target, layout.memory_key(layout.local(target))) for target in apart]

    def native_records(self) -> np.ndarray:
        """The records as the engines read them, with addresses, in `memory_layout`."""
        return np.frombuffer(self.native.records(), memory_layout())

    def gather(self, grads: list[Tensor | None] | None = None) -> bool:
        moved = any(layout.memory_key(layout.local(target)) != key for target, key in self.memory_keys)
        borrow = self.borrows_grads and grads is None and not self.writes_grads
        self.given = grads
        gathered = 0 if moved else self.native.gather(borrow, grads)
        if not gathered:
            self.native.release_grads()
            return False
        self.grads_moved = gathered == 2
        self.converted_grads = {}
        try:
            sparse = []
            for i in self.native.unconverted_grads():
                grad = self._grad_of(i, grads)
                if grad.layout == torch.sparse_coo:
                    self.native.drop_grad(i)
                    sparse.append((i, grad))
                else:
                    self.replace_grad(i, layout.local(grad))
            self._take_rows(sparse)
        except BaseException:
            self.native.release_grads()
            raise
        return True

    def grads_in_use(self) -> list[tuple[int, Tensor]]:
        return [(i, layout.local(self.records[i].owner.grad)) for i in self.native.active()]

    def grads_as_used(self) -> list[Tensor]:
        return [self.converted_grads.get(i, grad) for i, grad in self.grads_in_use()]

    @functools.cached_property
    def device(self) -> torch.device:
        return next(record.param.device for record in self.records if record.param is not None)

    def norm_device(self) -> torch.device | None:
        if self.wrappers:
            return super().norm_device()
        return self.device if self.native.any_active() else None

    def replace_grad(self, index: int, grad: Tensor) -> None:
        tensor = self.records[index].param
        known = grad.dtype in checks.ARITHMETIC_DTYPES
        if not known or layout.is_lazy(grad) or not layout.same_layout(grad, tensor):
            grad = layout.laid_out_as(grad, tensor, None if known else torch.float32)
        self.native.set_grad(index, grad)
        self.converted_grads[index] = grad
        self.grads_moved = True

    def copied_grads(self) -> list[int]:
        own = {i: self._own_grad(i) for i in self.converted_grads}
        return [i for i, grad in self.converted_grads.items() if own[i] is not None and not _is_same(own[i], grad)]

    def copy_grad(self, index: int) -> None:
        """Let the kernel have a copy of a gradient that `gather` found; it is copied back after the step."""
        grad = self.converted_grads.get(index)
        if grad is None:
            grad = layout.local(self._own_grad(index))
        self.replace_grad(index, layout.laid_out_as(grad, self.records[index].param))

    def step(self, step: Step) -> int:
        rows_calls = self._step_rows(step)
        if not self.native.any_active():
            self.given = None
            return rows_calls
        launch = self._staged_launch if self.staged or self.wrappers else self.launch
        calls = launch(step)
        if self.converted_grads and self.writes_grads:
            # Copies that a GPU has skipped are as they were.
            skipped = step.found_inf is not None and step.found_inf.device.type == "cpu" and step.skipped
            for index, grad in self.converted_grads.items():  # the kernel saw copies
                if self._own_grad(index) is not None:  # those of rows are their plan's
                    self._leave_in(index, grad, skipped)
        self.converted_grads, self.given = {}, None
        return rows_calls + calls

    def _staged_launch(self, step: Step) -> int:
        active = set(self.native.active())
        records = [record for i, record in self.staged if i in active]
        with torch.inference_mode():
            for record in records:
                record.param.copy_(layout.local(record.target))
            calls = self.launch(step)
            for record in records:
                layout.local(record.target).copy_(record.param)
        torch.autograd.graph.increment_version([target for i, target in self.wrappers if i in active])
        return calls

    def keep(self, memory: Sequence[Tensor | None], *given: Any) -> None:
        """Before a launch: let what it uses live until the device has no more use for it.

        Args:
            memory: the plan's own device tensors, each always at the same place of the sequence.
            given: tensors of others that the launch reads.
        """
        self.streams.use(self.device, memory)
        # Not the plan itself, which would be a cycle: memory then waits for the garbage collector.
        self.graphs.keep(self.device, self.records, *memory, *given)

    @abstractmethod
    def launch(self, step: Step) -> int:
        """Step the kernel on what `gather` found; returns the number of calls. On a GPU it calls `keep` before."""


class SharedGrads:
    """Keeps steps that write into gradients from writing one before another that shares its memory was read."""

    def __init__(self) -> None:
        self.overlaps: Any = None
        self.apart: list[Plan] | None = None  # plans whose gradients were found to share nothing

    def __reduce__(self) -> tuple[type, tuple]:
        return SharedGrads, ()

    def copy(self, plans: list[Plan]) -> None:
        """Replace gradients that share memory, in plans that have gathered them, by copies."""
        if plans != self.apart or any(plan.grads_moved for plan in plans):
            self.apart = None if self._copy(plans) else list(plans)

    @torch.no_grad()
    def _copy(self, plans: list[Plan]) -> bool:
        kernel_plans = [plan for plan in plans if isinstance(plan, KernelPlan)]
        if not kernel_plans:  # the reference reads copies
            return False
        if self.overlaps is None:
            self.overlaps = _C.Overlaps()
        own = [plan._own_grad(i) for plan in plans for i in plan.copied_grads()]
        extents = [layout.extent(layout.local(grad)) for grad in own if grad.layout == torch.strided]
        shared = self.overlaps.find([plan.native for plan in kernel_plans], extents)
        for position, index in shared:
            kernel_plans[position].copy_grad(index)
        return bool(shared)
