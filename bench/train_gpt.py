"""The demo: train a small GPT twice, with torch.optim and with fusedstep, and compare.

    python -m fusedstep.bench.train_gpt --help

Both runs start from the same seed and see the same batches in the same order; only the optimizer differs. A table goes
to the terminal, the curves into a PNG and a JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedstep

from .. import backends
from . import results, text
from .timing import OtherLoad

# With these the model learns well; a class that is not listed trains with its own defaults. The decay is for matrices.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-4},
    "Adam": {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 1e-5},
    "AdamW": {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "RMSprop": {"lr": 5e-4, "alpha": 0.99, "eps": 1e-4},
    "Adagrad": {"lr": 5e-3, "initial_accumulator_value": 1e-4},
    "Lion": {"lr": 5e-4, "betas": (0.9, 0.95), "weight_decay": 0.5},
    "AdaBelief": {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-12, "weight_decay": 0.1},
    "Amos": {"lr": 3e-2, "eta": 0.1, "beta": 0.98, "momentum": 0.9},
    "AdamWeightDecay": {"learning_rate": 3e-3, "beta_2": 0.95, "weight_decay_rate": 0.1},
}
DEFAULT_OPTIMIZER = "AdamW"
DEFAULT_FOLDER = Path("build", "demo")
WARMUP_SHARE = 0.1  # of the steps; the learning rate grows linearly
FINAL_LR = 0.1  # of the largest learning rate, where the cosine ends
MAX_NORM = 1.0  # gradients are clipped to this norm
VALIDATIONS = 20  # in a run, beside the one at the end
LAST_STEPS = 20  # the train loss "at the end" is the mean of so many
QUIET = 0.2  # cores: if others use more, the times are disturbed
THROWAWAY_STEPS = 3  # before the clocks start: both optimizers find libraries loaded and kernels compiled


@dataclass(frozen=True)
class Size:
    """Of the model and its training: characters are the unit of ``context``, sequences that of ``batch``."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int


SIZES = {
    "cpu": Size(layers=6, width=128, heads=4, context=64, batch=16, steps=400),
    "cuda": Size(layers=8, width=384, heads=6, context=256, batch=32, steps=1000),
}


# The model


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer network, each behind a norm and around a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A language model; the same matrix turns tokens into vectors and vectors into scores of tokens."""

    def __init__(self, tokens: int, size: Size) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for name, param in self.named_parameters():
            if param.dim() == 2:
                # What is added to the stream 2 x layers times starts smaller, so that the stream's size does not grow
                # with the depth.
                into_stream = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(param, std=0.02 / (math.sqrt(2 * size.layers) if into_stream else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, inputs: Tensor) -> Tensor:
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.blocks(self.token(inputs) + self.position(places))
        return F.linear(self.norm(x), self.token.weight)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per character."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())


# The optimizers


@dataclass(frozen=True)
class Contender:
    """One of the two optimizers: ``build(groups)`` makes it."""

    name: str
    implementation: str
    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def optimizers() -> list[str]:
    """Names of the classes that fusedstep exports."""
    exported = {name: getattr(fusedstep, name) for name in fusedstep.__all__}
    return sorted(
        name
        for name, found in exported.items()
        if isinstance(found, type)
        and issubclass(found, torch.optim.Optimizer)
        and found is not fusedstep.FusedOptimizer
    )


def fused_works(optimizer: type[torch.optim.Optimizer], device: torch.device) -> bool:
    """Whether a class of torch.optim has a fused implementation on ``device``."""
    if "fused" not in inspect.signature(optimizer).parameters:
        return False
    param = nn.Parameter(torch.zeros(1, device=device))
    param.grad = torch.zeros_like(param)
    try:
        optimizer([param], fused=True).step()  # some classes refuse at construction, others in the first step
    except RuntimeError:
        return False
    return True


def contenders(
    name: str, options: dict[str, Any], device: torch.device, backend: str | None
) -> tuple[Contender, Contender]:
    """torch's optimizer and ours; where torch has none, ours on the reference backend is the one to compare with."""
    ours = getattr(fusedstep, name)
    theirs = getattr(torch.optim, name, None)
    if theirs is None:
        other = Contender(
            f"fusedstep.{name}, reference",
            "plain torch operations",
            lambda groups: ours(groups, backend="reference", **options),
        )
    else:
        fused = {"fused": True} if fused_works(theirs, device) else {}
        other = Contender(
            f"torch.optim.{name}",
            "fused=True" if fused else "default",
            lambda groups: theirs(groups, **fused, **options),
        )
    mine = Contender(f"fusedstep.{name}", "", lambda groups: ours(groups, backend=backend, **options))
    return other, mine


def param_groups(model: nn.Module, optimizer: str) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and biases and norms, which do not."""
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.dim() >= 2]}, {"params": [p for p in params if p.dim() < 2]}]
    if "weight_decay" in inspect.signature(getattr(fusedstep, optimizer)).parameters:
        groups[1]["weight_decay"] = 0.0
    return groups


# The training


@dataclass(frozen=True)
class Training:
    """What the two runs have in common."""

    corpus: text.Corpus
    size: Size
    optimizer: str
    device: torch.device
    seed: int
    bf16: bool

    def model(self) -> GPT:
        """A new model, the same in every call."""
        torch.manual_seed(self.seed)
        return GPT(len(self.corpus.characters), self.size).to(self.device)


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


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


def lr_factor(step: int, steps: int) -> float:
    """The learning rate of a step (from 0), relative to its largest: linear warm-up, then half a cosine."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    training: Training, contender: Contender, steps: int, report: Callable[[int, float], None] = lambda step, loss: None
) -> Run:
    """Train a new model; ``report(step, loss)`` is told after each step.

    Raises:
        Diverged: the loss is no longer finite.
    """
    size, device, corpus = training.size, training.device, training.corpus
    model = training.model()
    optimizer = contender.build(param_groups(model, training.optimizer))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    generator = torch.Generator().manual_seed(training.seed)
    inputs, targets = text.even_windows(corpus.validation, 4 * size.batch, size.context)
    held_out = inputs.to(device), targets.to(device)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=training.bf16)

    run = Run(contender.name, contender.implementation)

    def validate(step: int) -> None:
        with torch.no_grad(), precision:
            run.validation_loss.append(model.loss(*held_out).item())
        run.validation_steps.append(step)

    every = max(1, steps // VALIDATIONS)
    validate(0)
    for step in range(1, steps + 1):
        started = now(device)
        inputs, targets = text.random_windows(corpus.train, size.batch, size.context, generator)
        with precision:
            loss = model.loss(inputs.to(device), targets.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        before = now(device)
        optimizer.step()
        run.step_seconds.append(now(device) - before)
        optimizer.zero_grad()
        scheduler.step()
        run.train_loss.append(loss.item())
        run.seconds += now(device) - started
        if not math.isfinite(run.train_loss[-1]):
            raise Diverged(f"the loss of {contender.name} is {run.train_loss[-1]} in step {step}")
        if step % every == 0 or step == steps:
            validate(step)
        report(step, run.train_loss[-1])

    if isinstance(optimizer, fusedstep.FusedOptimizer):
        run.backends = sorted(optimizer.backends_used)
        run.kernel_calls = optimizer.kernel_calls
    return run


def now(device: torch.device) -> float:
    """The time in seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# What comes out


def compare(other: Run, mine: Run) -> dict[str, Any]:
    """The largest differences between two runs' losses (nats), and how many times as fast our step() is."""
    train = [abs(a - b) for a, b in zip(other.train_loss, mine.train_loss, strict=True)]
    validation = [abs(a - b) for a, b in zip(other.validation_loss, mine.validation_loss, strict=True)]
    return {
        "max_train_difference": max(train),
        "max_train_difference_step": train.index(max(train)) + 1,
        "max_validation_difference": max(validation),
        "max_validation_difference_step": mine.validation_steps[validation.index(max(validation))],
        "median_step_ratio": statistics.median(other.step_seconds) / statistics.median(mine.step_seconds),
        "total_step_ratio": sum(other.step_seconds) / sum(mine.step_seconds),
    }


def findings(
    training: Training, options: dict[str, Any], runs: tuple[Run, Run], command: str, other_load: float | None
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
        return run["implementation"] if run["backends"] is None else "backend " + ", ".join(run["backends"])

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
    differences = figure.add_subplot(grid[1, 0], sharex=losses)

    # The curves lie on each other: the first one is broad, so that it can be seen behind the second.
    steps = range(1, len(mine["train_loss"]) + 1)
    for run, colour, width in ((other, colours[0], 3.5), (mine, colours[1], 0.9)):
        losses.plot(steps, run["train_loss"], color=colour, linewidth=width, label=f"{run['name']}, train")
    for run, colour, width, marker in ((other, colours[0], 3.5, 9), (mine, colours[1], 0.9, 4)):
        line = {"color": colour, "linewidth": width, "markersize": marker, "marker": "o", "linestyle": "--"}
        losses.plot(run["validation_steps"], run["validation_loss"], **line, label=f"{run['name']}, validation")
    losses.set_ylabel("loss (nats per character)")
    losses.set_title("Same seed, same batches: the two runs lie on each other", loc="left", fontsize=10)
    losses.legend(frameon=False, fontsize=8)
    losses.tick_params(labelbottom=False)

    train = [abs(a - b) for a, b in zip(other["train_loss"], mine["train_loss"], strict=True)]
    differences.semilogy(steps, [value or math.nan for value in train], color="#5b7f95", linewidth=0.9)
    differences.set_ylabel("difference (nats)")
    differences.set_xlabel("step")
    differences.xaxis.set_major_locator(MaxNLocator(integer=True))

    medians = [1e3 * run["median_step_seconds"] for run in (other, mine)]
    bars = times.bar([run["name"] for run in (other, mine)], medians, color=colours, width=0.6)
    times.bar_label(bars, [f"{median:.3g} ms" for median in medians], padding=3)
    times.set_ylabel("step(), median (ms)")
    times.set_title(
        f"{found['tensors']} tensors, {found['parameters'] / 1e6:.2f} M parameters", loc="left", fontsize=10
    )
    times.margins(y=0.12)
    for axis in (losses, differences, times):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(results.describe(found), x=0.01, ha="left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# The command


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or larger")
    return number


def _device(value: str) -> torch.device:
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is not a device") from error
    if device.type not in SIZES:
        raise argparse.ArgumentTypeError(f"{value!r}: the demo runs on {' and '.join(SIZES)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{value!r}: torch sees {torch.cuda.device_count()} GPUs")
    return device


def make_parser() -> argparse.ArgumentParser:
    """The options of the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedstep.bench.train_gpt",
        description="Train a small GPT with torch.optim and with fusedstep, from the same seed, and compare.",
    )
    add = parser.add_argument
    add("--optimizer", choices=optimizers(), default=DEFAULT_OPTIMIZER, help="(default: %(default)s)")
    add("--lr", type=float, help="largest learning rate (default: one that suits the optimizer)")
    add("--backend", choices=backends.CHOICES, help="of fusedstep (default: auto)")
    add("--device", metavar="DEVICE", type=_device, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="run the model under bfloat16 autocast (default: only on a GPU)",
    )
    add("--seed", metavar="N", type=int, default=0, help="(default: %(default)s)")
    for item in dataclasses.fields(Size):
        defaults = ", ".join(f"{getattr(size, item.name)} on {name}" for name, size in SIZES.items())
        add(f"--{item.name}", metavar="N", type=_positive, help=f"(default: {defaults})")
    add(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=DEFAULT_FOLDER,
        help="where the PNG and the JSON file go (default: %(default)s)",
    )
    add("--json", action="store_true", help="print the results as JSON and nothing else")
    return parser


@contextlib.contextmanager
def _progress(names: Sequence[str], steps: int, wanted: bool) -> Iterator[Callable[[str, int, float], None]]:
    """Something to tell how far a run is; bars on a terminal's standard error."""
    if not wanted:
        yield lambda name, step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {name: progress.add_task(name, total=steps, loss="", start=False) for name in names}

        def report(name: str, step: int, loss: float) -> None:
            if step == 1:
                progress.start_task(tasks[name])
            progress.update(tasks[name], completed=step, loss=f"loss {loss:.3f}")

        yield report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0, 1 if a loss diverged, or 2 if it cannot run as asked for."""
    parser = make_parser()
    args = parser.parse_args(argv)
    needed = ["matplotlib"] + ([] if args.json else ["rich"])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the demo needs {' and '.join(missing)}: pip install 'fusedstep[bench]'", file=sys.stderr)
        return 2
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {item.name: getattr(args, item.name) for item in dataclasses.fields(Size)}
    size = dataclasses.replace(
        SIZES[device.type], **{name: value for name, value in given.items() if value is not None}
    )
    corpus = text.load()
    if size.width % size.heads:
        parser.error(f"--width {size.width} is not a multiple of --heads {size.heads}")
    if size.context >= len(corpus.validation):
        parser.error(
            f"--context {size.context} is too long: the validation text has {len(corpus.validation)} characters"
        )

    options = {**OPTIONS.get(args.optimizer, {}), **({} if args.lr is None else {"lr": args.lr})}
    bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
    training = Training(corpus, size, args.optimizer, device, args.seed, bf16)
    both = contenders(args.optimizer, options, device, args.backend)
    words = sys.argv[1:] if argv is None else argv
    try:
        for contender in both:
            train(training, contender, min(THROWAWAY_STEPS, size.steps))
        if not args.json:
            names = " and ".join(contender.name for contender in both)
            print(f"training a GPT for {size.steps} steps each with {names} on {device}", flush=True)
        others = OtherLoad()
        with _progress([contender.name for contender in both], size.steps, not args.json) as report:
            runs = [
                train(training, c, size.steps, lambda step, loss, name=c.name: report(name, step, loss)) for c in both
            ]
        load = others.cores()
    except Diverged as error:
        print(f"{error}; a smaller --lr may help", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2

    command = shlex.join(["python", "-m", __spec__.name, *words])
    found = findings(training, options, (runs[0], runs[1]), command, load)
    data = args.output / f"train_gpt-{args.optimizer}.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    picture = data.with_suffix(".png")
    draw(found, picture)
    if args.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        show(found)
        for path in (picture, data):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
