"""What a step costs on the CPU where `fully_shard` keeps weights in main memory (`CPUOffloadPolicy`).

    python -m fusedstep.bench.offload [--layers N] [--threads N]    measures, and writes a results file
    python -m fusedstep.bench.offload bench/results/FILE.jsonl      prints its table

One process, whose parts are the whole model; a step on the CPU knows no other one. Bytes are those of the tensors that
there are, once a contender has made steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedstep

from ..codecs import join
from . import results
from .models import gpt2
from .report import NOTABLE_LOAD, number, ratio, table_head
from .timing import OtherLoad, Stopwatch, interleaved, summary

FP32, BF16 = torch.float32, torch.bfloat16
TORCH, SPLIT = "torch fused", "fusedstep, split, bf16 states"

# Name, what makes the optimizer, dtype of weights and gradients; whether the parts are given as plain tensors, which
# torch's class is quicker with.
CONTENDERS: dict[tuple[str, torch.dtype], tuple[Any, bool]] = {
    (TORCH, FP32): (functools.partial(torch.optim.AdamW, fused=True), False),
    (f"{TORCH}, plain tensors", FP32): (functools.partial(torch.optim.AdamW, fused=True), True),
    ("fusedstep", FP32): (fusedstep.AdamW, False),
    ("fusedstep, bf16 states", FP32): (functools.partial(fusedstep.AdamW, state_dtype=BF16), False),
    (TORCH, BF16): (functools.partial(torch.optim.AdamW, fused=True), False),
    (f"{TORCH}, plain tensors", BF16): (functools.partial(torch.optim.AdamW, fused=True), True),
    ("fusedstep", BF16): (fusedstep.AdamW, False),
    (SPLIT, BF16): (functools.partial(fusedstep.AdamW, master_weights="split", state_dtype=BF16), False),
}
# How far a part may be from torch's fp32 one after the steps of the check, in units of the learning rate.
LR, STEPS = 1e-3, 3
TOLERANCE = {"fp32": 1e-2, "narrow states": 0.3}


class _Weights(torch.nn.Module):
    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(20)
        for index, shape in enumerate(shapes):
            self.register_parameter(f"p{index}", torch.nn.Parameter(rounded(shape, generator).to(dtype)))


def rounded(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers that are the same ones in 16 bits as in 32."""
    return torch.empty(shape).uniform_(-1, 1, generator=generator).to(BF16)


class Contender:
    """An optimizer of a model's offloaded parts, with gradients."""

    def __init__(self, name: str, dtype: torch.dtype, shapes: list[tuple[int, ...]], mesh: Any) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        make, plain = CONTENDERS[name, dtype]
        policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        self.model = fully_shard(_Weights(shapes, dtype), mesh=mesh, offload_policy=policy)
        params = [*self.model.parameters()]
        if plain:
            params = [torch.nn.Parameter(local(param)) for param in params]
        generator = torch.Generator().manual_seed(21)
        for param in params:
            param.grad = torch.empty_like(param)
            local(param.grad).copy_(rounded(param.shape, generator))
        self.name, self.dtype, self.params = name, dtype, params
        self.optimizer = make(params, lr=LR)

    def step(self) -> None:
        self.optimizer.step()

    def weight(self, index: int) -> Tensor:
        """One that it keeps, as fp32."""
        param, state = self.params[index], self.optimizer.state[self.params[index]]
        if self.name == SPLIT:
            return join(local(param), local(state["weight_remainder"]))
        return local(param).float()

    def bytes(self) -> dict[str, float]:
        """Of memory beside the gradient, and read and written by a step, for each element."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        kept = sum(local(t).nbytes for t in (*self.params, *states) if isinstance(t, Tensor) and t.dim())
        grads, elements = (sum(sizes) for sizes in zip(*((p.grad.nbytes, p.numel()) for p in self.params), strict=True))
        return {"kept": kept / elements, "moved": (grads + 2 * kept) / elements}


def local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check(contenders: list[Contender]) -> None:
    """Raise RuntimeError unless all have come to the weights that torch's fp32 step has come to."""
    first = contenders[0]
    for contender in contenders:
        exact = contender.dtype == FP32 and "states" not in contender.name
        if not exact and contender.name != SPLIT and contender.dtype == BF16:
            continue  # weights of 16 bits alone go their own way
        for index in range(len(first.params)):
            distance = (contender.weight(index) - first.weight(index)).abs().max().item() / LR
            if not distance <= STEPS * TOLERANCE["fp32" if exact else "narrow states"]:
                raise RuntimeError(f"{contender.name} is {distance:.2g} learning rates off at tensor {index}")


def measure(layers: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each contender."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, shapes = init_device_mesh("cpu", (1,)), gpt2(layers)
        contenders = [Contender(name, dtype, shapes, mesh) for name, dtype in CONTENDERS]
        for contender in contenders:
            for _ in range(STEPS):
                contender.step()
        check(contenders)
        stopwatch, load = Stopwatch(torch.device("cpu")), OtherLoad()
        samplers = {
            str(k): functools.partial(stopwatch.sample, contender.step) for k, contender in enumerate(contenders)
        }
        samples = interleaved(samplers, seconds)
        other_load = load.cores()
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        return [
            {
                "contender": contender.name,
                "dtype": str(contender.dtype).removeprefix("torch."),
                "elements": elements,
                "tensors": len(shapes),
                "step_ms": summary(samples[str(k)]["step"], 1e3),
                "other_load": other_load,
                **contender.bytes(),
            }
            for k, contender in enumerate(contenders)
        ]
    finally:
        dist.destroy_process_group()


def save(header: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write a results file: a header, and a line for each row."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / results.file_name(header)).with_suffix(".jsonl")
    path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in (header, *rows)))
    return path


def markdown(path: Path) -> str:
    """The table of a results file, and a line about the machine.

    Raises:
        ValueError: it is not one of this program.
    """
    try:
        header, *rows = (json.loads(line) for line in path.read_text().splitlines())
        first = next(row for row in rows if row["contender"] == TORCH)
        described = results.describe(header)
    except (OSError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(f"{path} is no results file of fusedstep.bench.offload: {error!r}") from error
    lines = table_head(
        ["AdamW", "weights"], ["bytes kept", "bytes moved", "ms", "GB/s", f"speed-up over {TORCH} in fp32"]
    )
    for row in rows:
        ms = row["step_ms"]["median"]
        speed = row["moved"] * row["elements"] / ms / 1e6
        cells = [row["contender"], {"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]]]
        cells += [f"{row['kept']:.1f}", f"{row['moved']:.1f}", number(ms), f"{speed:.1f}"]
        lines.append(f"| {' | '.join([*cells, ratio(first['step_ms']['median'] / ms)])} |")
    notes = [
        f"{first['elements'] / 1e6:.0f} M elements in {first['tensors']} tensors; medians of whole `step()` calls in "
        "interleaved rounds, caches flushed before each; bytes for each element, without and with the gradient",
        described,
    ]
    if (first["other_load"] or 0.0) > NOTABLE_LOAD:
        notes.append(f"other processes used {first['other_load']:.1f} cores meanwhile")
    return "\n".join([*lines, "", f"{'; '.join(notes)}. Written by `{header['command']}`."]).lstrip("\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m fusedstep.bench.offload", description=__doc__.splitlines()[0])
    made.add_argument("file", metavar="FILE.jsonl", type=Path, nargs="?", help="print the table of this file")
    made.add_argument("--layers", type=int, default=4, help="of a GPT-2 (default: %(default)s)")
    made.add_argument("--threads", type=int, help="torch's choice by default; one where other programs run meanwhile")
    made.add_argument("--seconds", type=float, default=8.0, help="for each contender (default: %(default)s)")
    made.add_argument("--output", type=Path, default=results.DEFAULT_FOLDER, help="default: %(default)s")
    return made


def text(argv: list[str]) -> str:
    """The table of a file; what `fusedstep.bench.pages` puts into a page."""
    return markdown(parser().parse_args(argv).file)


def main(argv: list[str]) -> int:
    """Measure, or print the table of a file; returns an exit code."""
    args = parser().parse_args(argv)
    try:
        if args.file is not None:
            print(markdown(args.file))
            return 0
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        settings = {"all_optimizers": False, "optimizers": ["offload"], "precision": False, "quick": False}
        command = shlex.join(["python", "-m", "fusedstep.bench.offload", *argv])
        header = results.header(torch.device("cpu"), command, settings | {"layers": args.layers})
        path = save(header, measure(args.layers, args.seconds), args.output)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown(path))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
