"""The command `fusedstep bench`: which configurations are measured, and how one is."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import check, models, peers, precision, results, timing
from .models import Case
from .peers import Contender, Optimizer

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
ELEMENTS, QUICK_ELEMENTS = 20_000_000, 2_000_000  # of the tensor for which `precision` counts bytes


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


# The command line


def _name(kind: str, allowed: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of ``allowed``, in any case of letters."""

    def parse(text: str) -> str:
        for name in allowed:
            if name.lower() == text.lower():
                return name
        raise argparse.ArgumentTypeError(f"there is no {kind} {text!r}; choose from {', '.join(allowed)}")

    return parse


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"there is no device {text!r}; choose cpu, cuda or for example cuda:1")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise argparse.ArgumentTypeError(f"{text!r} is not there: torch sees {count} CUDA devices")
    return device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fusedstep bench`."""
    optimizers = [optimizer.name for optimizer in peers.OPTIMIZERS]
    cases = [case.name for case in models.CASES]
    add = parser.add_argument
    add(
        "--optimizer",
        action="append",
        metavar="NAME",
        type=_name("optimizer", optimizers),
        help=f"what to measure, may be repeated: {', '.join(optimizers)} (default: all)",
    )
    add(
        "--case",
        action="append",
        metavar="NAME",
        type=_name("case", cases),
        help=f"parameter list, may be repeated: {', '.join(cases)} (default: those that suit the device)",
    )
    add(
        "--dtype",
        action="append",
        metavar="DTYPE",
        type=_name("dtype", list(DTYPES)),
        help=f"of parameters, gradients and states, may be repeated: {', '.join(DTYPES)} (default: both)",
    )
    add("--device", metavar="DEVICE", type=_device, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add(
        "--backend",
        action="append",
        metavar="NAME",
        type=_name("backend", peers.BACKENDS),
        help=f"of fusedstep, may be repeated: {', '.join(peers.BACKENDS)} "
        "(default: all that can run on the device, without reference)",
    )
    add("--threads", metavar="N", type=_positive, help="CPU threads (default: as many as torch uses)")
    add("--rounds", metavar="N", type=_positive, help="time every contender N times (default: by time, 3 to 30)")
    add("--quick", action="store_true", help="fewer cases and rounds, under a minute: a look, not a measurement")
    add("--check-only", action="store_true", help="only check the results; nothing is timed or written")
    add(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=results.DEFAULT_FOLDER,
        help="where the results file goes (default: %(default)s)",
    )
    add(
        "--precision",
        action="store_true",
        help="AdamW with each of the precision options instead; on a CPU the bytes that they move and keep, too",
    )
    add(
        "--resume",
        metavar="FILE",
        type=Path,
        help="go on with a run of the same command that was stopped; its results file has what was measured until then",
    )
    add("--plot", action="store_true", help="draw the speed-ups into a PNG beside the results file")
    add("--json", action="store_true", help="print the results as JSON and nothing else")


def command_line(args: argparse.Namespace) -> str:
    """The command that repeats a run; without --output and --resume, which have no influence on what is measured."""
    words = ["fusedstep", "bench"]
    for option in ("optimizer", "case", "dtype", "device", "backend", "threads", "rounds"):
        values = getattr(args, option)
        for value in values if isinstance(values, list) else [values]:
            words += [f"--{option}", str(value)] if value is not None else []
    flags = ("precision", "quick", "check_only", "plot")
    words += [f"--{option.replace('_', '-')}" for option in flags if getattr(args, option)]
    return shlex.join(words)


def configurations(args: argparse.Namespace, device: torch.device) -> list[Configuration]:
    """What to measure, in order."""
    if args.optimizer:
        chosen = [optimizer for optimizer in peers.OPTIMIZERS if optimizer.name in args.optimizer]
    else:
        chosen = [optimizer for optimizer in peers.OPTIMIZERS if bool(optimizer.precision) == args.precision]
    if args.quick and not args.optimizer and not args.precision:
        chosen = [optimizer for optimizer in chosen if optimizer.every_case]
    threads = args.threads or torch.get_num_threads()
    found = []
    for optimizer in chosen:
        for case in models.CASES:
            if args.case:
                wanted = case.name in args.case
            else:
                broad = bool(args.optimizer) or optimizer.every_case or case.every_optimizer
                wanted = device.type in case.devices and (case.quick if args.quick else broad)
            for dtype in DTYPES:
                if wanted and optimizer.takes(DTYPES[dtype]) and (not args.dtype or dtype in args.dtype):
                    found.append(Configuration(optimizer, case, dtype, threads))
                    one_thread = case.one_thread and dtype == "fp32" and device.type == "cpu" and not args.quick
                    if one_thread and threads > 1 and not args.threads:
                        found.append(Configuration(optimizer, case, dtype, 1))
    return found


def missing_packages(args: argparse.Namespace) -> list[str]:
    """Packages that the output needs and that are not installed."""
    needed = ([] if args.json else ["rich"]) + (["matplotlib"] if args.plot else [])
    return [name for name in needed if importlib.util.find_spec(name) is None]


def chosen_backends(args: argparse.Namespace, device: torch.device) -> list[str]:
    """The backends of fusedstep to measure; one that was asked for and cannot run ends the program with its reasons."""
    if not args.backend:
        return [name for name in peers.BACKENDS if name != "reference" and not peers.backend_reasons(name, device)]
    names = [name for name in peers.BACKENDS if name in args.backend]
    for name in names:
        reasons = peers.backend_reasons(name, device)
        if reasons:
            raise ValueError(f"--backend {name} cannot be measured on {device}: {'; '.join(reasons)}")
    return names


def run(args: argparse.Namespace) -> int:
    """Run the benchmark.

    Returns an exit code: 0, or 1 if a result of fusedstep is wrong, or 2 if the run is impossible as asked for. Wrong
    results of others are reported and not timed, and leave the exit code alone.
    """
    missing = missing_packages(args)
    if missing:
        print(f"fusedstep bench needs {' and '.join(missing)}: pip install 'fusedstep[bench]'", file=sys.stderr)
        return 2
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    try:
        backends = chosen_backends(args, device)
    except ValueError as error:
        print(f"fusedstep bench: {error}", file=sys.stderr)
        return 2

    todo = configurations(args, device)
    bench = Bench(device, backends, QUICK if args.quick else FULL, args.rounds, args.check_only)
    settings = {
        "optimizers": list(dict.fromkeys(configuration.optimizer.name for configuration in todo)),
        "all_optimizers": not (args.optimizer or args.quick or args.precision),
        "precision": args.precision,
        "backends": backends,
        "rounds": args.rounds,
        "seconds_per_contender": bench.effort.seconds,
        "quick": args.quick,
        "check_only": args.check_only,
    }
    found = results.header(device, command_line(args), settings)
    found["peers"] = peers.peer_versions()
    found["rows"] = []
    if args.resume is not None:
        try:
            results.resume(found, args.resume)
        except ValueError as error:
            print(f"fusedstep bench: {error}", file=sys.stderr)
            return 2
    measured = {(row["optimizer"], row["case"], row["dtype"], row["threads"]) for row in found["rows"]}
    with _progress(args, len(todo)) as advance:
        for left, configuration in zip(reversed(range(len(todo))), todo, strict=True):
            what = f"{configuration.optimizer.name}, {configuration.case.title}, {configuration.dtype}"
            key = configuration.optimizer.name, configuration.case.name, configuration.dtype, configuration.threads
            if key not in measured:
                found["rows"] += bench.run(configuration, lambda stage, what=what: advance(f"{what}: {stage}", 0))
                found["configurations_left"] = left
                if not args.check_only:
                    results.save(found, args.output)  # a run that is stopped loses nothing
            advance(what, 1)
    found.pop("configurations_left", None)
    if args.precision and not args.check_only and precision.can_count(device):
        found["bytes"] = precision.measure(QUICK_ELEMENTS if args.quick else ELEMENTS)

    path = None if args.check_only else results.save(found, args.output)
    picture = None
    if args.plot and path is not None:
        from . import plot

        picture = plot.draw(found, path.with_suffix(".png"))
    if args.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        from . import table

        table.show(found)
        for written in filter(None, (path, picture)):
            print(f"written: {written}")
    return exit_code(found)


def exit_code(found: dict[str, Any]) -> int:
    """1 if a result of fusedstep is wrong, else 0."""
    return int(any(row["ours"] and row["status"] in (WRONG, FAILED) for row in found["rows"]))


@contextlib.contextmanager
def _progress(args: argparse.Namespace, total: int) -> Iterator[Callable[[str, int], None]]:
    """Something to tell what is going on and how many configurations are done; a bar on a terminal's standard error."""
    if importlib.util.find_spec("rich") is None:
        yield lambda text, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda text, done: progress.update(task, description=text, advance=done)


def main(argv: Sequence[str] | None = None) -> int:
    """`fusedstep bench` on its own."""
    parser = argparse.ArgumentParser(prog="fusedstep bench", description="Step times against torch.optim and others.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
