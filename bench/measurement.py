"""One configuration measured: every contender checked, then all timed over the same memory, a row for each.

What is measured, and what becomes of the rows, is the suite's; clocks are in timing.py, the check in check.py.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import check, peers, timing
from .models import Case
from .optimizers import Optimizer
from .peers import Contender

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPY, IN_PLACE = "copy", "in place"  # names of the passes over memory among the calls that are timed
MEASURED = (  # the keys of a row that are None until it has been timed
    *("step_ms", "warm_ms", "device_ms", "host_us", "host_fresh_us", "calls", "calls_are"),
    *("gb_per_s", "copy_gb_per_s", "memory_gb_per_s", "copy_share", "memory_share"),
    *("baseline", "speedup", "warm_speedup", "other_load"),
)
OK, WRONG, FAILED, UNAVAILABLE = "ok", "wrong", "failed", "unavailable"  # a row's status


@dataclass(frozen=True)
class Effort:
    """How long each contender is timed: seconds, and the smallest and largest number of rounds."""

    seconds: float
    min_rounds: int
    max_rounds: int


FULL = Effort(0.8, 3, 30)
QUICK = Effort(0.2, 3, 10)


@dataclass(frozen=True)
class Configuration:
    """One list of parameters under one optimizer; all contenders are measured on it together."""

    optimizer: Optimizer
    case: Case
    dtype: str
    threads: int

    def memory_bytes(self) -> int:
        """About what the check and the timing need at their peak."""
        size = DTYPES[self.dtype].itemsize
        # parameter, gradient, initial value; expected value in float32; states; temporaries as large as the parameters
        return self.case.elements * (3 * size + 4 + self.optimizer.states * size + 2 * size)


@dataclass
class Bench:
    """A run: what stays the same from one configuration to the next."""

    device: torch.device
    backends: Sequence[str]
    effort: Effort
    rounds: int | None = None
    check_only: bool = False
    host_times: dict[tuple, dict[str, Any]] = field(default_factory=dict)
    stopwatch: timing.Stopwatch | None = None
    memory: timing.Memory | None = None

    def run(self, configuration: Configuration, report: Callable[[str], None]) -> list[dict[str, Any]]:
        """Check and time every contender; ``report`` is told what is going on."""
        before = torch.get_num_threads()
        torch.set_num_threads(configuration.threads)
        try:
            return self._run(configuration, report)
        finally:
            torch.set_num_threads(before)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _run(self, configuration: Configuration, report: Callable[[str], None]) -> list[dict[str, Any]]:
        optimizer, case, dtype = configuration.optimizer, configuration.case, DTYPES[configuration.dtype]
        contenders = peers.contenders(optimizer, self.device, dtype, self.backends)
        rows = {contender.name: self._row(configuration, contender) for contender in contenders}
        need, available = configuration.memory_bytes(), available_bytes(self.device)
        if need > available:
            for row in rows.values():
                reason = f"needs about {need / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free"
                row |= {"status": UNAVAILABLE, "reason": reason}
            return list(rows.values())

        report("reference in float64")
        params = check.make_parameters(case.shapes, dtype, self.device)
        right = check.expected(optimizer, params, dtype)
        start = [param.detach().clone() for param in params]
        built: dict[str, torch.optim.Optimizer] = {}
        for contender in contenders:
            if rows[contender.name]["status"] == OK:
                report(f"check {contender.name}")
                made = self._check(contender, rows[contender.name], params, start, right)
                if made is not None:
                    if optimizer.chain:
                        made.begin_timing()
                    park_states(made, params)
                    built[contender.name] = made
        del right, start
        if not self.check_only and built:
            pool: dict[tuple[Any, ...], Tensor] = {}
            for name, made in built.items():
                share_states(made, params, pool)
                rows[name] |= self._calls(rows[name], made)
            report("timing")
            self._time(configuration, built, rows)
            built.clear()
            pool.clear()
            del params
            report("host time")
            self._time_host(configuration, [c for c in contenders if rows[c.name]["status"] == OK], rows)
        return list(rows.values())

    def _row(self, configuration: Configuration, contender: Contender) -> dict[str, Any]:
        optimizer, case, dtype = configuration.optimizer, configuration.case, DTYPES[configuration.dtype]
        return {
            "optimizer": optimizer.name,
            "case": case.name,
            "title": case.title,
            "dtype": configuration.dtype,
            "threads": configuration.threads,
            "tensors": case.tensors,
            "elements": case.elements,
            "contender": contender.name,
            "ours": contender.ours,
            "status": UNAVAILABLE if contender.reasons else OK,
            "reason": "; ".join(contender.reasons) or None,
            "error": None,
            "tolerance": max(contender.tolerance or 0.0, check.TOLERANCES[dtype]),
            "bytes_per_parameter": optimizer.bytes_per_parameter(dtype, contender.precision),
            **dict.fromkeys(MEASURED),
        }

    def _check(
        self,
        contender: Contender,
        row: dict[str, Any],
        params: Sequence[Tensor],
        start: Sequence[Tensor],
        right: Sequence[Tensor],
    ) -> torch.optim.Optimizer | None:
        """The contender's optimizer, if it is right; otherwise the row says what is wrong."""
        try:
            made, error = check.check(contender.build, params, start, right)
        except Exception as problem:  # whatever a package raises is a finding about it, not the end of the run
            # torch and other packages say by an exception that they do not support something; our backends give
            # their reasons beforehand.
            row["status"] = FAILED if contender.ours else UNAVAILABLE
            row["reason"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            check.fill_grads(params)
            return None
        row["error"] = error if math.isfinite(error) else None  # JSON has no infinity
        if not error <= row["tolerance"]:
            row["status"] = WRONG
            row["reason"] = f"relative error {error:.3g} after {len(check.GRAD_FACTORS)} steps"
            check.fill_grads(params)  # it may have written into them
            return None
        return made

    def _calls(self, row: dict[str, Any], made: torch.optim.Optimizer) -> dict[str, Any]:
        if self.device.type == "cuda":
            launches = timing.kernel_launches(made.step)
            if launches is not None:
                return {"calls": launches, "calls_are": "kernel launches"}
        if row["ours"]:
            made.step()
            if made.kernel_calls:
                return {"calls": made.kernel_calls, "calls_are": "engine calls"}
        return {"calls": timing.operator_calls(made.step), "calls_are": "torch operators"}

    def _time(
        self,
        configuration: Configuration,
        built: dict[str, torch.optim.Optimizer],
        rows: dict[str, dict[str, Any]],
    ) -> None:
        """Fill in step times, bandwidths and speed-ups."""
        if self.memory is None or self.stopwatch is None:
            self.memory = timing.Memory(self.device)
            self.stopwatch = timing.Stopwatch(self.device)
        moved = {name: configuration.case.elements * rows[name]["bytes_per_parameter"] for name in built}
        # Where nothing fits into the caches anyway, warm caches would tell nothing new.
        warm = self.device.type == "cpu" and max(moved.values()) < timing.cache_bytes(self.device)
        sample = self.stopwatch.sample
        samplers = {name: functools.partial(sample, made.step, warm) for name, made in built.items()}
        samplers[COPY] = functools.partial(sample, self.memory.copy)
        samplers[IN_PLACE] = functools.partial(sample, self.memory.pass_in_place)
        others = timing.OtherLoad()
        samples = self._interleaved(samplers)
        load = others.cores()

        kind = "device" if self.device.type == "cuda" else "step"  # the time in which the bytes are moved
        copy = self.memory.bytes / timing.summary(samples.pop(COPY)[kind])["median"]
        memory = max(copy, self.memory.bytes / timing.summary(samples.pop(IN_PLACE)[kind])["median"])
        for name, taken in samples.items():
            speed = moved[name] / timing.summary(taken[kind])["median"]
            rows[name] |= {
                key: timing.summary(taken[source], scale)
                for source, key, scale in (
                    ("step", "step_ms", 1e3),
                    ("warm", "warm_ms", 1e3),
                    ("device", "device_ms", 1e3),
                    ("host", "host_us", 1e6),
                )
                if source in taken
            }
            rows[name] |= {
                "gb_per_s": speed / 1e9,
                "copy_gb_per_s": copy / 1e9,
                "memory_gb_per_s": memory / 1e9,
                "copy_share": speed / copy,
                "memory_share": speed / memory,
                "other_load": load,
            }
        others = [rows[name] for name in samples if peers.is_compared_with(name) and not name.endswith(peers.PLAIN)]
        baseline = min(
            others, key=lambda row: (row["contender"] != peers.FUSED, row["step_ms"]["median"]), default=None
        )
        for row in (rows[name] for name in samples) if baseline is not None else ():
            row["baseline"] = baseline["contender"]
            row["speedup"] = baseline["step_ms"]["median"] / row["step_ms"]["median"]
            if row["warm_ms"]:
                row["warm_speedup"] = baseline["warm_ms"]["median"] / row["warm_ms"]["median"]

    def _time_host(
        self, configuration: Configuration, contenders: Sequence[Contender], rows: dict[str, dict[str, Any]]
    ) -> None:
        """Fill in the host time on a CPU, where the call itself does the work.

        It is the time of a step over as many parameters of one element each: the work is gone, and what is left is what
        the step costs per call and per parameter.
        """
        if self.device.type == "cuda":
            return
        case, dtype, threads = configuration.case, configuration.dtype, configuration.threads
        keys = {c.name: (configuration.optimizer.name, dtype, threads, case.tensors, c.name) for c in contenders}
        samplers = {}
        for contender in contenders:
            if keys[contender.name] not in self.host_times:
                params = check.make_parameters([(1,)] * case.tensors, DTYPES[dtype], self.device)
                made = contender.build(params)
                if configuration.optimizer.chain:
                    made.begin_timing()
                samplers[contender.name] = functools.partial(timing.host_sample, made)
        if samplers:
            for name, taken in self._interleaved(samplers, 0.4).items():  # fewer: this varies less than memory does
                self.host_times[keys[name]] = {
                    "host_us": timing.summary(taken["host"], 1e6),
                    "host_fresh_us": timing.summary(taken["fresh"], 1e6),
                }
        for name, key in keys.items():
            rows[name] |= self.host_times[key]

    def _interleaved(
        self, samplers: dict[str, Callable[[], dict[str, float]]], share: float = 1.0
    ) -> dict[str, dict[str, list[float]]]:
        effort = self.effort
        return timing.interleaved(samplers, share * effort.seconds, self.rounds, effort.min_rounds, effort.max_rounds)


def park_states(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
    """Free the memory of the states, by putting tensors of the same kind without memory in their place.

    No step can be taken before `share_states`.
    """
    for param in params:
        state = optimizer.state.get(param, {})
        for name, value in state.items():
            # Another tensor class may have more memory than one can see, and a step counter is needed as it is.
            if type(value) is Tensor and value.shape == param.shape and name != "step":
                state[name] = value.to("meta")


def share_states(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], pool: dict[tuple[Any, ...], Tensor]
) -> None:
    """Give the optimizer states from ``pool`` in place of the parked ones; states of the same kind are shared.

    All contenders then step over the very same memory, and none is favoured by where its states happen to lie; a case
    also needs memory for one of them only.
    """
    for index, param in enumerate(params):
        state = optimizer.state.get(param, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.is_meta:
                key = (index, name, value.dtype, value.stride())
                if key not in pool:
                    pool[key] = torch.zeros_like(value, device=param.device)
                state[name] = pool[key]


def available_bytes(device: torch.device) -> int:
    """Memory that can be had now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return sys.maxsize
