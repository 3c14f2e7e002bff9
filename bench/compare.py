"""Whether a row has become slower: `make bench-check` measures again what is committed of this processor and compares.

Not times are compared but ratios to the baseline of the same run, mostly torch's fused step, which noise of the machine
leaves alone more than times.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import results, suite

# What two runs must share to be compared.
SAME = ("type", "cpu", "gpu", "threads", "instruction_set", "cpu_isa")


class Change(NamedTuple):
    """One row's speed-up over its baseline, in an older and in a newer run."""

    optimizer: str
    case: str
    dtype: str
    threads: int
    contender: str
    caches: str
    before: float
    after: float | None  # None: the row is missing, or its result is wrong

    def fell(self, tolerance: float) -> bool:
        return self.after is None or self.after < self.before * (1 - tolerance)


def ratios(run: dict[str, Any]) -> dict[tuple[Any, ...], float]:
    """Speed-ups of fusedstep's rows, by what names a row."""
    found = {}
    for row in run["rows"]:
        if not row["ours"] or row["status"] != "ok":
            continue
        name = tuple(row[key] for key in ("optimizer", "case", "dtype", "threads", "contender"))
        for caches, key in (("flushed", "speedup"), ("warm", "warm_speedup")):
            if row[key] is not None:
                found[(*name, caches)] = row[key]
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """Every row of the older run that has a ratio.

    Raises:
        ValueError: the runs are of different processors, threads or instruction sets.
    """
    for key in SAME:
        old, new = before["device"].get(key), after["device"].get(key)
        if old != new:
            raise ValueError(f"the runs cannot be compared: {key} is {old!r} in one and {new!r} in the other")
    new_ratios = ratios(after)
    for name, ratio in ratios(before).items():
        yield Change(*name, before=ratio, after=new_ratios.get(name))


def committed(folder: Path, device: dict[str, Any]) -> list[dict[str, Any]]:
    """The newest results of each command on such a device."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        run = results.load(path)
        if all(run["device"].get(key) == device.get(key) for key in SAME):
            other = newest.get(run["command"])
            if other is None or other["created"] < run["created"]:
                newest[run["command"]] = run
    return list(newest.values())


def again(command: str) -> dict[str, Any]:
    """The results of the same command, measured now.

    Raises:
        RuntimeError: it could not run, or a result of fusedstep is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*shlex.split(command)[2:], "--output", folder]
        if code := suite.main(arguments):
            raise RuntimeError(f"`{command}` ended with {code}")
        (path,) = Path(folder).glob("*.json")
        return results.load(path)


def report(found: Sequence[Change], tolerance: float) -> int:
    """Prints the rows that fell, worst first; returns 1 if there are any."""
    fallen = [change for change in found if change.fell(tolerance)]
    for change in sorted(fallen, key=lambda c: (c.after or 0.0) / c.before):
        after = "missing or wrong" if change.after is None else f"{change.after:.2f}x"
        row = f"{change.optimizer}, {change.case}, {change.dtype}, {change.threads} threads, {change.contender}"
        print(f"fell: {row}, caches {change.caches}: {change.before:.2f}x -> {after}")
    print(f"{len(found)} ratios compared, {len(fallen)} fell by more than {tolerance:.0%}")
    return int(bool(fallen))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if a row fell, or 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m fusedstep.bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="two results files: older, newer")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of a ratio (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=results.DEFAULT_FOLDER, help="default: %(default)s")
    args = parser.parse_args(argv)
    if len(args.files) not in (0, 2):
        parser.error("give two results files, or none to measure again what is committed")
    try:
        if args.files:
            return report(list(changes(*map(results.load, args.files))), args.tolerance)
        device = results.device_facts(torch.device("cpu"))
        runs = committed(args.results, device)
        if not runs:
            print(f"{args.results} has no results of this processor: {device['cpu']}, {device['cpu_isa']}")
            return 2
        return report([change for run in runs for change in changes(run, again(run["command"]))], args.tolerance)
    except (ValueError, RuntimeError) as error:
        print(f"bench-check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
