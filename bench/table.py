"""The tables of a run on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import results
from .report import NOTABLE_LOAD, Block, blocks, case_label, number, of_memory, ratio

MIN_WIDTH = 130  # columns of text, where the output is no terminal that wraps


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print a run: a table per optimizer, then what the columns are and who is missing."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, MIN_WIDTH)
    console.print(escape(results.describe(found)))
    timed = [row for row in found["rows"] if row["step_ms"]]
    for optimizer, cases in blocks(found):
        console.print(_table(optimizer, cases, _columns(found["device"]["type"], bool(timed))))
    if timed:
        console.print(escape(_legend(found, timed)))
        load = max(row["other_load"] or 0.0 for row in timed)
        if load > NOTABLE_LOAD:
            console.print(f"[red]other processes used up to {load:.1f} cores meanwhile: repeat on an idle machine[/]")
    if found.get("bytes"):
        console.print(_bytes(found["bytes"]))
    absent = [name for name, version in found["peers"].items() if version is None]
    if absent:
        console.print(f"not installed, hence not compared: {', '.join(absent)}")
    refused: dict[str, list[str]] = {}
    for row in found["rows"]:
        if row["status"] != "ok":
            why = f"{row['contender']} {row['status'].upper()}: {row['reason']}"
            refused.setdefault(why, []).append(f"{row['optimizer']}, {row['title']}, {row['dtype']}")
    for why, where in refused.items():
        console.print(escape(f"{why} [{where[0]}{f', and {len(where) - 1} more' if where[1:] else ''}]"))


def _bytes(rows: list[dict[str, Any]]) -> Table:
    title = f"[bold]AdamW, bytes for each of {rows[0]['elements']:,} parameters[/]"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("read", "written", "memory of weight and states"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = [f"{row[key]:.1f}" for key in ("read", "written", "memory")]
        table.add_row(f"{row['dtype']}, {row['mode']}", *numbers)
    return table


def _columns(device: str, timed: bool) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Heading and content of the columns after the first."""

    def median(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: number(row[key]["median"]) if row[key] else ""

    def times(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: ratio(row[key]) if row[key] else ""

    columns: dict[str, Callable[[dict[str, Any]], str]] = {"error": _error}
    if not timed:
        return columns
    columns = {"step ms": median("step_ms"), "spread": _spread, "speed": times("speedup")}
    if device == "cuda":
        columns["device ms"] = median("device_ms")
        columns["host us"] = median("host_us")
    else:
        columns |= {"warm ms": median("warm_ms"), "speed ": times("warm_speedup")}
        columns |= {"host us": median("host_us"), "fresh us": median("host_fresh_us")}
    return columns | {
        "calls": lambda row: "" if row["calls"] is None else f"{row['calls']:,}",
        "GB/s": lambda row: number(row["gb_per_s"]) if row["gb_per_s"] else "",
        "share": lambda row: f"{of_memory(row, device):.0%}" if row["gb_per_s"] else "",
        "error": _error,
    }


def _table(optimizer: str, cases: list[Block], columns: dict[str, Callable[[dict[str, Any]], str]]) -> Table:
    table = Table(title=f"[bold]{escape(optimizer)}[/]", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for block in cases:
        table.add_section()
        table.add_row(case_label(next(iter(block.values())), cases), style="italic")
        for row in (row for row in block.values() if row["status"] != "unavailable"):
            style = "bold" if row["ours"] else ""
            table.add_row(f"  {row['contender']}", *(cell(row) for cell in columns.values()), style=style)
    return table


def _spread(row: dict[str, Any]) -> str:
    if not row["step_ms"]:
        return ""
    step = row["step_ms"]
    return f"±{(step['q75'] - step['q25']) / 2 / step['median']:.0%}"


def _error(row: dict[str, Any]) -> str:
    if row["status"] == "ok":
        return f"{row['error']:.1e}"
    return f"[red]{row['status'].upper()}[/]"


def _legend(found: dict[str, Any], timed: list[dict[str, Any]]) -> str:
    kinds = {row["contender"].split()[0]: row["calls_are"] for row in timed if row["calls_are"]}
    calls = ", ".join(f"{kind} of {name}" for name, kind in kinds.items())
    copy = number(max(row["copy_gb_per_s"] for row in timed))
    memory = number(max(row["memory_gb_per_s"] for row in timed))
    lines = [
        "step: a whole step(), caches flushed before; spread: half the distance of the quartiles; "
        "speed: against torch fused, or where there is none the fastest of the others."
    ]
    if found["device"]["type"] == "cuda":
        lines.append("device: its work on the GPU; host us: until the call returns.")
        lines.append(f"share: GB/s in the device time, of a copy's ({copy} GB/s).")
    else:
        lines.append("warm: the same again a few times, where it fits into the caches.")
        lines.append("host us: a step over as many parameters of one element; fresh us: with new gradient tensors.")
        lines.append(f"share: of reading and writing memory in place ({memory} GB/s; a copy does {copy} GB/s).")
    return "\n".join([*lines, f"calls: {calls}."])
