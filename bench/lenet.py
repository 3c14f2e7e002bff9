"""The textbook run: LeNet trained by SGD under six learning-rate schedules, with a table and curves.

    python -m fusedstep.bench.lenet --help

The experiment of "Dive into Deep Learning" (chapter "Learning Rate Scheduling"): the same network from the same start,
batches of 256, a learning rate of 0.3 that changes from epoch to epoch. The schedules are `fusedstep.schedules`, the
optimizer is `fusedstep.SGD`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fusedstep

from .. import backends, schedules
from . import images, results
from .terminal import positive, progress

DEFAULT_FOLDER = Path("build", "lenet")
LR, BATCH, EPOCHS = 0.3, 256, 30
EVALUATED_AT_A_TIME = 1000  # test images


def lenet() -> nn.Sequential:
    """LeNet-5 with ReLU and max pooling, for 28x28 images in one channel."""
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, images.CLASSES),
    )


def chosen_schedules(lr: float, epochs: int) -> dict[str, schedules.Schedule]:
    """The six schedules by name: functions of the epoch, which counts as an update here.

    At 30 epochs they are the book's: halving after epoch 15, a cosine of 20 epochs, a warm-up of 5.
    """
    end = max(1, round(2 / 3 * epochs))
    warmup = min(round(epochs / 6), end - 1)
    return {
        "constant": schedules.ConstantScheduler(base_lr=lr),
        "square root": schedules.SquareRootScheduler(lr=lr),
        "factor": schedules.FactorScheduler(factor=0.9, stop_factor_lr=lr / 30, base_lr=lr),
        "multi-factor": schedules.MultiFactorScheduler(step=[max(1, epochs // 2)], factor=0.5, base_lr=lr),
        "cosine": schedules.CosineScheduler(end, base_lr=lr, final_lr=lr / 30),
        "cosine with warm-up": schedules.CosineScheduler(end, base_lr=lr, final_lr=lr / 30, warmup_steps=warmup),
    }


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


@dataclass
class Run:
    """What training under one schedule gave, epoch by epoch; train loss and accuracy are means over its batches."""

    schedule: str
    lr: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    data: images.Images,
    name: str,
    schedule: schedules.Schedule,
    *,
    epochs: int,
    batch: int,
    seed: int,
    backend: str | None,
    report: Callable[[int, Run], None] = lambda epoch, run: None,
) -> Run:
    """Train a new network; ``report(epoch, run)`` is told after each epoch.

    Raises:
        Diverged: the loss is no longer finite.
    """
    torch.manual_seed(seed)
    net = lenet().to(data.train.device)
    optimizer = fusedstep.SGD(net.parameters(), lr=1.0, backend=backend)
    scheduler = schedules.ScheduleLR(optimizer, schedule)
    generator = torch.Generator().manual_seed(seed)
    run = Run(name)
    started = time.perf_counter()
    for epoch in range(1, epochs + 1):
        net.train()
        order = torch.randperm(len(data.train_labels), generator=generator).to(data.train.device)
        loss_sum = right = 0.0
        for chosen in order.split(batch):
            labels = data.train_labels[chosen]
            scores = net(data.train[chosen])
            loss = F.cross_entropy(scores, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            right += (scores.argmax(1) == labels).sum().item()
        if not math.isfinite(loss_sum):
            raise Diverged(f"the loss under the schedule '{name}' is {loss_sum} in epoch {epoch}")
        run.lr.append(float(scheduler.get_last_lr()[0]))
        run.train_loss.append(loss_sum / len(order))
        run.train_accuracy.append(right / len(order))
        run.test_accuracy.append(accuracy(net, data))
        scheduler.step()
        report(epoch, run)
    run.seconds = time.perf_counter() - started
    return run


@torch.no_grad()
def accuracy(net: nn.Module, data: images.Images) -> float:
    """The share of test images whose class the network names."""
    net.eval()
    right = 0
    pairs = zip(data.test.split(EVALUATED_AT_A_TIME), data.test_labels.split(EVALUATED_AT_A_TIME), strict=True)
    for pictures, labels in pairs:
        right += int((net(pictures).argmax(1) == labels).sum())
    return right / len(data.test_labels)


# What comes out


def findings(
    data: images.Images, runs: list[Run], command: str, settings: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    counts = {"name": data.name, "train": len(data.train_labels), "test": len(data.test_labels)}
    return {
        **results.header(device, command, settings),
        "images": counts,
        "runs": [dataclasses.asdict(run) for run in runs],
    }


def show(found: dict[str, Any]) -> None:
    """Print the table of the last epoch."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    settings, counts = found["settings"], found["images"]
    table = Table("schedule", "last lr", "train loss", "train accuracy", "test accuracy", "time", box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for run in found["runs"]:
        table.add_row(
            run["schedule"],
            f"{run['lr'][-1]:.4f}",
            f"{run['train_loss'][-1]:.4f}",
            f"{run['train_accuracy'][-1]:.2%}",
            f"{run['test_accuracy'][-1]:.2%}",
            f"{run['seconds']:.1f} s",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"LeNet, fusedstep.SGD, {settings['epochs']} epochs, batches of {settings['batch']}, lr {settings['lr']:g}; "
        f"{counts['name']}: {counts['train']:,} images to learn, {counts['test']:,} to test",
        markup=False,
    )
    console.print(f"measured on: {results.describe(found)}", markup=False)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw learning rate, loss and accuracies by epoch, one line for each schedule."""
    from matplotlib.figure import Figure  # not pyplot, which would keep every figure and choose a display
    from matplotlib.ticker import MaxNLocator

    panels = {
        "lr": "learning rate",
        "train_loss": "train loss",
        "train_accuracy": "train accuracy",
        "test_accuracy": "test accuracy",
    }
    colours = ("#9aa5b1", "#e0a458", "#7d8f69", "#b08bbb", "#c8553d", "#1f4e5f")
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (key, label) in zip(axes.flat, panels.items(), strict=True):
        for run, colour in zip(found["runs"], colours, strict=True):
            axis.plot(range(1, len(run[key]) + 1), run[key], color=colour, linewidth=1.6, label=run["schedule"])
        axis.set_ylabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    # Below the line of the constant.
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.95))
    counts = found["images"]
    title = f"LeNet, fusedstep.SGD; {counts['name']}, {counts['train']:,} to learn and {counts['test']:,} to test"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# The command


def make_parser() -> argparse.ArgumentParser:
    """The options of the run."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedstep.bench.lenet",
        description="Train LeNet with fusedstep.SGD under six learning-rate schedules and compare them.",
    )
    add = parser.add_argument
    add(
        "--data",
        metavar="FOLDER",
        type=Path,
        help="Fashion-MNIST's four IDX files, plain or .gz (default: the digits that scikit-learn ships)",
    )
    add("--epochs", metavar="N", type=positive, default=EPOCHS, help="(default: %(default)s)")
    add("--batch", metavar="N", type=positive, default=BATCH, help="(default: %(default)s)")
    add("--lr", type=float, default=LR, help="largest learning rate (default: %(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="(default: %(default)s)")
    add("--backend", choices=backends.CHOICES, help="of fusedstep (default: auto)")
    add("--device", metavar="DEVICE", help="of torch (default: cuda if there is one, else cpu)")
    add(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=DEFAULT_FOLDER,
        help="where the PNG and the JSON file go (default: %(default)s)",
    )
    add("--json", action="store_true", help="print the results as JSON and nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train under every schedule; returns 0, 1 if a loss diverged, or 2 if it cannot run as asked for."""
    args = make_parser().parse_args(argv)
    needed = {"matplotlib": "matplotlib"} if args.json else {"matplotlib": "matplotlib", "rich": "rich"}
    if args.data is None:
        needed["sklearn"] = "scikit-learn"
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"this needs {' and '.join(missing)}: pip install 'fusedstep[lenet]'", file=sys.stderr)
        return 2
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = chosen_schedules(args.lr, args.epochs)
        data = images.load(args.data)
        data = dataclasses.replace(
            data,
            **{name: getattr(data, name).to(device) for name in ("train", "train_labels", "test", "test_labels")},
        )
        with progress(list(chosen), args.epochs, not args.json) as bars:

            def report(epoch: int, run: Run) -> None:
                found = f"loss {run.train_loss[-1]:.3f}, test accuracy {run.test_accuracy[-1]:.1%}"
                bars(run.schedule, epoch, found)

            common = {"epochs": args.epochs, "batch": args.batch, "seed": args.seed, "backend": args.backend}
            runs = [train(data, name, schedule, **common, report=report) for name, schedule in chosen.items()]
    except Diverged as error:
        print(f"{error}; a smaller --lr may help", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2

    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", __spec__.name, *words])
    found = findings(data, runs, command, {**common, "lr": args.lr}, device)
    numbers = args.output / "lenet.json"
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    picture = numbers.with_suffix(".png")
    draw(found, picture)
    if args.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        show(found)
        for path in (picture, numbers):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
