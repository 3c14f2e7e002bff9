"""`fusedstep verify --distributed N`: training on the parts that N processes have, against one process that has all.

Each row is one optimizer of tensors that are shared out in every way: by rows and columns, evenly and not, with empty
parts, in copies, on a mesh of two dimensions where N is large enough, and not at all. Every process makes the same
steps on the whole tensors besides, and compares its parts. They must be the same to the bit; where a sum goes through
several processes, they are held to `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends, layout
from .cases import CASES, PRECISION, Case, reduces, select_cases
from .codecs import QUANTIZERS

TOLERANCE = 1e-6  # of the largest number of a part
MINUTES = 2  # that a process waits for the others
INFINITY, SAVED, MODEL = (
    "an infinity in the last process",
    "saved and loaded into other parts",
    "fully_shard of a model",
)
BLOCKS = 512  # so many columns that the blocks of a quantized state lie in one row


@dataclass(frozen=True)
class Row:
    """What was found for one configuration, in all processes."""

    case: str
    dtype: str
    exact: bool  # whether each bit must be the same
    tensors: int  # parts of parameters and states
    different: int
    max_difference: float  # relative to the largest number of the part
    ok: bool
    error: str = ""


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


@dataclass(frozen=True)
class Configuration:
    """An optimizer to be tried, and how."""

    case: Case
    dtype: str = "fp32"
    exact: bool = True
    what: str = ""  # besides steps

    def __str__(self) -> str:
        return f"{self.what}{', ' if self.what else ''}{self.case}"


def configurations(optimizers: Sequence[str] | None) -> list[Configuration]:
    """Each elementwise rule; and each option and what else there is, with the last of them.

    Raises:
        ValueError: there is no such optimizer, or all of them sum over tensors.
    """
    cases = [case for case in select_cases(optimizers) if not reduces(case)]
    if not cases:
        elementwise = sorted({case.optimizer for case in CASES})
        raise ValueError(f"{', '.join(optimizers or ())}: sharded training has {', '.join(elementwise)}")
    last = cases[-1]

    def having(**options: Any) -> Case:
        return Case(last.optimizer, {**last.options, **options})

    found = [Configuration(case) for case in cases]
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
        optimizers: class names; all elementwise ones if None.
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
            kind_of = _ModelComparison if configuration.what == MODEL else _Comparison
            row = kind_of(configuration, device, backend, processes, folder).row(steps)
            if rank == 0:
                with open(f"{folder}/rows", "a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    finally:
        dist.destroy_process_group()


class _Comparison:
    """Optimizers of parts and of whole tensors, which get the same gradients."""

    def __init__(
        self, configuration: Configuration, device: torch.device, backend: str | None, processes: int, folder: str
    ) -> None:
        from .verification import DTYPES

        self.configuration, self.device, self.processes, self.folder = configuration, device, processes, folder
        self.backend = backend
        self.dtype = DTYPES[configuration.dtype]
        self.generator = torch.Generator().manual_seed(1)
        self._make()

    def _make(self) -> None:
        quantized = self.configuration.case.options.get("state_dtype") in QUANTIZERS
        self.ways = [way for way in ways(self.processes, self.device.type) if not quantized or way[0][-1] == BLOCKS]
        self.whole = [torch.nn.Parameter(self._random(shape)) for shape, *_ in self.ways]
        self.expected = self._optimizer(self.whole)
        self.parts, self.mine = self._of_parts()

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def _optimizer(self, params: list[Tensor]) -> Any:
        from . import __dict__ as exported

        case = self.configuration.case
        return exported[case.optimizer](params, backend=self.backend, **case.options)

    def _of_parts(self) -> tuple[list[Tensor], Any]:
        parts = [torch.nn.Parameter(self.part(i, value.detach())) for i, value in enumerate(self.whole)]
        return parts, self._optimizer(parts)

    def part(self, index: int, value: Tensor) -> Tensor:
        """This process's part of a whole tensor that is like a parameter."""
        from torch.distributed.tensor import distribute_tensor

        _, mesh, placements = self.ways[index]
        return value.clone() if mesh is None else distribute_tensor(value.clone(), mesh, placements, src_data_rank=None)

    def step(self, odd: bool) -> None:
        """One of both; ``odd``: with an infinity in the last row of the last process."""
        for index, (whole, part) in enumerate(zip(self.whole, self.parts, strict=True)):
            grad = self._random(tuple(whole.shape))
            if odd and index == 0:
                grad[-1] = math.inf
            whole.grad, part.grad = grad.clone(), self.part(index, grad)
        self.expected.step()
        self.mine.step()

    def row(self, steps: int) -> Row:
        import torch.distributed as dist

        for number in range(steps):
            self.step(odd=self.configuration.what == INFINITY and number == steps // 2)
        if self.configuration.what == SAVED:
            self._reload()
            self.step(odd=False)
        found = torch.tensor([*self._compared()], dtype=torch.float64, device=self.device)
        totals, largest = found[:2].clone(), found[2].clone()
        dist.all_reduce(totals)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        tensors, different = (int(number) for number in totals.tolist())
        exact, difference = self.configuration.exact, largest.item()
        ok = different == 0 if exact else difference <= TOLERANCE
        return Row(str(self.configuration), self.configuration.dtype, exact, tensors, different, difference, ok)

    def _reload(self) -> None:
        """Go on with an optimizer of other parts that has loaded what this one has saved."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        where = f"{self.folder}/checkpoint"
        dcp.save(self._checkpoint(), checkpoint_id=where)
        self.ways = [(shape, mesh, _others(placements)) for shape, mesh, placements in self.ways]
        self.parts, self.mine = self._of_parts()
        for part in self.parts:
            layout.zero(part.detach())
        loaded = self._checkpoint()
        dcp.load(loaded, checkpoint_id=where)
        model = _Model(self.parts)
        model.load_state_dict(loaded["model"])
        set_optimizer_state_dict(model, self.mine, loaded["optimizer"])

    def _checkpoint(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        model = _Model(self.parts)
        return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, self.mine)}

    def _compared(self) -> tuple[int, int, float]:
        """Of parts in this process: how many, how many that differ, and the largest relative difference."""
        from .verification import same_bits

        tensors = different = 0
        largest = 0.0
        for part, expected in self._pairs():
            part, expected = layout.local(part.detach()), layout.local(expected.detach())
            tensors += 1
            if part.shape != expected.shape or part.dtype != expected.dtype:
                return tensors, different + 1, math.inf
            if not same_bits(part, expected):
                different += 1
                size = expected.double().abs().max().item()
                difference = (part.double() - expected.double()).abs().max().item() / (size or 1.0)
                largest = max(largest, difference if math.isfinite(difference) else math.inf)
        return tensors, different, largest

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each part of a parameter and state with what it must be; a quantized state is compared by its weight."""
        for index, (part, whole) in enumerate(zip(self.parts, self.whole, strict=True)):
            yield part, self.part(index, whole.detach())
            state, expected = self.mine.state.get(part, {}), self.expected.state.get(whole, {})
            for key in expected:
                if not isinstance(expected[key], Tensor):
                    continue
                if expected[key].shape == whole.shape and expected[key].is_floating_point():
                    yield state[key], self.part(index, expected[key])
                elif expected[key].dim() == 0:
                    yield state[key], expected[key]


class _ModelComparison(_Comparison):
    """A model that `fully_shard` has shared out, whose gradients all processes take the mean of."""

    def _make(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(6, 11), torch.nn.Tanh(), torch.nn.Linear(11, 5))
        self.models = [copy.deepcopy(model).to(self.device), copy.deepcopy(model).to(self.device)]
        mesh = init_device_mesh(self.device.type, (self.processes,))
        for layer in (self.models[1][0], self.models[1]):
            fully_shard(layer, mesh=mesh)
        self.whole, self.parts = ([*model.parameters()] for model in self.models)
        self.expected, self.mine = self._optimizer(self.whole), self._optimizer(self.parts)
        self.ways = [(part.shape, part.device_mesh, part.placements) for part in self.parts]

    def step(self, odd: bool) -> None:
        data = self._random((7, 6))  # the same in all processes, so that the mean is that of one
        for model, optimizer in zip(self.models, (self.expected, self.mine), strict=True):
            model(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


class _Model(torch.nn.Module):
    """The parameters by names."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        for index, param in enumerate(params):
            self.register_parameter(f"p{index}", param)


def ways(processes: int, device: str) -> list[tuple[tuple[int, ...], Any, Any]]:
    """Shapes, each with the mesh and the placements by which a tensor is shared out; None: it is not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    n = processes
    line = init_device_mesh(device, (n,))
    found = [
        ((2 * n + 1, 5), line, [Shard(0)]),
        ((4 * n + 3,), line, [Shard(0)]),
        ((1, 33), line, [Shard(0)]),
        ((3, 2 * n + 1), line, [Shard(1)]),
        ((7, 3), line, [Replicate()]),
        ((4 * n, BLOCKS), line, [Shard(0)]),
        ((5, 3), None, []),
    ]
    if n >= 4 and n % 2 == 0:
        square = init_device_mesh(device, (2, n // 2))
        found += [
            ((2 * n + 1, 6), square, [Replicate(), Shard(0)]),
            ((4 * n, 3 * n), square, [Shard(0), Shard(1)]),
            ((4 * n, BLOCKS), square, [Shard(0), Replicate()]),
        ]
    return found


def _others(placements: Sequence[Any]) -> list[Any]:
    """Other ones: rows instead of copies, copies instead of rows and columns."""
    from torch.distributed.tensor import Replicate, Shard

    return [Shard(0) if placement.is_replicate() else Replicate() for placement in placements]


# The command.


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
