"""`fusedstep bench --precision`: what each precision option costs in bytes and time, all of it measured.

Bytes moved are those of the memory pages that one step reads and writes, as the kernel of Linux counts them; memory is
what the process has grown by for weights, states and whatever else lives on after a step. Neither knows what the
options should cost.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusedstep

from ..cases import PRECISION

PAGE = 4096
FP32, BF16 = torch.float32, torch.bfloat16
TORCH = "torch fused"

# Name, dtype of parameter and gradient, options; None: torch.optim.AdamW(fused=True).
MODES: list[tuple[str, torch.dtype, dict[str, Any] | None]] = [
    (TORCH, FP32, None),
    ("plain", FP32, {}),
    *((name, FP32, PRECISION[name]) for name in ("bf16 states", "8-bit states")),
    (TORCH, BF16, None),
    ("plain", BF16, {}),
    *((name, BF16, options) for name, options in PRECISION.items() if name != "bf16 states"),
]


def make(
    n: int, dtype: torch.dtype, options: dict[str, Any] | None
) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """AdamW over one tensor with a gradient, after its first steps."""
    param = torch.nn.Parameter(torch.empty(n, dtype=dtype).uniform_(-1, 1))
    param.grad = torch.empty_like(param).uniform_(-1, 1)
    if options is None:
        optimizer = torch.optim.AdamW([param], lr=1e-3, fused=True)
    else:
        optimizer = fusedstep.AdamW([param], lr=1e-3, **options)
    for _ in range(2):
        optimizer.step()
    return param, optimizer


def pages(field: str) -> int:
    """Bytes of this process's memory for which a field of /proc/self/smaps counts."""
    lines = re.findall(rf"^{field}: +([0-9]+) kB", Path("/proc/self/smaps").read_text(), re.MULTILINE)
    return sum(map(int, lines)) << 10


def written_pages() -> int:
    """Bytes of the pages that were written since the soft-dirty bits were cleared."""
    dirty = 0
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
            if last >= 1 << 47:
                continue
            pagemap.seek(first // PAGE * 8)
            words = torch.frombuffer(bytearray(pagemap.read((last - first) // PAGE * 8)), dtype=torch.int64)
            dirty += int((words >> 55 & 1).sum())
    return dirty * PAGE


def moved(step: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of the pages that a step touches, and of those that it writes."""
    clear = Path("/proc/self/clear_refs")
    clear.write_text("4")  # soft-dirty
    step()
    written = written_pages()
    clear.write_text("1")  # referenced
    step()
    return pages("Referenced"), written


def measure_bytes(n: int, dtype: torch.dtype, options: dict[str, Any] | None) -> dict[str, float]:
    """Bytes for each parameter: read, written, and of memory beside the gradient."""
    gc.collect()
    before = pages("Rss")
    param, optimizer = make(n, dtype, options)
    gc.collect()
    kept = pages("Rss") - before - param.grad.nbytes
    nothing = [sum(values) for values in zip(*(moved(lambda: None) for _ in range(3)), strict=True)]
    touched, written = moved(optimizer.step)
    touched, written = touched - nothing[0] / 3, written - nothing[1] / 3
    return {"read": touched / n, "written": written / n, "memory": kept / n}


def measure_time(n: int, rounds: int) -> list[float]:
    """Median milliseconds of a step in each mode; the modes take turns, so that they meet the same machine."""
    made = [make(n, dtype, options) for _, dtype, options in MODES]
    taken: list[list[float]] = [[] for _ in made]
    for _ in range(rounds):
        for times, (_, optimizer) in zip(taken, made, strict=True):
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
    return [1e3 * statistics.median(times) for times in taken]


def measure(n: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each mode."""
    rows = []
    for (name, dtype, options), step_ms in zip(MODES, measure_time(n, rounds), strict=True):
        rows.append(
            {
                "mode": name,
                "dtype": str(dtype).removeprefix("torch."),
                "step_ms": step_ms,
                **measure_bytes(n, dtype, options),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    own = next(row["step_ms"] for row in rows if row["mode"] == "plain")
    lines = [
        "| parameter, gradient | AdamW with | bytes moved | memory (weight and states) | step, of our plain fp32 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        total = row["read"] + row["written"]
        lines.append(
            f"| {row['dtype']} | {row['mode']} | {total:.1f} ({row['read']:.1f} + {row['written']:.1f}) "
            f"| {row['memory']:.1f} | {row['step_ms'] / own:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m fusedstep.bench.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=50_000_000, help="in one tensor (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of timing (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    rows = measure(args.elements, args.rounds)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
