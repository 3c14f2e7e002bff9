"""`fusedstep verify --distributed N`: training on the parts that N processes have, against one process that has all.

Each row is one optimizer of tensors that are shared out in every way: by rows and columns, evenly and not, with empty
parts, in copies, on a mesh of two dimensions where N is large enough, and not at all. Every process makes the same
steps on the whole tensors besides, and compares its parts. They must be the same to the bit; where a sum goes through
several processes, they are held to `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from . import backends
from .cases import PRECISION, Case, reduces, select_cases
from .sharded_comparison import INFINITY, MODEL, SAVED, TOLERANCE, Comparison, Configuration, ModelComparison, Row

MINUTES = 2  # that a process waits for the others


@dataclass(frozen=True)
class Report:
    """The rows of one run, and what it ran on."""

    rows: tuple[Row, ...]
    processes: int
    device: str
    communication: str

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)


def configurations(optimizers: Sequence[str] | None) -> list[Configuration]:
    """Each rule; and each option and what else there is, with the last one of those that are elementwise.

    Raises:
        ValueError: there is no such optimizer.
    """
    cases = select_cases(optimizers)
    found = [Configuration(case, exact=not reduces(case)) for case in cases]
    elementwise = [case for case in cases if not reduces(case)]
    if not elementwise:
        return found
    last = elementwise[-1]

    def having(**options: Any) -> Case:
        return Case(last.optimizer, {**last.options, **options})

    for options in PRECISION.values():
        narrow = options.keys() & {"master_weights", "kahan", "rounding"}
        found.append(Configuration(having(**options), "bf16" if narrow else "fp32"))
    found.append(Configuration(having(ema_decay=0.9, weights_copy=torch.bfloat16, zero_grads=True)))
    for norm_type in (2.0, math.inf):
        found.append(Configuration(having(max_grad_norm=0.3, norm_type=norm_type), exact=False))
    return [
        *found,
        Configuration(having(skip_nonfinite=True), what=INFINITY),
        Configuration(having(ema_decay=0.9), what=SAVED),
        Configuration(having(), exact=False, what=MODEL),
    ]


def verify(
    processes: int,
    optimizers: Sequence[str] | None = None,
    *,
    backend: str | None = None,
    device: torch.device | str | None = None,
    steps: int = 4,
) -> Report:
    """Compare sharded training in some processes of this machine with training in one.

    Args:
        processes: how many; they are started and ended here.
        optimizers: class names; all if None.
        backend: of the optimizers; None: the default.
        device: "cuda" or "cpu"; None: GPUs if there are as many as processes.
        steps: updates per row.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: this torch or this machine has no processes that could talk to each other.
    """
    kind = _checked_device(processes, device)
    if steps < 1:
        raise ValueError(f"Invalid steps: {steps} (it must be 1 or larger)")
    if backend is not None and backend not in backends.BACKENDS:
        raise ValueError(f"Invalid backend: {backend!r} (it must be one of {', '.join(backends.BACKENDS)})")
    if backend is not None and (reasons := backends.BACKENDS[backend].reasons(torch.device(kind))):
        raise RuntimeError(f"backend {backend!r} cannot run: {'; '.join(reasons)}")
    wanted = configurations(optimizers)
    communication = "nccl" if kind == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        error = ""
        try:
            torch.multiprocessing.spawn(
                _process, (processes, folder, wanted, backend, kind, communication, steps), processes
            )
        except Exception as failure:  # a process's own, with its traceback, or a word of how it ended
            error = str(failure).strip().splitlines()[-1]
        rows = Path(folder, "rows")
        found = [Row(**json.loads(line)) for line in rows.read_text().splitlines()] if rows.exists() else []
    if error:
        at = wanted[min(len(found), len(wanted) - 1)]
        found.append(Row(str(at), at.dtype, at.exact, 0, 0, math.nan, False, error))
    return Report(tuple(found), processes, kind, communication)


def _checked_device(processes: int, device: torch.device | str | None) -> str:
    import torch.distributed as dist

    if not dist.is_available():
        raise RuntimeError("this torch was built without torch.distributed")
    most = max(8, os.cpu_count() or 1)
    if processes < 2:
        raise ValueError(f"Invalid number of processes: {processes} (it must be 2 or larger: one has nothing to share)")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = None if device is None else torch.device(device).type
    if kind not in (None, "cpu", "cuda"):
        raise ValueError(f"Invalid device: {str(device)!r} (it must be cpu or cuda)")
    if kind == "cuda" and gpus < processes:
        raise ValueError(f"Invalid number of processes: {processes} (each needs a GPU, and this machine has {gpus})")
    if kind is None:
        kind = "cuda" if gpus >= processes and dist.is_nccl_available() else "cpu"
    if kind == "cpu" and processes > most:
        raise ValueError(f"Invalid number of processes: {processes} (it must be at most {most} on this machine)")
    if not (dist.is_nccl_available() if kind == "cuda" else dist.is_gloo_available()):
        raise RuntimeError(f"this torch was built without {'NCCL' if kind == 'cuda' else 'gloo'}")
    return kind


# In each of the processes.


def _process(
    rank: int,
    processes: int,
    folder: str,
    wanted: list[Configuration],
    backend: str | None,
    kind: str,
    communication: str,
    steps: int,
) -> None:
    import torch.distributed as dist

    if sys.platform == "linux":  # the name of this machine need not be known to itself
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group(
        communication, store=store, rank=rank, world_size=processes, timeout=timedelta(minutes=MINUTES)
    )
    try:
        for configuration in wanted:
            kind_of = ModelComparison if configuration.what == MODEL else Comparison
            row = kind_of(configuration, device, backend, processes, folder).row(steps)
            if rank == 0:
                with open(f"{folder}/rows", "a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    finally:
        dist.destroy_process_group()


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if everything is as it should be, 1 if not, 2 for a bad argument."""
    try:
        if args.dtype:
            raise ValueError("--dtype does not go with --distributed: each row has the dtype that its options need")
        if args.backend and len(args.backend) > 1:
            raise ValueError("--distributed takes one --backend")
        report = verify(
            args.distributed,
            args.optimizer,
            backend=args.backend[0] if args.backend else None,
            device=args.device,
            steps=args.steps,
        )
    except (ValueError, RuntimeError) as error:
        print(f"fusedstep verify: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({**asdict(report), "ok": report.ok}))
    else:
        _print_table(report)
    return 0 if report.ok else 1


def _print_table(report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console()
    name = Column("optimizer and options", overflow="fold")
    table = Table(name, "dtype", "must be", "same bits", "difference", "")
    for row in report.rows:
        verdict = "ok" if row.ok else f"[bold red]WRONG[/] {escape(row.error)}"
        must = "exact" if row.exact else f"within {TOLERANCE:.0e}"
        bits = f"{row.tensors - row.different} of {row.tensors}"
        table.add_row(row.case, row.dtype, must, bits, f"{row.max_difference:.1e}", verdict)
    console.print(table)
    good = sum(row.ok for row in report.rows)
    console.print(
        f"{report.processes} processes on {report.device} with {report.communication}, against one: "
        f"{good} of {len(report.rows)} rows as they should be"
    )
