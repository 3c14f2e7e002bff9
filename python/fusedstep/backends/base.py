"""What the optimizer asks of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks, layout
from .norm import sums

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer
    from ..record import Record
    from ..schedules.on_device import DeviceSchedules
    from .norm import Limits, Norm
    from .plan import Plan


class Backend(ABC):
    """One way to run a step."""

    name: str
    dtypes: tuple[torch.dtype, ...] | None = None  # of states; None: every floating one

    @abstractmethod
    def reasons(self, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
        """Why this backend cannot update parameters on ``device`` (of ``dtype``); empty if it can."""

    def bucket(self, param: Tensor) -> Any:
        """Parameters of a group share a plan if this is equal."""
        return None

    @abstractmethod
    def memory(self, param: Tensor, contiguous: bool = False) -> Tensor:
        """The tensor that a step updates: the parameter's own memory, or a stand-in where that is not dense.

        ``contiguous``: the dimensions must be in their logical order.
        """

    @abstractmethod
    def state_memory(self, state: Tensor, tensor: Tensor) -> Tensor | None:
        """``state`` as the kernel can take it beside ``tensor``, or None if it must be laid out anew."""

    @abstractmethod
    def plan(
        self,
        optimizer: type[FusedOptimizer],
        group: int,
        options: dict[str, Any],
        variant: Any,
        states: tuple[str, ...],
        records: list[Record],
    ) -> Plan:
        """A plan for parameters of one group that share their hyperparameters."""

    def norm(
        self,
        plans: Sequence[Plan],
        norm: Norm,
        limits: Limits | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> int:
        """Fill ``norm`` in from the gradients that plans on its device have gathered; returns the kernel calls.

        Args:
            limits: what follows from the sums; None: the sums are all.
            grad_scale: gradients count divided by it.
            found_inf: if not 0, the step is skipped in any case.
        """
        total, max_abs = sums((grad for plan in plans for grad in plan.grads_as_used()), grad_scale, norm.device)
        norm.sum_of_squares.copy_(total)
        norm.max_abs.copy_(max_abs)
        if limits is not None:
            norm.finish(limits, grad_scale, found_inf)
        return 0

    @abstractmethod
    def advance_schedules(self, schedules: DeviceSchedules, found_inf: Tensor | None) -> int:
        """Count a step, unless it was skipped, and evaluate the next learning rates; returns the kernel calls."""


class KernelBackend(Backend):
    """A backend whose kernels take addresses of flat memory."""

    dtypes = checks.ARITHMETIC_DTYPES

    def dtype_reasons(self, dtype: torch.dtype | None) -> list[str]:
        if dtype is None or dtype in self.dtypes:
            return []
        return [f"no kernel for {dtype} (there are kernels for {', '.join(str(d) for d in self.dtypes)})"]

    def memory(self, param: Tensor, contiguous: bool = False) -> Tensor:
        tensor = layout.local(param)
        usable = tensor.is_contiguous() if contiguous else layout.is_dense(tensor)
        if usable and not layout.is_lazy(tensor):
            return tensor
        if contiguous:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return layout.dense_like(tensor)

    def state_memory(self, state: Tensor, tensor: Tensor) -> Tensor | None:
        state = layout.local(state)
        # A state of another shape belongs to a rule that reduces, which takes all memory in logical order.
        fits = layout.same_layout(state, tensor) if state.shape == tensor.shape else state.is_contiguous()
        return state if fits and not layout.is_lazy(state) else None
