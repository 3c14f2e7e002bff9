"""The main numbers of a GPU, a JSON line a row as they come: steps of fusedstep beside torch's, in one run with a copy.

    python bench/gpu/first.py RESULTS.jsonl [--seconds 90] [--dry]

Times are those of the device: events around calls in a row, the median of some windows. Each contender's first step is
compared with the reference before it is timed. `host_us` is until a call returns, the device being idle. The share of
the copy's speed counts the bytes that a step must move. The most important rows come first; at the end of its time the
rest is left out, and the last line says how many.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fusedstep.bench import models, optimizers, peers, results, timing
from torch import Tensor

import fusedstep
from fusedstep.cases import PRECISION

WINDOWS = 5
WINDOW_SECONDS = 0.02
SAMPLE = 4096  # elements of each of some tensors that are compared with the reference
ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
BILLION = ((10**9,),)
HALF = ((5 * 10**8,),)
FACTORED = ((4096, 4096),) * 24 + ((32000, 4096),)


@dataclass(frozen=True)
class Case:
    """What is stepped over. ``states``: of the parameter's shape; ``grad_reads``: how often a gradient must be read."""

    name: str
    shapes: Sequence[tuple[int, ...]]
    optimizer: str = "AdamW"
    options: dict[str, Any] = field(default_factory=lambda: ADAM)
    states: int = 2
    grad_reads: int = 1
    dtype: torch.dtype = torch.float32
    precision: str = ""
    ours: dict[str, Any] = field(default_factory=dict)  # options that torch does not have
    torch_variants: tuple[str, ...] = ("torch fused", "torch foreach")
    clips: bool = False  # torch's clipping comes before torch's step
    replayed: bool = False  # as a captured graph
    goal: bool = False  # whether its share of the copy's speed is a goal of ours

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def bytes_per_parameter(self) -> float:
        described = optimizers.Optimizer(self.name, self.optimizer, {}, self.states, self.grad_reads)
        more = 8 if self.ours.get("ema_decay") else 0  # an average, read and written
        more += self.dtype.itemsize if self.ours.get("zero_grads") else 0
        return described.bytes_per_parameter(self.dtype, self.precision) + more


def cases() -> Iterator[Case]:
    """All rows, the most important first."""
    bf16 = torch.bfloat16
    yield Case("AdamW 10^9 fp32", BILLION, goal=True)
    yield Case("AdamW 10^9 bf16", BILLION, dtype=bf16, goal=True)
    yield Case("AdamW 1000 x 16", ((16,),) * 1000)
    yield Case("AdamW GPT-2 fp32", models.gpt2())
    yield Case("AdamW GPT-2 bf16", models.gpt2(), dtype=bf16)
    for name in PRECISION:
        dtype = torch.float32 if name in ("bf16 states",) else bf16
        precise = {"precision": name, "ours": PRECISION[name], "torch_variants": ()}
        if PRECISION[name] != {"state_dtype": dtype}:
            yield Case(
                f"AdamW 10^9 {'fp32' if dtype == torch.float32 else 'bf16'}, {name}", BILLION, dtype=dtype, **precise
            )
        if name == "8-bit states":
            yield Case(f"AdamW 10^9 fp32, {name}", BILLION, **precise)
    adafactor = {"optimizer": "TorchAdafactor", "options": {"lr": 0.01}, "states": 0, "grad_reads": 3}
    yield Case("Adafactor fp32", FACTORED, torch_variants=("torch foreach",), **adafactor)
    yield Case("Adafactor bf16", FACTORED, dtype=bf16, torch_variants=("torch foreach",), **adafactor)
    clip = {"ours": {"max_grad_norm": 1.0}, "grad_reads": 2, "clips": True, "torch_variants": ("torch fused",)}
    yield Case("clip + AdamW GPT-2 fp32", models.gpt2(), **clip)
    yield Case("clip + AdamW Llama 1.1B fp32", models.llama_1b(), **clip)
    yield Case("clip + AdamW Llama 1.1B bf16", models.llama_1b(), dtype=bf16, **clip)
    kept = {"ours": {"ema_decay": 0.999, "zero_grads": True}, "torch_variants": ()}
    yield Case("AdamW + average + zeros, Llama 1.1B fp32", models.llama_1b(), **kept)
    yield Case("AdamW + average + zeros, Llama 1.1B bf16", models.llama_1b(), dtype=bf16, **kept)
    yield Case("AdamW 1000 x 16 replayed", ((16,),) * 1000, replayed=True, torch_variants=())
    yield Case("AdamW 1000 x 1024", ((1024,),) * 1000)
    yield Case("AdamW 10000 x 64", ((64,),) * 10_000, torch_variants=("torch fused",))
    yield Case("AdamW 1 x 16", ((16,),))
    yield Case("AdamW ResNet-50", models.resnet50())
    yield Case("AdamW Llama 1.1B fp32", models.llama_1b(), torch_variants=("torch fused",))
    yield Case("AdamW Llama 1.1B bf16", models.llama_1b(), dtype=bf16, torch_variants=("torch fused",))
    for name, optimizer, options, states in (
        ("SGD", "SGD", {"lr": 1e-3}, 0),
        ("SGD momentum", "SGD", {"lr": 1e-3, "momentum": 0.9}, 1),
        ("Adam", "Adam", {"lr": 1e-3}, 2),
        ("Adam amsgrad", "Adam", {"lr": 1e-3, "amsgrad": True}, 3),
        ("RMSprop", "RMSprop", {"lr": 1e-3}, 1),
        ("RMSprop centered + momentum", "RMSprop", {"lr": 1e-3, "centered": True, "momentum": 0.9}, 3),
        ("Adagrad", "Adagrad", {"lr": 1e-3}, 1),
        ("Lion", "Lion", {"lr": 1e-3}, 1),
        ("AdaBelief", "AdaBelief", {"lr": 1e-3}, 2),
    ):
        yield Case(f"{name} 5 x 10^8 fp32", HALF, optimizer, options, states)


class Clock:
    """Times of one device, and the speed of its copies."""

    def __init__(self, device: torch.device, dry: bool) -> None:
        self.device = device
        size = (1 << 20) if dry else 2_150_000_000  # bytes, twice: 4.3 GB to read and write
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        self.copy = 2 * size / statistics.median(self.windows(lambda: target.copy_(source)))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def windows(self, call: Callable[[], object]) -> list[float]:
        """Seconds of a call, in each of some windows of calls in a row."""
        for _ in range(2):
            call()
        self.synchronize()
        once = timing.wall(lambda: (call(), self.synchronize()))
        n = max(3, min(200, int(WINDOW_SECONDS / once)))
        if self.device.type != "cuda":
            return [timing.wall(lambda: [call() for _ in range(n)]) / n for _ in range(WINDOWS)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(WINDOWS + 1)]
        events[0].record()
        for event in events[1:]:
            for _ in range(n):
                call()
            event.record()
        self.synchronize()
        return [a.elapsed_time(b) / 1e3 / n for a, b in itertools.pairwise(events)]

    def host(self, call: Callable[[], object]) -> float:
        """Seconds until a call returns, the device being idle."""
        taken = []
        for _ in range(7):
            self.synchronize()
            taken.append(timing.wall(call))
        return statistics.median(taken)


class Contenders:
    """Everybody who takes the steps of a case, over the same parameters and gradients."""

    def __init__(self, case: Case, device: torch.device, dry: bool) -> None:
        self.case, self.device = case, device
        scale = 100_000 if case.elements > 10**8 and dry else 1
        generator = torch.Generator(device).manual_seed(1)
        shapes = [tuple(max(1, n // scale) if i == 0 else n for i, n in enumerate(shape)) for shape in case.shapes]
        self.params = [torch.randn(s, generator=generator, device=device, dtype=case.dtype) for s in shapes]
        for param in self.params:
            param.requires_grad_()
            param.grad = torch.randn(param.shape, generator=generator, device=device, dtype=case.dtype)
        backends = ("cpu",) if dry else ("cuda", "triton")
        self.names = [f"fusedstep {name}" for name in backends] + list(case.torch_variants)
        self.theirs = optimizers.torch_class(case.optimizer)

    def build(self, name: str) -> torch.optim.Optimizer | None:
        """An optimizer with its states; None if there is none of that kind."""
        options = self.case.options
        if name.startswith("fusedstep"):
            made = getattr(fusedstep, self.case.optimizer)
            return made(self.params, backend=name.split()[1], **options, **self.case.ours)
        variant = peers.TORCH_VARIANTS[name]
        if self.theirs is None or (
            "fused" in variant and self.case.optimizer not in ("AdamW", "Adam", "SGD", "Adagrad")
        ):
            return None
        if self.case.optimizer == "Adagrad" and self.device.type == "cuda" and "fused" in variant:
            return None
        return self.theirs(self.params, **options, **variant)

    def step_of(self, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        if self.case.clips and not isinstance(optimizer, fusedstep.optimizer.FusedOptimizer):

            def clip_and_step() -> None:
                torch.nn.utils.clip_grad_norm_(self.params, 1.0)
                optimizer.step()

            return clip_and_step
        return optimizer.step

    @staticmethod
    def sample(tensor: Tensor) -> Tensor:
        """A copy of some of its elements, on the host."""
        return tensor.reshape(-1)[:SAMPLE].to("cpu", torch.float64, copy=True)

    def check(self, name: str, step: Callable[[], object]) -> None:
        """Take a first step; raises if some of its elements are not what the reference makes of them."""
        case = self.case
        sampled = self.params[:2] + self.params[-1:]
        alone = case.grad_reads == 1  # no element depends on another one
        before = [(self.sample(p.detach()), self.sample(p.grad)) for p in sampled]
        step()
        after = [self.sample(p.detach()) for p in sampled]
        if not all(bool(value.isfinite().all()) for value in after):
            raise AssertionError(f"{name}: the parameters are not finite after a step")
        if not alone:
            return
        params = []
        for value, grad in before:
            params.append(torch.nn.Parameter(value.clone()))
            params[-1].grad = grad
        getattr(fusedstep, case.optimizer)(params, backend="reference", **case.options).step()
        rounding = 2.0**-24 if case.dtype == torch.float32 else 2.0**-7
        for (value, _), found, right in zip(before, after, params, strict=True):
            moved = (right.detach() - value).abs()
            allowed = 4 * rounding * value.abs() + (0.1 if "8-bit" in case.precision else 0.01) * moved
            if not bool(((found - right.detach()).abs() <= allowed + 1e-7).all()):
                worst = ((found - right.detach()).abs() - allowed).max().item()
                raise AssertionError(f"{name}: a step is wrong by {worst:.3g} more than rounding")


def graph_of(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The replay of a captured call; on a CPU the call."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(case: Case, clock: Clock, dry: bool) -> Iterator[dict[str, Any]]:
    """A row for each contender."""
    contenders = Contenders(case, clock.device, dry)
    elements = sum(p.numel() for p in contenders.params)
    about = {"case": case.name, "goal": case.goal, "tensors": len(contenders.params), "elements": elements}
    for name in contenders.names:
        row: dict[str, Any] = {**about, "contender": name}
        grads: list[Tensor | None] = [p.grad for p in contenders.params]
        if case.ours.get("zero_grads"):
            for param in contenders.params:
                param.grad.normal_()
        try:
            optimizer = contenders.build(name)
            if optimizer is None:
                continue
            step = contenders.step_of(optimizer)
            contenders.check(name, step)
            if case.replayed:
                step = graph_of(step, clock.device)
            taken = clock.windows(step)
            seconds = statistics.median(taken)
            moved = elements * case.bytes_per_parameter()
            row |= {"ms": seconds * 1e3, "spread": (max(taken) - min(taken)) / seconds}
            row |= {"host_us": clock.host(step) * 1e6, "gb_per_s": moved / seconds / 1e9}
            if elements > 10**7:  # less fits into a cache
                row["copy_share"] = moved / seconds / clock.copy
        except Exception as problem:  # a finding, not the end of the run
            row["error"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
        finally:
            for param, grad in zip(contenders.params, grads, strict=True):
                param.grad = grad
            optimizer = step = None
            gc.collect()
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description="The main numbers of a GPU.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=90.0, help="when to stop (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with little work")
    args = parser.parse_args()
    start = time.monotonic()
    device = torch.device("cpu") if args.dry else torch.device("cuda", 0)
    failed, left = False, 0
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("w") as file:

        def write(row: dict[str, Any]) -> None:
            text = json.dumps(row)
            print(text, file=file, flush=True)
            print(text, flush=True)

        clock = Clock(device, args.dry)
        facts = {"device": results.device_facts(device), "versions": results.versions(), "git": results.git_state()}
        write({"copy_gb_per_s": clock.copy / 1e9, "dry": args.dry, **facts})
        for case in cases():
            if time.monotonic() - start > args.seconds:
                left += 1
                continue
            for row in measure(case, clock, args.dry):
                failed |= "error" in row and row["contender"].startswith("fusedstep")
                write(row)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        write({"seconds": round(time.monotonic() - start, 1), "cases_left_out": left})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
