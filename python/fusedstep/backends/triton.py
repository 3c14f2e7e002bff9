"""The Triton backend."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..record import words_of
from .base import KernelBackend
from .lifetime import CHANGED, Streams, is_capturing, refuse_capture
from .native import extension_reasons
from .norm import NO_LIMITS, Limits
from .plan import KernelPlan
from .triton_reducing import ReducingTable, dtypes_of

if TYPE_CHECKING:
    from ..record import Step
    from ..schedules.on_device import DeviceSchedules
    from ..triton_kernels.launching import Prepared
    from .norm import Norm
    from .plan import Plan

# How numbers are stored: csrc/numeric.h's Dtype.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int8: 4, torch.uint8: 5}
NONE = -1  # there is nothing
OLDEST = (3, 6)
NORM_CHUNK = 65_536  # elements that one program sums
STRONG = ((8, 0), (9, 0), (10, 0))  # GPUs whose float64 is half as fast as their float32


class Launch:
    """The tensors of a plan that have the same dtypes: what one call updates."""

    table: Tensor
    chunks: Tensor

    def __init__(
        self,
        dtypes: tuple[int, ...],
        indices: list[int],
        plan: TritonPlan,
        followers: tuple[int, int] = (NONE, NONE),
        weight_format: str = "plain",
    ) -> None:
        self.dtypes = dtypes
        self.followers = followers
        self.weight_format = weight_format
        self.indices = np.array(indices)
        self.done = torch.zeros(1, dtype=torch.int32, device=plan.device)
        self.raw = b""  # the addresses of all gradients of the plan
        self.addresses: np.ndarray | None = None  # of this launch's
        self.is_active = False  # whether a tensor takes part
        self.kernels: dict[tuple, list[Prepared]] = {}
        self.build(indices, plan)

    @property
    def memory(self) -> list[Tensor]:
        """All device tensors that a launch uses, each always at the same place."""
        return [self.table, self.chunks, self.grads, self.done]

    def build(self, indices: list[int], plan: TritonPlan) -> None:
        """Upload what does not change from step to step."""
        from ..triton_kernels.step import chunk_size, is_light

        self.table = plan.upload(torch.from_numpy(words_of(plan.native_records()[indices])))
        light = is_light(self.dtypes, self.followers, self.weight_format)
        self.chunks = plan.chunks(indices, chunk_size(blocks_of(plan.device, light)))

    def set_grads(self, raw: bytes, plan: TritonPlan) -> bool:
        """Upload the gradients' addresses if they are new; False if no tensor takes part."""
        if raw != self.raw:
            self.raw = raw
            mine = np.frombuffer(raw, dtype=np.int64)[self.indices]
            if self.addresses is None or not np.array_equal(mine, self.addresses):
                self.addresses = mine
                self.grads = plan.upload(torch.from_numpy(mine))
                self.is_active = bool(mine.any())
        return self.is_active

    def prepare(self, plan: TritonPlan, maximize: bool) -> list[Prepared]:
        from ..triton_kernels import step

        block = step.block_size()
        fixed = (plan.functions, self.dtypes, self.followers, maximize, plan.left, block, self.weight_format)
        return [step.prepare(*fixed)]

    def run(self, plan: TritonPlan, maximize: bool, flags: list[Tensor | None]) -> int:
        """Queue the update; returns the number of launches."""
        key = (maximize, plan.left)
        kernels = self.kernels.get(key)
        if kernels is None:
            kernels = self.kernels[key] = self.prepare(plan, maximize)
        memory = (self.table, self.chunks, self.grads, plan.hyper, self.done, *flags)
        for kernel in kernels:
            kernel(plan.device, len(self.chunks), *memory, len(self.table))
        return len(kernels)


class ReducingLaunch(Launch):
    """The same for a rule that reduces."""

    def build(self, indices: list[int], plan: TritonPlan) -> None:
        self.reducing = ReducingTable(self.dtypes, indices, plan)
        self.table, self.chunks = self.reducing.table, self.reducing.items

    @property
    def memory(self) -> list[Tensor]:
        return [*super().memory, self.reducing.work, self.reducing.count]

    def prepare(self, plan: TritonPlan, maximize: bool) -> list[Prepared]:
        from ..triton_kernels import reducing

        return reducing.prepare(plan.functions, self.dtypes, self.followers, maximize, plan.left)


class NormLaunch(Launch):
    """The gradients of a plan that have the same dtype: what one call sums."""

    def build(self, indices: list[int], plan: TritonPlan) -> None:
        self.chunks = plan.chunks(indices, NORM_CHUNK)
        self.sums = torch.empty((len(self.chunks), 2), dtype=torch.float64, device=plan.device)
        self.streams = Streams()

    def add(
        self, plan: TritonPlan, norm: Norm, limits: Limits, numbers: Tensor, first: bool, last: bool, flags: list
    ) -> None:
        """Queue the sums, which are added to those in ``norm`` unless they are the ``first``."""
        from ..triton_kernels import norm as kernels
        from ..triton_kernels.step import block_size

        key = (first, last, limits[2:])
        if key not in self.kernels:
            block = 2 * block_size()  # only gradients are loaded
            self.kernels[key] = [kernels.prepare(*self.dtypes, first, last, limits, block)]
        memory = self.chunks, self.grads, self.sums, norm.numbers, self.done, numbers, norm.found_inf
        self.streams.use(plan.device, memory)
        plan.graphs.keep(plan.device, norm, *memory, *flags)
        self.kernels[key][0](plan.device, len(self.chunks), *memory, *flags)


class TritonPlan(KernelPlan):
    launches: list[Launch] | None = None
    sums: list[NormLaunch] | None = None
    launches_version: int | None = None  # of the gradients' dtypes, for which they were made
    sums_version: int | None = None
    limits: tuple[float, ...] | None = None
    weight: Tensor | None = None
    hyper_values: tuple[float, ...] | None = None
    hyper: Tensor | None = None
    only_in_graph = False

    def upload(self, host: Tensor) -> Tensor:
        """A copy on the plan's device, without waiting for it."""
        source = host.clone() if self.device.type == "cpu" else host.pin_memory()
        copy = source.to(self.device, non_blocking=True, copy=True)
        if is_capturing(self.device):
            self.graphs.keep(self.device, source, copy)
            self.only_in_graph = True
        return copy

    def chunks(self, indices: list[int], size: int) -> Tensor:
        """Which elements each program takes, at most ``size``: tensor, elements, offset."""
        sizes = np.array([self.records[index].param.numel() for index in indices])
        counts = -(-sizes // size)
        rows = np.repeat(np.arange(len(sizes)), counts)
        offsets = (np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)) * size
        chunks = np.stack([rows, np.minimum(sizes[rows] - offsets, size), offsets], axis=1)
        if not len(chunks):  # a program for nothing, so that the counters of a group of empty tensors advance too
            chunks = np.zeros((1, 3), dtype=np.int64)
        return self.upload(torch.from_numpy(np.ascontiguousarray(chunks, dtype=np.int64)))

    def _forget_what_only_a_graph_has(self) -> None:
        """What was uploaded in a capture is in device memory when the graph is replayed, not before."""
        if self.only_in_graph and not is_capturing(self.device):
            self.only_in_graph = False
            self.hyper_values = self.limits = self.weight = None
            for launch in (*(self.launches or ()), *(self.sums or ())):
                launch.raw, launch.addresses = b"", None

    def launch(self, step: Step) -> int:
        self._forget_what_only_a_graph_has()
        version = self.native.grad_dtypes_version()
        if version != self.launches_version:
            refuse_capture(self.device, CHANGED)
            self.launches = self._launches()
            self.launches_version = version
        self._set_hyper(step.hyper)
        flags = [None if t is None else t.to(self.device, torch.float32) for t in (step.grad_scale, step.found_inf)]
        flags.append(None if step.coefficient is None else step.coefficient.to(self.device))
        flags.append(self._weight())
        addresses = self.native.grad_pointers()
        active = [launch for launch in self.launches if launch.set_grads(addresses, self)]
        memory = [self.hyper, self.weight]
        for launch in self.launches:
            memory += launch.memory
        self.keep(memory, *step.hyper, *flags)
        calls = 0
        for launch in active:
            calls += launch.run(self, step.maximize, flags)
        self.native.increment_written(step.changes_grads)
        self.native.release_grads()
        return calls

    @property
    def left(self) -> str:
        """What becomes of the gradients, in the kernels' words."""
        return "zero" if self.zero_grads else "changed" if self.write_grads else ""

    def norm_launches(self) -> list[NormLaunch]:
        """Those that sum the gradients that take part."""
        self._forget_what_only_a_graph_has()
        version = self.native.grad_dtypes_version()
        if version != self.sums_version:
            refuse_capture(self.device, CHANGED)
            groups: dict[int, list[int]] = {}
            for index, dtype in enumerate(self.native_records()["grad_dtype"].tolist()):
                if self.records[index].param is not None:
                    groups.setdefault(dtype, []).append(index)
            self.sums = [NormLaunch((dtype,), indices, self) for dtype, indices in groups.items()]
            self.sums_version = version
        addresses = self.native.grad_pointers()
        return [launch for launch in self.sums if launch.set_grads(addresses, self)]

    def limit_numbers(self, limits: Limits) -> Tensor:
        """The limits that are numbers, in device memory."""
        if limits[:2] != self.limits:
            self.limits = limits[:2]
            self.numbers = self.upload(torch.tensor(self.limits, dtype=torch.float64))
        return self.numbers

    def _weight(self) -> Tensor | None:
        """The weight of a parameter in its average, in device memory."""
        if self.weight is None and any(record.average is not None for record in self.records):
            self.weight = self.upload(torch.tensor(self.average_weight, dtype=torch.float64))
        return self.weight

    def _launches(self) -> list[Launch]:
        groups: dict[tuple[tuple[int, ...], tuple[int, int], str], list[int]] = {}
        native = self.native_records()
        grad_dtypes, state_dtypes = native["grad_dtype"].tolist(), native["state_dtypes"].tolist()
        for index, record in enumerate(self.records):
            if record.param is not None:
                pairs = zip(self.states, record.states, strict=True)
                if self.reduces:
                    states = {name: DTYPES[state.dtype] for name, state in pairs if state is not None}
                    named = dtypes_of(states, self.functions, record.matrices is not None)
                else:
                    there = {name for name, state in pairs if state is not None}
                    names = self.optimizer.state_names
                    dtypes_here = zip(names, state_dtypes[index], strict=False)
                    named = [dtype if name in there else NONE for name, dtype in dtypes_here]
                dtypes = (DTYPES[record.param.dtype], grad_dtypes[index], *named)
                followers = tuple(NONE if t is None else DTYPES[t.dtype] for t in (record.average, record.copy))
                scattered = record.weight_format.is_random and not record.element_map.keeps_groups
                weight_format = "scattered" if scattered else record.weight_format.name
                groups.setdefault((dtypes, followers, weight_format), []).append(index)
        kind = ReducingLaunch if self.reduces else Launch
        return [
            kind(dtypes, indices, self, followers, weight_format)
            for (dtypes, followers, weight_format), indices in groups.items()
        ]

    def _set_hyper(self, hyper: tuple[float | Tensor, ...]) -> None:
        """Put the hyperparameters into device memory in float64, the numbers only if one has changed."""
        on_device = [(k, v) for k, v in enumerate(hyper) if isinstance(v, Tensor) and v.is_cuda]
        values = tuple([0.0 if isinstance(v, Tensor) and v.is_cuda else float(v) for v in hyper])
        if values != self.hyper_values:
            self.hyper_values = values
            self.hyper = self.upload(torch.tensor(values, dtype=torch.float64))
        for k, value in on_device:
            self.hyper[k].copy_(value.reshape(()), non_blocking=True)


class TritonBackend(KernelBackend):
    name = "triton"

    def reasons(self, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
        missing = package_reasons() or extension_reasons()
        if missing:
            return missing
        if device.type == "cpu":
            # Asked before the kernels are imported: they are made for the interpreter or not once and for all.
            if os.environ.get("TRITON_INTERPRET") != "1" or not interpreted():
                return ["CPU tensors need TRITON_INTERPRET=1 in the environment from the start (and are slow)"]
        elif device.type != "cuda":
            return [f"it runs on CUDA tensors, not on {device.type}"]
        elif interpreted():
            return ["TRITON_INTERPRET=1 is set, which runs kernels on the CPU"]
        elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return ["it needs a GPU of compute capability 8.0 or newer"]
        return self.dtype_reasons(dtype)

    def norm(
        self,
        plans: Sequence[Plan],
        norm: Norm,
        limits: Limits | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> int:
        launches = [(plan, launch) for plan in plans for launch in plan.norm_launches()]
        flags = [None if t is None else t.to(norm.device, torch.float32) for t in (grad_scale, found_inf)]
        finishes = limits is not None
        limits = limits or NO_LIMITS
        numbers = plans[-1].limit_numbers(limits)
        for number, (plan, launch) in enumerate(launches, 1):
            launch.add(plan, norm, limits, numbers, number == 1, finishes and number == len(launches), flags)
        return len(launches)

    def advance_schedules(self, schedules: DeviceSchedules, found_inf: Tensor | None) -> int:
        from ..triton_kernels import schedule

        if found_inf is not None:
            found_inf = found_inf.to(schedules.values.device, torch.float32)
        n = len(schedules.lrs)
        schedule.prepare()(schedules.values.device, n, schedules.values, schedules.table, found_inf, n)
        return 1

    def plan(self, *args) -> TritonPlan:
        return TritonPlan(self, *args)


@functools.cache
def package_reasons() -> list[str]:
    """Why Triton cannot be used at all; empty if it can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ["triton is not installed; pip install fusedstep[triton]"]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return [f"triton {version} is too old; {'.'.join(map(str, OLDEST))} or newer is needed"]
    return []


@functools.cache
def blocks_of(device: torch.device, light: bool) -> int:
    """Blocks that a program takes.

    Few: the loads of a new program overlap with the stores of others. But each program, in all of its threads, computes
    the scalars of a step in float64, which an H200 hides only behind ``light`` kernels, many of which run at a time.
    """
    if device.type == "cpu" or torch.version.hip:
        return 4
    return 4 if light and torch.cuda.get_device_capability(device) in STRONG else 32


@functools.cache
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    from ..triton_kernels.step import is_interpreted

    return is_interpreted()
