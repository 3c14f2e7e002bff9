"""What comes out of the demo: two runs, how much of their difference is rounding, a table and a picture."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import results

if TYPE_CHECKING:
    from .train_gpt import Training

LAST_STEPS = 20  # the train loss "at the end" is the mean of so many
QUIET = 0.2  # cores: if others use more, the times are disturbed


@dataclass
class Run:
    """What one run gave: losses in nats per character, times in seconds."""

    name: str
    implementation: str
    train_loss: list[float] = field(default_factory=list)  # of every step's batch, before its update
    validation_steps: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)  # after so many updates
    step_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of everything but validation
    backends: list[str] | None = None  # None: not one of ours
    kernel_calls: int | None = None

    @property
    def final_train_loss(self) -> float:
        return statistics.fmean(self.train_loss[-LAST_STEPS:])


def compare(other: Run, mine: Run) -> dict[str, Any]:
    """The largest differences between two runs' losses (nats), and how many times as fast our step() is."""
    train = differences(other.train_loss, mine.train_loss)
    validation = differences(other.validation_loss, mine.validation_loss)
    return {
        "max_train_difference": max(train),
        "max_train_difference_step": train.index(max(train)) + 1,
        "max_validation_difference": max(validation),
        "max_validation_difference_step": mine.validation_steps[validation.index(max(validation))],
        "median_step_ratio": statistics.median(other.step_seconds) / statistics.median(mine.step_seconds),
        "total_step_ratio": sum(other.step_seconds) / sum(mine.step_seconds),
    }


def rounding(other: Run, mine: Run, nudged: Run) -> dict[str, Any]:
    """What rounding alone makes: ``nudged`` is as ``other``, but for the last bit of the weights it began with."""
    steps = len(nudged.train_loss)
    return {
        "steps": steps,
        "train_loss": nudged.train_loss,
        "max_train_difference": max(differences(other.train_loss, nudged.train_loss)),
        "max_train_difference_of_ours": max(differences(other.train_loss[:steps], mine.train_loss)),
    }


def differences(one: list[float], another: list[float]) -> list[float]:
    """Of two runs' losses, as far as both go."""
    return [abs(a - b) for a, b in zip(one, another, strict=False)]


def findings(
    training: Training,
    options: dict[str, Any],
    runs: tuple[Run, Run],
    nudged: Run,
    command: str,
    other_load: float | None,
) -> dict[str, Any]:
    """Everything that goes into the JSON file; ``other_load`` in cores."""
    model, corpus = training.model(), training.corpus
    settings = {"optimizer": training.optimizer, "options": options, "seed": training.seed, "bf16": training.bf16}
    return {
        **results.header(training.device, command, settings),
        "size": dataclasses.asdict(training.size),
        "tensors": sum(1 for _ in model.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": {
            "train_characters": len(corpus.train),
            "validation_characters": len(corpus.validation),
            "different_characters": len(corpus.characters),
        },
        "runs": [
            {
                **dataclasses.asdict(run),
                "final_train_loss": run.final_train_loss,
                "final_validation_loss": run.validation_loss[-1],
                "median_step_seconds": statistics.median(run.step_seconds),
                "total_step_seconds": sum(run.step_seconds),
            }
            for run in runs
        ],
        "comparison": compare(*runs),
        "rounding": rounding(*runs, nudged),
        "other_load": other_load,
    }


def speed(ratio: float, other: str) -> str:
    """A ratio of times in words."""
    if ratio >= 1:
        return f"{ratio:.2f} times as fast as {other}"
    return f"slower than {other}: it takes {1 / ratio:.2f} times as long"


def show(found: dict[str, Any]) -> None:
    """Print the table and what it was measured on."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    other, mine = found["runs"]
    table = Table("", other["name"], mine["name"], box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
        column.overflow = "fold"
    last = min(LAST_STEPS, len(mine["train_loss"]))

    def row(label: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(label, value(other), value(mine))

    def how(run: dict[str, Any]) -> str:
        if run["backends"] is None:
            return run["implementation"]
        return ", ".join(filter(None, ("backend " + ", ".join(run["backends"]), run["implementation"])))

    row("implementation", how)
    row("train loss, first step", lambda run: f"{run['train_loss'][0]:.4f}")
    row(f"train loss, mean of the last {last}", lambda run: f"{run['final_train_loss']:.4f}")
    row("validation loss at the end", lambda run: f"{run['final_validation_loss']:.4f}")
    table.add_section()
    row("step(), median", lambda run: f"{1e3 * run['median_step_seconds']:.3f} ms")
    row("step(), first", lambda run: f"{1e3 * run['step_seconds'][0]:.3f} ms")
    row("step(), total", lambda run: f"{run['total_step_seconds']:.3f} s")
    row("training, total", lambda run: f"{run['seconds']:.1f} s")
    row("share of step() in it", lambda run: f"{run['total_step_seconds'] / run['seconds']:.1%}")
    row("kernel calls per step", lambda run: "-" if run["kernel_calls"] is None else str(run["kernel_calls"]))

    compared, size = found["comparison"], found["size"]
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"step() of {mine['name']} is [bold]{speed(compared['median_step_ratio'], other['name'])}[/] in the median, "
        f"{compared['total_step_ratio']:.2f} times in total ({found['tensors']} tensors, "
        f"{found['parameters'] / 1e6:.2f} million parameters, {len(mine['train_loss'])} steps)"
    )
    console.print(
        f"largest difference of the losses: train {compared['max_train_difference']:.1e} "
        f"(step {compared['max_train_difference_step']}), "
        f"validation {compared['max_validation_difference']:.1e} (step {compared['max_validation_difference_step']})"
    )
    alone = found["rounding"]
    console.print(
        f"in the first {alone['steps']} steps: {alone['max_train_difference_of_ours']:.1e} between the two, and "
        f"{alone['max_train_difference']:.1e} between {other['name']} and itself, begun from weights that differ in "
        "their last bit: so much comes from rounding alone"
    )
    console.print(
        f"model: {size['layers']} layers of width {size['width']}, {size['heads']} heads, "
        f"batches of {size['batch']} x {size['context']} characters"
        f"{', bf16 autocast' if found['settings']['bf16'] else ''}; losses in nats per character"
    )
    console.print(f"measured on: {results.describe(found)}", markup=False)
    load = found["other_load"]
    if load is not None and load > QUIET:
        console.print(f"[yellow]other programs used {load:.1f} cores meanwhile: the times are disturbed[/]")


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw both loss curves, their difference, and the times in step()."""
    from matplotlib.figure import Figure  # not pyplot, which would keep every figure and choose a display
    from matplotlib.ticker import MaxNLocator

    other, mine = found["runs"]
    colours = ("#e0a458", "#1f4e5f")
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2.4, 1), height_ratios=(2.6, 1))
    losses, times = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
    apart = figure.add_subplot(grid[1, 0], sharex=losses)

    # The curves lie on each other: the first one is broad, so that it can be seen behind the second.
    steps = range(1, len(mine["train_loss"]) + 1)
    for run, colour, width in ((other, colours[0], 3.5), (mine, colours[1], 0.9)):
        losses.plot(steps, run["train_loss"], color=colour, linewidth=width, label=f"{run['name']}, train")
    for run, colour, width, marker in ((other, colours[0], 3.5, 9), (mine, colours[1], 0.9, 4)):
        line = {"color": colour, "linewidth": width, "markersize": marker, "marker": "o", "linestyle": "--"}
        losses.plot(run["validation_steps"], run["validation_loss"], **line, label=f"{run['name']}, validation")
    losses.set_ylabel("loss (nats per character)")
    losses.set_title("Same seed, same batches, deterministic kernels", loc="left", fontsize=10)
    losses.legend(frameon=False, fontsize=8)
    losses.tick_params(labelbottom=False)

    for label, run, colour in (
        (mine["name"], mine, "#5b7f95"),
        ("the same optimizer, other last bits", found["rounding"], "#c0504d"),
    ):
        values = [value or math.nan for value in differences(other["train_loss"], run["train_loss"])]
        apart.semilogy(range(1, len(values) + 1), values, color=colour, linewidth=0.9, label=label)
    apart.set_ylabel("difference (nats)")
    apart.set_xlabel("step")
    apart.xaxis.set_major_locator(MaxNLocator(integer=True))
    apart.set_title(f"Train loss beside that of {other['name']}", loc="left", fontsize=8)
    apart.legend(frameon=False, fontsize=7)

    medians = [1e3 * run["median_step_seconds"] for run in (other, mine)]
    bars = times.bar([run["name"] for run in (other, mine)], medians, color=colours, width=0.6)
    times.bar_label(bars, [f"{median:.3g} ms" for median in medians], padding=3)
    times.set_ylabel("step(), median (ms)")
    times.set_title(
        f"{found['tensors']} tensors, {found['parameters'] / 1e6:.2f} M parameters", loc="left", fontsize=10
    )
    times.margins(y=0.12)
    for axis in (losses, apart, times):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(results.describe(found), x=0.01, ha="left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
