"""Clocks: interleaved rounds, cold caches, medians and spreads. All times are in seconds."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEFAULT_CACHE_BYTES = 64 << 20  # where the system does not tell


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache before the device's memory: L3 of a CPU, L2 of a GPU."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or DEFAULT_CACHE_BYTES
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes) or DEFAULT_CACHE_BYTES


WARM_STEPS = 8  # calls after a cold one until the next ones take no less time
WARM_SAMPLES = 3


class Stopwatch:
    """Takes the times of a call on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush_buffer = torch.ones(2 * cache_bytes(device) // 4, dtype=torch.float32, device=device)

    def flush(self) -> None:
        """Drive everything else out of the caches, by reading and writing a buffer twice their size."""
        self.flush_buffer.add_(1.0)

    def sample(self, call: Callable[[], object], warm: bool = False) -> dict[str, float]:
        """One sample of each kind of time.

        ``step``: from the call to the end of its work, with cold caches. On a CPU, if asked for, ``warm``: the same
        after some more calls in a row. On a GPU ``host``: until the call returned, the device being idle; ``device``:
        from the first to the last of its work on the device, with the call's host work hidden behind other work.
        """
        self.flush()
        if self.device.type != "cuda":
            times = {"step": wall(call)}
            if warm:
                for _ in range(WARM_STEPS):
                    call()
                times["warm"] = statistics.median(wall(call) for _ in range(WARM_SAMPLES))
            return times
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        torch.cuda.synchronize(self.device)
        times = {"step": time.perf_counter() - start, "host": returned - start}
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        _occupy(1.5 * times["host"])
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        times["device"] = begin.elapsed_time(end) / 1e3
        return times


def _occupy(seconds: float) -> None:
    """Keep the GPU busy for about that long, so that the host gets ahead of it."""
    cycles_per_second = 2e9  # of about any GPU; only the order of magnitude matters
    torch.cuda._sleep(int(min(seconds, 0.1) * cycles_per_second))


def wall(call: Callable[[], object]) -> float:
    """Seconds until ``call`` returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def host_sample(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """One sample of what ``step()`` costs the host, for an optimizer on a CPU whose parameters have one element each.

    ``host``: a step like those before it. ``fresh``: the same with new gradient tensors, which is what a backward pass
    leaves after ``zero_grad()``.
    """
    for _ in range(WARM_STEPS):
        optimizer.step()
    host = statistics.median(wall(optimizer.step) for _ in range(WARM_SAMPLES))
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = param.grad.clone()
    return {"host": host, "fresh": wall(optimizer.step)}


def interleaved(
    samplers: dict[str, Callable[[], dict[str, float]]],
    seconds: float,
    rounds: int | None = None,
    min_rounds: int = 3,
    max_rounds: int = 30,
) -> dict[str, dict[str, list[float]]]:
    """Samples of every sampler, taken in turn (A, B, C, A, B, C ...), so that a drift of the machine meets all of them.

    Args:
        samplers: each takes one sample of every kind of time, by name.
        seconds: for each sampler, about how long to go on.
        rounds: how many samples each takes; None: as many as ``seconds`` allows, within ``min_rounds`` and
            ``max_rounds``. Slow ones then take part in fewer rounds, spread evenly.
    """
    take_part = {}
    for name, sampler in samplers.items():
        needed = wall(sampler)  # warm-up: compilation, plans, first touch of memory
        if needed * min_rounds < seconds:
            needed = wall(sampler)
        affordable = min(max_rounds, max(min_rounds, int(seconds / needed)))
        take_part[name] = affordable if rounds is None else rounds
    total = max(take_part.values())
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in samplers}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(total):
            for name, sampler in samplers.items():
                if (turn + 1) * take_part[name] // total > turn * take_part[name] // total:
                    for kind, value in sampler().items():
                        samples[name].setdefault(kind, []).append(value)
    finally:
        if collecting:
            gc.enable()
    return samples


def summary(samples: list[float], scale: float = 1.0) -> dict[str, float | int]:
    """Median, quartiles and number of samples; times are multiplied by ``scale`` (1e3: milliseconds)."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"median": middle * scale, "q25": low * scale, "q75": high * scale, "rounds": len(samples)}


class OtherLoad:
    """How much of the CPU others use while this process measures; on Linux, else unknown."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.used = self._used()

    def cores(self) -> float | None:
        """Cores in use by other processes, or taken by the host of a virtual machine, on average since the start."""
        used = self._used()
        if used is None or self.used is None:
            return None
        return max(0.0, (used - self.used) / (time.perf_counter() - self.start))

    @staticmethod
    def _used() -> float | None:
        """CPU seconds of everything but this process."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, interrupts, soft_interrupts, stolen = (int(field) for field in fields[:8])
        busy = user + nice + system + interrupts + soft_interrupts + stolen
        own = os.times()
        return busy / os.sysconf("SC_CLK_TCK") - own.user - own.system


class Memory:
    """Two buffers larger than any cache, to measure the speed that memory-bound work is compared with."""

    def __init__(self, device: torch.device) -> None:
        size = max(1 << 30 if device.type == "cuda" else 128 << 20, 4 * cache_bytes(device))
        self.source = torch.ones(size // 4, dtype=torch.float32, device=device)
        self.target = torch.zeros_like(self.source)
        self.bytes = 2 * size  # read and written, by either method

    def copy(self) -> None:
        """Copy one buffer into the other. A CPU also reads the lines it is about to overwrite, which is not counted."""
        self.target.copy_(self.source)

    def pass_in_place(self) -> None:
        """Read a buffer and write it back, as an optimizer does with a parameter."""
        self.source.mul_(1.0)


class _OperatorCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operator_calls(call: Callable[[], object]) -> int:
    """How many torch operators ``call`` dispatches; an operator on a list of tensors is one."""
    with _OperatorCounter() as counter:
        call()
    return counter.count


def kernel_launches(call: Callable[[], object]) -> int | None:
    """How many CUDA kernels ``call`` launches (copies and fills by the driver not counted); None if not observable."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    other = ("Memcpy", "Memset", "Optimizer.step")  # the last is torch's own mark around a step
    return sum(not event.name.startswith(other) for event in events) or None
