"""`fusedstep bench --precision`: what each precision option costs in bytes and time, all of it measured.

Bytes read are those of the memory pages that one step touches, as the kernel of Linux counts them: what is only written
is fetched into the caches too. Bytes written are those of the pages that have other contents after a step; memory is
what the process has grown by for weights, states and whatever else lives on after a step. None of them knows what the
options should cost.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedstep

from ..cases import PRECISION

PAGE = 4096
MMAP_THRESHOLD = -3  # of mallopt
FULL, QUICK = (50_000_000, 15), (2_000_000, 3)  # elements, rounds
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


def touched(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the pages that a step touches, beyond those that are touched in any case."""

    def in_the_meantime(work: bool) -> int:
        Path("/proc/self/clear_refs").write_text("1")
        if work:
            optimizer.step()
        return pages("Referenced")

    # The system looks through memory too, now and then.
    return statistics.median(in_the_meantime(True) - in_the_meantime(False) for _ in range(3))


def own_memory() -> list[Tensor]:
    """All that this process may write and no file is behind, as 64-bit words."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, inode, *_ = line.split()
        if rights.startswith("rw") and inode == "0":
            first, last = (int(address, 16) for address in addresses.split("-"))
            found.append(torch.frombuffer((ctypes.c_char * (last - first)).from_address(first), dtype=torch.int64))
    return found


def written(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the pages that a step changes."""
    memory = own_memory()
    before = [words.clone() for words in memory]
    optimizer.step()
    changed = 0
    for words, old in zip(memory, before, strict=True):
        for some, other in zip(words.split(1 << 20), old.split(1 << 20), strict=True):
            changed += int((some != other).view(-1, PAGE // 8).any(1).sum())
    return changed * PAGE


def measure_bytes(n: int, dtype: torch.dtype, options: dict[str, Any] | None) -> dict[str, float]:
    """Bytes for each parameter: read, written, and of memory beside the gradient."""
    gc.collect()
    before = pages("Rss")
    param, optimizer = make(n, dtype, options)
    gc.collect()
    kept = pages("Rss") - before - param.grad.nbytes
    read = touched(optimizer)
    # The same gradient again would leave 8-bit codes as they are: a block's numbers change by the same factor.
    param.grad.uniform_(-1, 1)
    return {"read": read / n, "written": written(optimizer) / n, "memory": kept / n}


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


def run(args: argparse.Namespace) -> int:
    """Print the table; 2 if this machine cannot count pages."""
    if not Path("/proc/self/clear_refs").exists() or (args.device is not None and args.device.type != "cpu"):
        print(
            "fusedstep bench --precision counts pages of the host's memory: it needs Linux and the CPU", file=sys.stderr
        )
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    # Each tensor gets pages of its own, which go back to the system when it is freed.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    elements, rounds = QUICK if args.quick else FULL
    rows = measure(elements, args.rounds or rounds)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0
