"""The command `fusedstep bench`: a run from its options to its exit code.

It goes through the configurations, goes on with a run that was stopped, saves what has been measured and shows it. The
options are in arguments.py; how a configuration is measured is in measurement.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import peers, precision, results
from .arguments import add_arguments, chosen_backends, command_line, configurations, missing_packages
from .measurement import FAILED, FULL, QUICK, WRONG, Bench

ELEMENTS, QUICK_ELEMENTS = 20_000_000, 2_000_000  # of the tensor for which `precision` counts bytes


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
