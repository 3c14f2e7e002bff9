"""The markdown tables of a results file: `python -m fusedstep.bench.report [--brief] FILE.json [OPTIMIZER ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from . import peers, results

TORCH = ("torch for-loop", "torch foreach", "torch fused")

NOTABLE_LOAD = 0.2  # cores used by other processes, above which the times are doubtful

Block = dict[str, dict[str, Any]]  # rows of one case, by contender


def blocks(found: dict[str, Any], optimizers: list[str] | None = None) -> list[tuple[str, list[Block]]]:
    """The rows of a results file by optimizer and case.

    Raises:
        ValueError: one of ``optimizers`` is not in the file.
    """
    present = list(dict.fromkeys(row["optimizer"] for row in found["rows"]))
    for name in optimizers or ():
        if name not in present:
            raise ValueError(f"there is no {name!r} in the results; there are {', '.join(present)}")
    grouped = []
    for optimizer in present:
        if not optimizers or optimizer in optimizers:
            rows = [row for row in found["rows"] if row["optimizer"] == optimizer]
            cases = groupby(rows, lambda row: (row["case"], row["dtype"], row["threads"]))
            grouped.append((optimizer, [{row["contender"]: row for row in case} for _, case in cases]))
    return grouped


def best_of_ours(block: Block) -> dict[str, Any] | None:
    """The fastest row of fusedstep that was timed."""
    ours = [row for name, row in block.items() if not peers.is_compared_with(name) and row["step_ms"]]
    return min(ours, key=lambda row: row["step_ms"]["median"], default=None)


def others(cases: list[Block]) -> list[str]:
    """The contenders that fusedstep's kernels are compared with in a table: those that were timed."""
    names = dict.fromkeys(name for block in cases for name in block if peers.is_compared_with(name))
    return [name for name in names if any(name in block and block[name]["step_ms"] for block in cases)]


def case_label(row: dict[str, Any], cases: list[Block]) -> str:
    """The case and its dtype, and the number of threads where the case was measured with several."""
    label = f"{row['title']}, {row['dtype']}"
    first_rows = [next(iter(block.values())) for block in cases]
    if len({r["threads"] for r in first_rows if (r["case"], r["dtype"]) == (row["case"], row["dtype"])}) > 1:
        label += f", {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    return label


def number(value: float) -> str:
    """About three significant digits, without an exponent."""
    for digits, limit in ((4, 0.1), (3, 1), (2, 10), (1, 100)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def of_memory(row: dict[str, Any], device: str) -> float:
    """The speed of a row as a share of the memory's.

    On a GPU that is the speed of a copy. A CPU also reads the lines that a copy is about to overwrite, unlike those of
    an optimizer, which has read them already; there it is that of a pass in place, if that is faster.
    """
    return row["copy_share"] if device == "cuda" else row["memory_share"]


def ratio(value: float) -> str:
    """A speed-up, like "1.25x" or "24.8x"."""
    return f"{value:.2f}x" if value < 10 else f"{number(value)}x"


def markdown(found: dict[str, Any], optimizers: list[str] | None = None, brief: bool = False) -> str:
    """Tables of median step times, and a line about the machine.

    Args:
        found: the content of a results file.
        optimizers: which ones; None: all.
        brief: one table for all, with the contender that the speed-up refers to; otherwise one per optimizer with all.

    Raises:
        ValueError: one of ``optimizers`` is not in the file.
    """
    device = found["device"]["type"]
    tables = _brief if brief else _full
    lines = tables(blocks(found, optimizers), device)
    memory = "a copy" if device == "cuda" else "reading and writing memory in place"
    notes = [
        "Medians of whole `step()` calls in interleaved rounds, caches flushed before each; speed-up over torch "
        "fused, or where torch has no fused one over the fastest of the others"
    ]
    notes += ["warm caches: the same after a few steps in a row"] if device == "cpu" else []
    notes += [f"share: of the speed of {memory} in the same run. {results.describe(found)}"]
    load = max((row["other_load"] or 0.0 for row in found["rows"]), default=0.0)
    notes += [f"other processes used up to {load:.1f} cores meanwhile"] if load > NOTABLE_LOAD else []
    lines += ["", f"{'; '.join(notes)}. Written by `{found['command']}`."]
    if found.get("bytes"):
        lines += _bytes(found["bytes"])
    return "\n".join(lines).lstrip("\n")


def table_head(words: list[str], numbers: list[str]) -> list[str]:
    """The head of a table with columns of words, then of numbers."""
    return ["", f"| {' | '.join(words + numbers)} |", "|" + "---|" * len(words) + "---:|" * len(numbers)]


def _full(grouped: list[tuple[str, list[Block]]], device: str) -> list[str]:
    lines = []
    for optimizer, cases in grouped:
        columns = others(cases)
        heads = [f"{name}, ms" for name in columns] + ["fusedstep, ms", "speed-up"]
        heads += ["warm caches"] if device == "cpu" else []
        lines += table_head([optimizer], [*heads, "GB/s (share)", "host, us", "calls"])
        lines += [_line(block, cases, columns, device) for block in cases]
    return lines


def _brief(grouped: list[tuple[str, list[Block]]], device: str) -> list[str]:
    plain = any(name.endswith(peers.PLAIN) for _, cases in grouped for block in cases for name in block)
    heads = ["its ms", *(["fusedstep plain, ms"] if plain else []), "fusedstep, ms", "speed-up"]
    heads += [*(["warm caches"] if device == "cpu" else []), "GB/s (share)"]
    lines = table_head(["optimizer", "case", "compared with"], heads)
    for optimizer, cases in grouped:
        for block in cases:
            ours = best_of_ours(block)
            other = block.get(ours["baseline"]) if ours else None
            cells = [optimizer, case_label(next(iter(block.values())), cases)]
            cells += [other["contender"] if other else "-", _milliseconds(other)]
            cells += [_milliseconds(block.get(f"{ours['contender']}{peers.PLAIN}" if ours else None))] if plain else []
            lines.append(f"| {' | '.join(cells + _ours(ours, block, device))} |")
    return lines


def _bytes(rows: list[dict[str, Any]]) -> list[str]:
    """What `precision.measure` has counted."""
    lines = table_head(
        ["parameter, gradient", "AdamW"], ["bytes moved (read + written)", "memory of weight and states"]
    )
    for row in rows:
        total = f"{row['read'] + row['written']:.1f} ({row['read']:.1f} + {row['written']:.1f})"
        lines.append(f"| {row['dtype']} | {row['mode']} | {total} | {row['memory']:.1f} |")
    note = f"For each of {rows[0]['elements']:,} parameters in one tensor, counted by pages of memory in the same run."
    return [*lines, "", note]


def _line(block: Block, cases: list[Block], columns: list[str], device: str) -> str:
    ours = best_of_ours(block)
    cells = [_milliseconds(block.get(name)) for name in columns] + _ours(ours, block, device)
    if ours is None:
        cells += ["", ""]
    else:
        cells.append(number(ours["host_us"]["median"]) if ours["host_us"] else "")
        cells.append("" if ours["calls"] is None else str(ours["calls"]))
    return f"| {case_label(next(iter(block.values())), cases)} | {' | '.join(cells)} |"


def _ours(ours: dict[str, Any] | None, block: Block, device: str) -> list[str]:
    """The cells for fusedstep's time, its speed-up with cold and warm caches, and its speed."""
    if ours is None:
        status = next((row["status"] for row in block.values() if row["ours"]), "not measured")
        return [status, *[""] * (3 if device == "cpu" else 2)]
    cells = [f"**{_milliseconds(ours)}**", f"**{_ratio(ours['speedup'])}**"]
    cells += [_ratio(ours["warm_speedup"])] if device == "cpu" else []
    return [*cells, f"{number(ours['gb_per_s'])} ({of_memory(ours, device):.0%})"]


def _ratio(value: float | None) -> str:
    return ratio(value) if value else "-"


def _milliseconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return number(row["step_ms"]["median"]) if row["step_ms"] else row["status"]


def text(argv: list[str]) -> str:
    """What `python -m fusedstep.bench.report` prints for these arguments.

    Raises:
        ValueError: the file is no results file, or lacks one of the optimizers.
    """
    parser = argparse.ArgumentParser(prog="python -m fusedstep.bench.report", description=__doc__)
    parser.add_argument("file", metavar="FILE.json", type=Path)
    parser.add_argument("optimizers", metavar="OPTIMIZER", nargs="*")
    parser.add_argument("--brief", action="store_true", help="one table for all optimizers")
    args = parser.parse_args(argv)
    return markdown(results.load(args.file), args.optimizers, args.brief)


def print_text(text: Callable[[list[str]], str], argv: list[str]) -> int:
    """Print what ``text`` makes of the arguments, or its ``ValueError`` in one line; returns an exit code."""
    try:
        print(text(argv))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def main(argv: list[str]) -> int:
    """Print the tables of a results file; returns an exit code."""
    return print_text(text, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
