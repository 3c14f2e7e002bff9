"""The markdown table of what `make gpu-first` wrote: `python -m fusedstep.bench.gpu_report FILE ... [--case CASE]`.

The first file says which cases there are. A contender that it lacks is taken from the next file that has it: torch
need not be timed again in each run on the same kind of card.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .report import number, print_text, table_head

COLUMNS = {
    "fusedstep cuda": "CUDA",
    "fusedstep triton": "Triton",
    "torch fused": "torch fused",
    "torch foreach": "torch foreach",
}
LARGE = 10**8  # elements; the share of a copy's speed says nothing about what fits into the caches


def load(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, Any]]]]:
    """The header of a file, and its rows by case and contender.

    Raises:
        ValueError: the file is not one of `make gpu-first`, or was written without a GPU.
    """
    try:
        header, *rows = (json.loads(line) for line in path.read_text().splitlines())
        header["copy_gb_per_s"], header["git"]["commit"], header["device"]["gpu"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file that `make gpu-first` wrote on a GPU: {error!r}") from error
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row.get("ms"):
            cases.setdefault(row["case"], {})[row["contender"]] = row
    return header, cases


def markdown(paths: list[Path], chosen: list[str] | None = None) -> str:
    """A table of the times of the device, and a line about what ran where.

    Args:
        paths: the first file names the cases; the others add contenders that it lacks.
        chosen: which cases, in this order; None: all of the first file.

    Raises:
        ValueError: a file cannot be read, the files are of different cards, or a case is missing.
    """
    headers, files = zip(*map(load, paths), strict=True)
    cards = {header["device"]["gpu"] for header in headers}
    if len(cards) > 1:
        raise ValueError(f"the files are of different cards: {', '.join(sorted(cards))}")
    if missing := [case for case in chosen or () if case not in files[0]]:
        raise ValueError(f"{paths[0]} has no case {missing[0]!r}; it has {', '.join(files[0])}")
    cases = chosen or list(files[0])
    columns = [name for name in COLUMNS if any(name in file.get(case, {}) for case in cases for file in files)]
    lines = table_head(["ms (share of a copy's speed)"], [COLUMNS[name] for name in columns])
    used = set()
    for case in cases:
        cells = [case]
        for contender in columns:
            source = next((k for k, file in enumerate(files) if contender in file.get(case, {})), None)
            if source is None:
                cells.append("")
                continue
            used.add((contender.split()[0], source))
            row = files[source][case][contender]
            share = f" ({row['copy_share']:.0%})" if row["elements"] >= LARGE else ""
            cells.append(f"{number(row['ms'])}{share}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _note(headers, sorted(used))]).lstrip("\n")


def _note(headers: tuple[dict[str, Any], ...], used: list[tuple[str, int]]) -> str:
    device, versions = headers[0]["device"], headers[0]["versions"]
    runs = [f"{who} in a run of commit {headers[source]['git']['commit'][:7]}" for who, source in used]
    copies = [f"{headers[source]['copy_gb_per_s']:,.0f}" for source in sorted({source for _, source in used})]
    return (
        f"Times of the device, by events around calls in a row, median of windows. {device['gpu']} "
        f"({device['multiprocessors']} multiprocessors), torch {versions['torch']}, Triton {versions['triton']}, "
        f"Python {versions['python']}; {', '.join(runs)}; a copy of 4.3 GB moved {' and '.join(copies)} GB/s (read + "
        "written)."
    )


def text(argv: list[str]) -> str:
    """What `python -m fusedstep.bench.gpu_report` prints for these arguments.

    Raises:
        ValueError: as `markdown`.
    """
    parser = argparse.ArgumentParser(prog="python -m fusedstep.bench.gpu_report", description=__doc__)
    parser.add_argument("files", metavar="FILE.jsonl", type=Path, nargs="+")
    parser.add_argument("--case", action="append", help="a case of the first file; may be repeated (default: all)")
    args = parser.parse_args(argv)
    return markdown(args.files, args.case)


def main(argv: list[str]) -> int:
    """Print the table; returns an exit code."""
    return print_text(text, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
