"""What each precision option costs in bytes, all of it counted.

Bytes read are those of the memory pages that one step touches, as the kernel of Linux counts them: what is only written
is fetched into the caches too. Bytes written are those of the pages that have other contents after a step; memory is
what the process has grown by for weights, states and whatever else lives on after a step. None of them knows what the
options should cost.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedstep

from ..cases import PRECISION

PAGE = 4096
MMAP_THRESHOLD = -3  # of mallopt
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


def can_count(device: torch.device) -> bool:
    """Whether the bytes that a step on ``device`` moves can be counted: on a CPU, by the kernel of Linux."""
    return device.type == "cpu" and Path("/proc/self/clear_refs").exists()


def measure(n: int) -> list[dict[str, Any]]:
    """One row for each mode, of AdamW over one tensor of ``n`` elements; in a process that does nothing else."""
    command = [sys.executable, "-m", __name__, str(n)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def rows(n: int) -> list[dict[str, Any]]:
    """What `measure` returns, counted in this process."""
    # Each tensor gets pages of its own, which go back to the system when it is freed.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    for _, dtype, options in MODES:  # what a process loads and keeps once is no mode's
        make(1 << 16, dtype, options)
    gc.freeze()  # what has been imported is not looked through again for each mode
    found = []
    try:
        for name, dtype, options in MODES:
            row = {"mode": name, "dtype": str(dtype).removeprefix("torch."), "elements": n}
            found.append(row | measure_bytes(n, dtype, options))
        return found
    finally:
        gc.unfreeze()  # some libraries complain where nothing collects what they own


if __name__ == "__main__":
    print(json.dumps(rows(int(sys.argv[1]))))
