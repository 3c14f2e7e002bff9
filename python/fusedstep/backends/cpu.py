"""The compiled CPU engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import KernelBackend
from .native import extension_reasons
from .plan import KernelPlan

if TYPE_CHECKING:
    from ..schedules.on_device import DeviceSchedules


class CpuPlan(KernelPlan):
    borrows_grads = True

    def launch(
        self, hyper: tuple[float | Tensor, ...], maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> int:
        from .. import _C

        if found_inf is not None and found_inf.item() != 0:
            self.native.release_grads()
            return 0
        scale = 1.0 if grad_scale is None else float(grad_scale)
        _C.cpu_step(self.native, hyper, maximize, scale, self.zero_grads, torch.get_num_threads())
        return 1


class CpuBackend(KernelBackend):
    name = "cpu"
    reduces = True
    stores = True

    def reasons(self, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
        if device.type != "cpu":
            return [f"it runs on CPU tensors, not on {device.type}"]
        return extension_reasons() + self.dtype_reasons(dtype)

    def advance_schedules(self, schedules: DeviceSchedules, found_inf: Tensor | None) -> int:
        from .. import _C

        if found_inf is not None and found_inf.item() != 0:
            return 0
        _C.cpu_advance_schedules(schedules.values.data_ptr(), schedules.table.data_ptr(), len(schedules.lrs))
        return 1

    def plan(self, *args) -> CpuPlan:
        return CpuPlan(self, *args)
