"""`fusedstep verify`: every optimizer, option, dtype, layout and backend on this machine against the float64 reference.

Two statements are checked for each row. The backend gives the same bits as the reference implementation, over several
steps; and the reference stays within a stated number of units in the last place (ULP) of the same steps in float64.
The precision options are rows of their own, whose states and aux states count among the tensors; so is the
chain of clipping, zeroed gradients and averages, of which the averages count too.
Sums over rows, columns and tensors have an order of their own on each backend: of a rule that has any, backend and
reference are both held to float64, with the backend's states.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import backends
from .cases import Case, chain_cases, gradient, layouts, precision_cases, reduces, select_cases
from .codecs import QUANTIZERS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# The longest rule rounds about a dozen times on the way from its inputs to the parameter, by half a unit each.
ULP_PER_STEP = 6.0
# Sums of up to a thousand numbers on the way add to that; their error is shared by all elements of a row or tensor.
REDUCING_ULP_PER_STEP = 12.0


@dataclass(frozen=True)
class Row:
    """What was found for one case, dtype and backend."""

    case: str
    dtype: str
    backend: str
    device: str
    tensors: int
    different: int  # tensors (parameters and states) whose bits are not the reference's
    max_ulp: float  # largest distance of a parameter (for a rule that reduces, of a state too) to float64, per step
    ok: bool


@dataclass(frozen=True)
class Report:
    """The rows of one run, and the backends that could not run with their reasons."""

    rows: tuple[Row, ...]
    skipped: dict[str, list[str]]

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)


def ulp_distance(value: Tensor, exact: Tensor, scale: Tensor) -> Tensor:
    """The largest distance of ``value`` to the float64 ``exact``, in units in the last place: one float64 number.

    The unit is the spacing of ``value``'s dtype at the larger of ``exact`` and ``scale``: a parameter that a step takes
    from 1 to nearly 0 cannot be known better than its old value was. Not a number at the same place counts as equal.
    """
    if value.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=value.device)
    info = torch.finfo(value.dtype)
    magnitude = torch.maximum(exact.abs(), scale.abs().double()).clamp(min=info.tiny, max=info.max)
    unit = torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps
    error = (value.double() - exact).abs() / unit
    same = (value.double() == exact) | (value.isnan() & exact.isnan())
    return torch.where(same, torch.zeros_like(error), error).max()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if two tensors hold the same numbers; a NaN equals any NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


class _Run:
    """One optimizer with its parameters, fed from a seed."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, backend: str, wide: bool = False) -> None:
        from . import __dict__ as exported

        self.generator = torch.Generator().manual_seed(1)
        self.dtype = dtype
        values = layouts(dtype, device, torch.Generator().manual_seed(0))
        self.params = [
            torch.nn.Parameter(value.detach().double() if wide else value.detach()) for value in values.values()
        ]
        self.optimizer = exported[case.optimizer](self.params, backend=backend, **case.options)

    def step(self, number: int) -> None:
        for index, param in enumerate(self.params):
            grad = gradient(param, self.dtype, self.generator, other_layout=(index + number) % 3 == 0)
            param.grad = grad.to(param.dtype)
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        states = [self.optimizer.state.get(param, {}) for param in self.params]
        return [param.detach() for param in self.params] + [t for state in states for t in state.values()]


def _check(case: Case, dtype_name: str, backend: str, device: torch.device, steps: int) -> Row:
    dtype = DTYPES[dtype_name]
    tested, reference = (_Run(case, dtype, device, name) for name in (backend, "reference"))
    exact = _Run(case, dtype, device, "reference", wide=True)
    sums = reduces(case)
    # Below fp32 each step's rounding moves the next step's start: only the first can be compared with float64.
    narrow = dtype in (torch.bfloat16, torch.float16) or case.options.get("state_dtype") in (
        torch.bfloat16,
        *QUANTIZERS,
    )
    scale = [param.detach().clone() for param in reference.params]
    # A device is not waited for until everything has been queued.
    worst = torch.zeros((), dtype=torch.float64, device=device)
    for number in range(1, steps + 1):
        for run in (tested, reference, exact):
            run.step(number)
        if not narrow or number == 1:
            for i, (param, true) in enumerate(zip(reference.params, exact.params, strict=True)):
                scale[i] = torch.maximum(scale[i].abs(), param.detach().abs())
                worst = torch.maximum(worst, ulp_distance(param.detach(), true.detach(), scale[i]) / number)
            if sums:
                worst = torch.maximum(worst, _reduced_ulp(tested, exact, scale) / number)
    max_ulp = worst.item()
    pairs = list(zip(tested.tensors(), reference.tensors(), strict=True))
    different = sum(not same_bits(a, b) for a, b in pairs)
    # In fp64 what it is compared with has as many roundings of its own.
    sides = 2 if dtype == torch.float64 else 1
    ok = max_ulp <= sides * REDUCING_ULP_PER_STEP if sums else different == 0 and max_ulp <= ULP_PER_STEP
    return Row(str(case), dtype_name, backend, str(device), len(pairs), different, max_ulp, ok)


def _reduced_ulp(tested: _Run, exact: _Run, scale: list[Tensor]) -> Tensor:
    """The largest distance to float64 of a parameter, or of a state in units at the state's largest number."""
    worst = torch.zeros((), dtype=torch.float64, device=scale[0].device)
    for i, (value, true) in enumerate(zip(tested.tensors(), exact.tensors(), strict=True)):
        if value.numel() != 0:
            unit_at = scale[i] if i < len(scale) else torch.full_like(value, value.abs().max())
            worst = torch.maximum(worst, ulp_distance(value, true, unit_at).to(worst.device))
    return worst


def _runnable(
    names: Sequence[str] | None, devices: Sequence[torch.device]
) -> tuple[dict[str, torch.device], dict[str, list[str]]]:
    """The backends to check, each with the first of ``devices`` that it runs on, and the reasons against the others."""
    runnable, skipped = {}, {}
    for name in names or [name for name in backends.BACKENDS if name != "reference"]:
        if name not in backends.BACKENDS:
            raise ValueError(f"Invalid backend: {name!r} (it must be one of {', '.join(backends.BACKENDS)})")
        against = [backends.BACKENDS[name].reasons(device) for device in devices]
        fits = [device for device, reasons in zip(devices, against, strict=True) if not reasons]
        if fits:
            runnable[name] = fits[0]
        else:
            skipped[name] = list(dict.fromkeys(reason for reasons in against for reason in reasons))
    return runnable, skipped


def checks_of(
    optimizers: Sequence[str] | None, names: Iterable[str], dtypes: Sequence[str] | None
) -> list[tuple[Case, str, str]]:
    """All (case, dtype, backend) of a run."""
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ValueError(f"Invalid dtype: {dtype!r} (it must be one of {', '.join(DTYPES)})")
    chosen = [(c, d) for c in select_cases(optimizers) for d in dtypes or DTYPES]
    further = [*precision_cases(), *chain_cases()]
    chosen += [(c, d) for c, d in further if d in (dtypes or DTYPES) and c.optimizer in (optimizers or [c.optimizer])]
    return [(c, d, b) for b in names for c, d in chosen]


def verify(
    optimizers: Sequence[str] | None = None,
    *,
    backend: str | Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    steps: int = 7,
    progress: bool = False,
) -> Report:
    """Check the optimizers of this package on this machine.

    Args:
        optimizers: class names; all if None.
        backend: one or several backends to compare with the reference; all that can run if None.
        dtypes: of "fp32", "bf16", "fp16", "fp64"; all if None.
        device: where to check; if None, each backend on the GPU if there is one that it runs on, else on the CPU.
        steps: updates per row.
        progress: show a progress bar (needs ``rich``).

    Returns:
        A report whose ``ok`` is True if every row has the reference's bits and the reference is within
        `ULP_PER_STEP` units in the last place of float64 per step; for a rule that reduces, if the backend and the
        reference are within `REDUCING_ULP_PER_STEP`.

    Raises:
        ValueError: an unknown optimizer, backend or dtype.
    """
    present = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if steps < 1:
        raise ValueError(f"Invalid steps: {steps} (it must be 1 or larger)")
    devices = [torch.device(name) for name in (present if device is None else [device])]
    runnable, skipped = _runnable([backend] if isinstance(backend, str) else backend, devices)
    todo: Iterator[tuple[Case, str, str]] | list = checks_of(optimizers, runnable, dtypes)
    if progress:
        from rich.progress import track

        todo = track(todo, description="verify", transient=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the reference was asked for
        rows = tuple(_check(case, dtype, name, runnable[name], steps) for case, dtype, name in todo)
    return Report(rows, skipped)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fusedstep verify`."""
    parser.add_argument(
        "--optimizer",
        action="append",
        metavar="NAME",
        help=f"of {sorted({c.optimizer for c in select_cases()})}; may repeat",
    )
    parser.add_argument("--backend", action="append", metavar="NAME", help="compare only this one; may be repeated")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="may be repeated; all by default")
    parser.add_argument("--device", help="by default a GPU for the backends that run on it, the CPU for the others")
    parser.add_argument("--steps", type=int, default=7, help="updates per row (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--distributed",
        type=int,
        metavar="N",
        help="compare instead the training of DTensors in N processes of this machine with that of one: with NCCL if "
        "there are N GPUs, else with gloo",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if everything is as it should be, 1 if not, 2 for a bad argument."""
    if args.distributed is not None:
        from . import sharded_verification

        return sharded_verification.run(args)
    try:
        report = verify(
            args.optimizer,
            backend=args.backend,
            dtypes=args.dtype,
            device=args.device,
            steps=args.steps,
            progress=not args.json and sys.stderr.isatty(),
        )
    except (ValueError, RuntimeError) as error:
        print(f"fusedstep verify: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"ok": report.ok, "rows": [asdict(r) for r in report.rows], "skipped": report.skipped}))
    else:
        _print_table(report)
    return 0 if report.ok else 1


def _print_table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("optimizer and options", "dtype", "backend", "same bits", "ULP from float64, per step", "")
    for row in report.rows:
        bits = f"{row.tensors - row.different} of {row.tensors}"
        verdict = "ok" if row.ok else "[bold red]WRONG[/]"
        table.add_row(row.case, row.dtype, row.backend, bits, f"{row.max_ulp:.2f}", verdict)
    console.print(table)
    for name, reasons in report.skipped.items():
        console.print(f"not checked: {name} ({'; '.join(reasons)})", markup=False)
    bad = sum(not row.ok for row in report.rows)
    if not report.rows:
        console.print("nothing could be checked")
    else:
        console.print(f"{len(report.rows) - bad} of {len(report.rows)} rows as they should be")
