"""The compiled CUDA engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import KernelBackend
from .lifetime import CHANGED, Streams, refuse_capture
from .native import _C, extension_reasons
from .plan import KernelPlan

if TYPE_CHECKING:
    from ..record import Step
    from ..schedules.on_device import DeviceSchedules
    from .norm import Limits, Norm
    from .plan import Plan


class CudaPlan(KernelPlan):
    """A plan whose table of addresses lies in device memory; only gradient addresses travel with a launch."""

    borrows_grads = True
    table = None
    norm_table = None

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.norm_streams = Streams()

    def launch(self, step: Step) -> int:
        self.upload_if_changed()
        step = self.on_device(step)
        return _C.cuda_step(self.native, self.table, self.memory.data_ptr(), self.work.data_ptr(), step)

    def on_device(self, step: Step) -> Step:
        """The step as kernels take it: with tensors on their device, all of which live long enough."""
        hyper = tuple(
            value.to(self.device, non_blocking=True) if isinstance(value, Tensor) and value.is_cuda else value
            for value in step.hyper
        )
        scale, found_inf = (self.flag(flag) for flag in (step.grad_scale, step.found_inf))
        coefficient = None if step.coefficient is None else step.coefficient.to(self.device, non_blocking=True)
        self.keep(self.used_memory(), *hyper, scale, found_inf, coefficient)
        return step._replace(hyper=hyper, grad_scale=scale, found_inf=found_inf, coefficient=coefficient)

    def flag(self, flag: Tensor | None) -> Tensor | None:
        """A number that a kernel reads."""
        return None if flag is None else flag.to(self.device, torch.float32, non_blocking=True)

    def used_memory(self) -> Sequence[Tensor]:
        return self.memory, self.work

    def add_to_norm(
        self,
        norm: Norm,
        limits: Limits | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        first: bool,
    ) -> int:
        """Add this plan's sums to ``norm``, or replace them if it is the ``first``; with limits, finish it."""
        device = self.device
        if self.norm_table is None or not self.norm_table.fits(self.native):
            self.norm_table = _C.CudaNormTable(self.native)
            self.norm_memory = self._uploaded(self.norm_table.bytes())
        grad_scale, found_inf = self.flag(grad_scale), self.flag(found_inf)
        self.norm_streams.use(device, (self.norm_memory, norm.numbers, norm.found_inf))
        self.graphs.keep(device, self.norm_memory, norm, grad_scale, found_inf)
        return self.norm_table.launch(
            self.native,
            self.norm_memory.data_ptr(),
            norm.numbers.data_ptr(),
            grad_scale,
            found_inf,
            limits,
            norm.found_inf.data_ptr(),
            first,
        )

    def upload_if_changed(self) -> None:
        if self.table is None or not self.table.fits(self.native):
            table = self.new_table()
            self.memory = self._uploaded(table.bytes())
            self.work = torch.empty(table.work_bytes, dtype=torch.uint8, device=self.device)
            self.table = table

    def new_table(self) -> Any:
        return _C.CudaTable(self.native, _C.cuda_multiprocessors(self.device.index))

    def _uploaded(self, table: bytearray) -> Tensor:
        refuse_capture(self.device, CHANGED)
        return torch.frombuffer(table, dtype=torch.uint8).to(self.device)


class CudaBackend(KernelBackend):
    name = "cuda"

    def reasons(self, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
        if device.type != "cuda":
            return [f"it runs on CUDA tensors, not on {device.type}"]
        if torch.version.hip is not None:
            return ["this torch is built for ROCm"]
        missing = extension_reasons()
        if missing:
            return missing
        if not _C.with_cuda:
            return ["fusedstep was built without CUDA; reinstall it with nvcc on PATH (FUSEDSTEP_CUDA=1 insists on it)"]
        count, why = _C.cuda_device_count()
        if count == 0:
            return [f"there is no GPU to be seen ({why or 'no device'})"]
        why = _C.cuda_why_not(torch.cuda.current_device() if device.index is None else device.index)
        return ([why] if why else []) + self.dtype_reasons(dtype)

    def norm(
        self,
        plans: Sequence[Plan],
        norm: Norm,
        limits: Limits | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> int:
        calls = 0
        for plan in plans:
            last = limits if plan is plans[-1] else None
            calls += plan.add_to_norm(norm, last, grad_scale, found_inf, plan is plans[0])
        return calls

    def advance_schedules(self, schedules: DeviceSchedules, found_inf: Tensor | None) -> int:
        values, table = schedules.values, schedules.table
        if found_inf is not None:
            found_inf = found_inf.to(values.device, torch.float32, non_blocking=True)
        _C.cuda_advance_schedules(
            values.data_ptr(),
            table.data_ptr(),
            len(schedules.lrs),
            0 if found_inf is None else found_inf.data_ptr(),
            values.device.index,
        )
        return 1

    def plan(self, *args) -> CudaPlan:
        return CudaPlan(self, *args)
