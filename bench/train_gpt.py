"""The demo: train a small GPT twice, with torch.optim and with fusedstep, and compare.

    python -m fusedstep.bench.train_gpt --help

Both runs start from the same seed and see the same batches in the same order, with deterministic kernels; only the
optimizer differs. A third, shorter run of torch's optimizer starts from weights that differ in their last bit: a
difference of losses as large as its is what rounding alone makes of a training, no matter of the optimizer. A table
goes to the terminal, the curves into a PNG and a JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusedstep

from .. import backends
from ..cases import PRECISION
from . import text
from .demo_results import Run, draw, findings, show
from .gpt import GPT, Size
from .optimizers import PRECISIONS, torch_class
from .terminal import positive, progress
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
    "Adafactor": {"lr": 3e-2, "relative_step": False, "beta1": 0.9},
    "TorchAdafactor": {"lr": 3e-2, "weight_decay": 0.01},
    "AdamWeightDecay": {"learning_rate": 3e-3, "beta_2": 0.95, "weight_decay_rate": 0.1},
}
DEFAULT_OPTIMIZER = "AdamW"
DEFAULT_FOLDER = Path("build", "demo")
WARMUP_SHARE = 0.1  # of the steps; the learning rate grows linearly
FINAL_LR = 0.1  # of the largest learning rate, where the cosine ends
MAX_NORM = 1.0  # gradients are clipped to this norm
VALIDATIONS = 20  # in a run, beside the one at the end
ROUNDING_SHARE = 0.25  # of the steps in the run that shows what rounding makes
THROWAWAY_STEPS = 3  # before the clocks start: both optimizers find libraries loaded and kernels compiled

SIZES = {
    "cpu": Size(layers=6, width=128, heads=4, context=64, batch=16, steps=400),
    "cuda": Size(layers=8, width=384, heads=6, context=256, batch=32, steps=1000),
}


# The optimizers


@dataclass(frozen=True)
class Contender:
    """One of the two optimizers: ``build(groups)`` makes it, for a model in ``dtype``."""

    name: str
    implementation: str
    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32


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
    name: str, options: dict[str, Any], device: torch.device, backend: str | None, precision: str = ""
) -> tuple[Contender, Contender]:
    """torch's optimizer and ours; where torch has none, ours on the reference backend is the one to compare with.

    ``precision``, a name of `cases.PRECISION`, concerns ours alone; the other one trains an fp32 model in any case.
    """
    ours = getattr(fusedstep, name)
    theirs = torch_class(name)
    if theirs is None:
        other = Contender(
            f"fusedstep.{name}, reference",
            "plain torch operations",
            lambda groups: ours(groups, backend="reference", **options),
        )
    else:
        fused = {"fused": True} if fused_works(theirs, device) else {}
        other = Contender(
            f"torch.optim.{theirs.__name__}",
            "fused=True" if fused else "default",
            lambda groups: theirs(groups, **fused, **options),
        )
    more = PRECISION.get(precision, {})
    mine = Contender(
        f"fusedstep.{name}",
        precision,
        lambda groups: ours(groups, backend=backend, **options, **more),
        torch.float32 if set(more) <= {"state_dtype"} else torch.bfloat16,  # the others concern 16-bit weights
    )
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


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """The same numbers from run to run: kernels that add in the order of their arrival are not used.

    cuBLAS reads its variable when it is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        # The other fused kernels of attention have no deterministic backward pass.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@torch.no_grad()
def change_last_bits(model: nn.Module) -> None:
    """Move each weight to the next number above or below it, by chance but in the same way in every call."""
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        up = torch.randint(2, param.shape, generator=generator, dtype=torch.bool).to(param.device)
        towards = torch.where(up, torch.inf, -torch.inf).to(param.dtype)
        param.copy_(torch.nextafter(param, towards))


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
    training: Training,
    contender: Contender,
    steps: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
    *,
    nudged: bool = False,
) -> Run:
    """Train a new model; ``report(step, loss)`` is told after each step.

    ``nudged``: from weights that differ in their last bit, and only for `ROUNDING_SHARE` of the steps.

    Raises:
        Diverged: the loss is no longer finite.
    """
    size, device, corpus = training.size, training.device, training.corpus
    model = training.model().to(contender.dtype)
    if nudged:
        change_last_bits(model)
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
    last = max(1, round(ROUNDING_SHARE * steps)) if nudged else steps
    for step in range(1, last + 1):
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
        if step % every == 0 or step == last:
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


# The command


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
    add("--precision", choices=PRECISIONS, help="how fusedstep stores weights and states (default: as torch does)")
    add("--seed", metavar="N", type=int, default=0, help="(default: %(default)s)")
    for item in dataclasses.fields(Size):
        defaults = ", ".join(f"{getattr(size, item.name)} on {name}" for name, size in SIZES.items())
        add(f"--{item.name}", metavar="N", type=positive, help=f"(default: {defaults})")
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
    both = contenders(args.optimizer, options, device, args.backend, PRECISIONS.get(args.precision, ""))
    words = sys.argv[1:] if argv is None else argv
    try:
        with deterministic_kernels():
            for contender in both:
                train(training, contender, min(THROWAWAY_STEPS, size.steps))
            if not args.json:
                names = " and ".join(contender.name for contender in both)
                print(f"training a GPT for {size.steps} steps each with {names} on {device}", flush=True)
            others = OtherLoad()
            with progress([contender.name for contender in both], size.steps, not args.json) as report:
                runs = [
                    train(
                        training, c, size.steps, lambda step, loss, name=c.name: report(name, step, f"loss {loss:.3f}")
                    )
                    for c in both
                ]
            load = others.cores()
            nudged = train(training, both[0], size.steps, nudged=True)
    except Diverged as error:
        print(f"{error}; a smaller --lr may help", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2

    command = shlex.join(["python", "-m", __spec__.name, *words])
    found = findings(training, options, (runs[0], runs[1]), nudged, command, load)
    data = args.output / f"train_gpt-{'-'.join(filter(None, (args.optimizer, args.precision)))}.json"
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
