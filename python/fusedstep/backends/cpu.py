"""The compiled CPU engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import KernelBackend
from .native import _C, extension_reasons
from .plan import KernelPlan

if TYPE_CHECKING:
    from ..record import Step
    from ..schedules.on_device import DeviceSchedules
    from .norm import Limits, Norm
    from .plan import Plan


class CpuPlan(KernelPlan):
    borrows_grads = True

    @property
    def steps_at_once(self) -> bool:
        return not (self.memory_keys or self.grads_change)

    def launch(self, step: Step) -> int:
        if step.skipped:
            if step.zero_grads:
                # Those that the plan has copies of are zeroed with these.
                grads = [grad for i, grad in self.grads_in_use() if i not in self.converted_grads]
                with torch.inference_mode():  # in which inference tensors can be written, and any other one as always
                    if grads:
                        torch._foreach_zero_(grads)
            self.native.release_grads()
            return 0
        _C.cpu_step(self.native, step, torch.get_num_threads())
        return 1


def gather_and_step(steps: Sequence[tuple[CpuPlan, Step]]) -> int | None:
    """Gather this step's gradients of all plans and update their parameters; returns the number of kernel calls.

    None, and nothing has changed: a plan does not fit, or has gradients that cannot be used as they are.

    Args:
        steps: plans that say ``steps_at_once``, each with its step.
    """
    calls = _C.cpu_gather_and_step([(plan.native, step) for plan, step in steps], torch.get_num_threads())
    return None if calls < 0 else calls


class CpuBackend(KernelBackend):
    name = "cpu"

    def reasons(self, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
        if device.type != "cpu":
            return [f"it runs on CPU tensors, not on {device.type}"]
        return extension_reasons() + self.dtype_reasons(dtype)

    def norm(
        self,
        plans: Sequence[Plan],
        norm: Norm,
        limits: Limits | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> int:
        _C.cpu_norm(
            [plan.native for plan in plans],
            1.0 if grad_scale is None else float(grad_scale),
            limits,
            found_inf is not None and found_inf.item() != 0,
            norm.numbers.data_ptr(),
            norm.found_inf.data_ptr(),
            torch.get_num_threads(),
        )
        return 1

    def advance_schedules(self, schedules: DeviceSchedules, found_inf: Tensor | None) -> int:
        if found_inf is not None and found_inf.item() != 0:
            return 0
        _C.cpu_advance_schedules(schedules.values.data_ptr(), schedules.table.data_ptr(), len(schedules.lrs))
        return 1

    def plan(self, *args) -> CpuPlan:
        return CpuPlan(self, *args)
