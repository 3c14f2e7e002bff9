"""The command `fusedstep schedule`: any schedule as a table, as JSON, or drawn; or all of them in one figure."""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from . import d2l, hugging_face
from .schedule import Schedule, WarmUp, check_lr

BOOK: dict[str, type[Schedule]] = {
    cls.__name__: cls
    for cls in (
        d2l.ConstantScheduler,
        d2l.SquareRootScheduler,
        d2l.FactorScheduler,
        d2l.MultiFactorScheduler,
        d2l.LinearScheduler,
        d2l.PolyScheduler,
        d2l.CosineScheduler,
    )
}
NAMES = (*(kind.value for kind in hugging_face.SchedulerType), *BOOK)
ALL = "all"
ROWS = 20  # of the printed table
BAR = 40


def learning_rates(
    name: str, lr: float, warmup: int, steps: int, count: int, options: dict[str, Any] | None = None
) -> list[float]:
    """The learning rates of the first ``count`` updates.

    Args:
        name: one of `NAMES`: a name of `get_scheduler`, or a class of the d2l family.
        lr: the largest learning rate.
        warmup: steps of the warm-up; where a schedule has none, `WarmUp` is put around it. A schedule that is driven by
            a metric has none.
        steps: steps of the whole schedule.
        count: how many to return.
        options: further arguments of the schedule. A schedule that is driven by a metric sees `made_up_loss`.

    Raises:
        ValueError, TypeError: there is no such schedule, or an option is wrong.
    """
    options = dict(options or {})
    if name in BOOK:
        schedule = _from_the_book(name, lr, warmup, steps, options)
        return [schedule(t) for t in range(count)]
    optimizer = _Idle([torch.nn.Parameter(torch.zeros(1))], {"lr": lr})
    scheduler = hugging_face.get_scheduler(name, optimizer, warmup, steps, options)
    rates = []
    for t in range(count):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if hugging_face.SchedulerType(name) in hugging_face.NEED_A_METRIC:
            scheduler.step(made_up_loss(t, steps))
        else:
            scheduler.step()
    return rates


class _Idle(torch.optim.Optimizer):
    """An optimizer for schedulers to write learning rates into."""

    def step(self, closure: Any = None) -> None:
        pass


def _from_the_book(name: str, lr: float, warmup: int, steps: int, options: dict[str, Any]) -> Schedule:
    cls = BOOK[name]
    options.setdefault("lr" if cls is d2l.SquareRootScheduler else "base_lr", lr)
    if cls in (d2l.LinearScheduler, d2l.PolyScheduler, d2l.CosineScheduler):
        return cls(**{"max_update": steps, "warmup_steps": warmup, **options})
    schedule = cls(**options)
    return WarmUp(schedule, warmup) if warmup > 0 else schedule


def made_up_loss(t: int, steps: int) -> float:
    """What schedules that need a metric are shown with: it falls for the first third and then stays where it is."""
    return max(math.exp(-6.0 * t / steps), math.exp(-2.0))


def gallery(lr: float, warmup: int, steps: int, count: int) -> dict[str, list[float]]:
    """The learning rates of every schedule, with options that show what it does."""
    third = max(1, steps // 3)
    options: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": 3},
        "polynomial": {"power": 2.0, "lr_end": 0.05 * lr},
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.3},
        "warmup_stable_decay": {"num_decay_steps": third},
        "reduce_lr_on_plateau": {"patience": max(1, steps // 20), "factor": 0.5},
        "greedy": {"patience": max(1, steps // 50), "min_lr": 0.1 * lr, "max_lr": 2.0 * lr, "factor": 0.8},
        "FactorScheduler": {"factor": 0.1 ** (2.0 / steps), "stop_factor_lr": 0.02 * lr},
        "MultiFactorScheduler": {"step": [third, 2 * third], "factor": 0.5},
    }
    return {name: learning_rates(name, lr, warmup, steps, count, options.get(name)) for name in NAMES}


def draw(curves: dict[str, list[float]], path: Path, steps: int) -> Path:
    """Draw learning rates over the number of updates, one panel for each name; a line marks the last step."""
    from matplotlib.figure import Figure  # not pyplot, which would keep every figure and choose a display

    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    size = (3 * columns, 1.9 * rows) if len(curves) > 1 else (6, 3.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (name, rates) in zip(panels, curves.items(), strict=False):
        panel.plot(range(len(rates)), rates, color="#c8553d", linewidth=1.5, drawstyle="steps-post")
        if len(rates) > steps:
            panel.axvline(steps, color="#9aa5b1", linewidth=0.8, linestyle=":")
        panel.set_title(name, loc="left", fontsize=9)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    figure.supxlabel("updates", fontsize=8)
    figure.supylabel("learning rate", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def table(rates: list[float]) -> str:
    """About `ROWS` of the learning rates, evenly spaced and with the last, beside bars."""
    stride = max(1, -(-len(rates) // ROWS))
    shown = sorted({*range(0, len(rates), stride), len(rates) - 1})
    largest = max(rates) or 1.0
    width = len(str(shown[-1]))
    return "\n".join(f"{t:>{width}}  {rates[t]:<12.6g} {'#' * round(BAR * rates[t] / largest)}".rstrip() for t in shown)


def _option(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fusedstep schedule`."""
    parser.add_argument("name", choices=(*NAMES, ALL), metavar="NAME", help=f"{ALL} (with --plot), {', '.join(NAMES)}")
    parser.add_argument("--lr", type=float, default=1.0, help="the largest learning rate (default: 1)")
    parser.add_argument("--warmup", type=int, default=0, metavar="N", help="steps of the warm-up (default: 0)")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="steps of the whole (default: 1000)")
    parser.add_argument("--until", type=int, metavar="N", help="the last update shown (default: that of --steps)")
    parser.add_argument(
        "--set", type=_option, action="append", default=[], metavar="NAME=VALUE", help="an argument of the schedule"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it; the ending chooses the format")
    parser.add_argument("--json", action="store_true", help="print every learning rate, as JSON")


def run(args: argparse.Namespace) -> int:
    """Run `fusedstep schedule`; returns an exit code."""
    until = args.steps if args.until is None else args.until
    try:
        if args.steps < 1 or until < 0 or args.warmup < 0:
            raise ValueError("--steps must be 1 or more, --until and --warmup 0 or more")
        check_lr("--lr", args.lr)
        if args.name != ALL:
            rates = learning_rates(args.name, args.lr, args.warmup, args.steps, until + 1, dict(args.set))
            curves = {args.name: rates}
        elif args.set:
            raise ValueError(f"--set is for one schedule, not for '{ALL}'")
        elif args.plot is None and not args.json:
            raise ValueError(f"'{ALL}' needs --plot or --json")
        else:
            curves = gallery(args.lr, args.warmup, args.steps, until + 1)
        for rates in curves.values():
            for t, rate in enumerate(rates):
                if not math.isfinite(rate):
                    raise ValueError(f"the learning rate of update {t} is {rate}")
    except (ValueError, TypeError, ArithmeticError) as error:
        print(f"fusedstep schedule {args.name}: {error} (--set NAME=VALUE sets an argument)", file=sys.stderr)
        return 2
    try:
        if args.plot is not None:
            draw(curves, args.plot, args.steps)
    except (OSError, ValueError) as error:
        print(f"fusedstep schedule {args.name}: {args.plot} cannot be written: {error}", file=sys.stderr)
        return 2
    if args.json:
        settings = {"lr": args.lr, "warmup": args.warmup, "steps": args.steps, "options": dict(args.set)}
        print(json.dumps({**settings, "learning_rates": curves}))
    elif args.name != ALL:
        print(table(curves[args.name]))
    if args.plot is not None and not args.json:
        print(f"written: {args.plot}")
    return 0
