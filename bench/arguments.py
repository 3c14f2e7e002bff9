"""The options of `fusedstep bench`, and what they ask for: configurations, backends, packages, the command again.

Nothing is measured, printed or written here.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import models, peers, results
from .measurement import DTYPES, Configuration
from .optimizers import OPTIMIZERS


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
    optimizers = [optimizer.name for optimizer in OPTIMIZERS]
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
        chosen = [optimizer for optimizer in OPTIMIZERS if optimizer.name in args.optimizer]
    else:
        chosen = [optimizer for optimizer in OPTIMIZERS if bool(optimizer.precision) == args.precision]
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
