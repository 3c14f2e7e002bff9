"""Every CUDA kernel of the package at the sizes around its boundaries, for compute-sanitizer to look at.

    compute-sanitizer python bench/gpu/kernels.py [--race] [--seconds 70] [--dry]

Nothing is compared here: the tests do that. `--race`: only kernels in which threads tell each other something, which is
what racecheck can find.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest

import torch
from torch import Tensor

import fusedstep
from fusedstep.cases import CASES, PRECISION, REDUCING, Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around vectors, warps, blocks, tiles and chunks.
SIZES = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    31,
    32,
    33,
    63,
    65,
    255,
    256,
    257,
    511,
    513,
    1023,
    1024,
    1025,
    2047,
    2049,
    4095,
    4097,
    8193,
)
LARGE = (32_769, 65_537)
SHAPES = ((), (0, 3), (33, 17), (65, 517), (1030, 3), (3, 2100), (40, 5, 7), (256, 1025), (1, 9000))
KINDS = (CASES[0], CASES[2], CASES[8], CASES[10])  # no state, one, two, three
Configuration = tuple[str, Callable[[], None]]


def tensors(device: str, dtypes: tuple[torch.dtype, ...], shapes: tuple) -> list[Tensor]:
    """Tensors of all shapes, every third one at an address that no vector fits; each the end of its allocation."""
    made = []
    for i, shape in enumerate(shapes):
        shape = (shape,) if isinstance(shape, int) else shape
        offset = 1 if i % 3 == 2 else 0
        buffer = torch.randn(math.prod(shape) + offset, device=device).to(dtypes[i % len(dtypes)])
        made.append(buffer[offset:].view(shape))
    return made


def stepping(case: Case, device: str, dtypes: tuple[torch.dtype, ...], shapes: tuple, **options) -> Callable[[], None]:
    def run() -> None:
        params = [torch.nn.Parameter(value) for value in tensors(device, dtypes, shapes)]
        made = getattr(fusedstep, case.optimizer)
        optimizer = made(params, backend="cuda" if device == "cuda" else "cpu", **{**case.options, **options})
        for skip in (0.0, 0.0, 1.0):
            optimizer.grad_scale = torch.tensor(2.0, device=device)
            optimizer.found_inf = torch.tensor(skip, device=device)
            for i, (param, grad) in enumerate(zip(params, tensors(device, dtypes, shapes), strict=True)):
                param.grad = None if i == 4 else grad
            optimizer.step()

    return run


def accumulating(device: str, dtype: torch.dtype) -> Callable[[], None]:
    def run() -> None:
        params = [torch.nn.Parameter(value) for value in tensors(device, (dtype,), SIZES)]
        backend = "cuda" if device == "cuda" else "cpu"
        accumulator = fusedstep.GradientAccumulator(params, set_to_none=False, backend=backend)
        for param, grad in zip(params, tensors(device, (dtype,), SIZES), strict=True):
            param.grad = grad
        for weight in (1.0, 0.5):
            accumulator(weight=weight)
        accumulator.assign()

    return run


def scheduled(device: str) -> Callable[[], None]:
    def run() -> None:
        param = torch.nn.Parameter(torch.ones(33, device=device))
        param.grad = torch.ones_like(param)
        schedule = fusedstep.schedules.CosineScheduler(30, 0.05, 0.001, warmup_steps=6)
        backend = "cuda" if device == "cuda" else "cpu"
        optimizer = fusedstep.AdamW([{"params": [param], "lr": schedule}], backend=backend)
        for _ in range(3):
            optimizer.step()

    return run


def elementwise(device: str) -> Iterator[Configuration]:
    for name, dtypes in (("fp32", DTYPES[:1]), ("bf16", DTYPES[1:2]), ("mixed", DTYPES)):
        for case in CASES:
            yield f"{case} {name}", stepping(case, device, dtypes, SIZES + (LARGE if name == "fp32" else ()))


def precise(device: str) -> Iterator[Configuration]:
    for name, options in PRECISION.items():
        for case in KINDS[1:]:
            for dtype in DTYPES[:3]:
                splits = options.get("master_weights") == "split"
                if (dtype == torch.float32 and "state_dtype" not in options) or (splits and dtype != torch.bfloat16):
                    continue
                shapes = SIZES + LARGE[:1]
                yield f"{case} {dtype} {name}", stepping(case, device, (dtype,), shapes, **options)


def chained(device: str) -> Iterator[Configuration]:
    for norm_type in (2.0, math.inf):
        for dtypes in (*((dtype,) for dtype in DTYPES), DTYPES):
            options = {"max_grad_norm": 0.5, "norm_type": norm_type, "skip_nonfinite": True}
            name = f"norm {norm_type} of {', '.join(map(str, dtypes))}"
            yield name, stepping(KINDS[2], device, dtypes, SIZES + LARGE, **options)
    for case in KINDS:
        for kept in ({"zero_grads": True}, {"write_grads": True}):
            options = {"max_grad_norm": 0.5, "ema_decay": 0.9, "weights_copy": torch.bfloat16, **kept}
            for dtypes in (DTYPES[:1], DTYPES[1:2], DTYPES):
                yield f"{case} {kept} {dtypes}", stepping(case, device, dtypes, SIZES, **options)


def reducing(device: str) -> Iterator[Configuration]:
    for name, dtypes in (("fp32", DTYPES[:1]), ("bf16", DTYPES[1:2]), ("mixed", DTYPES)):
        for case in REDUCING:
            yield f"{case} {name}", stepping(case, device, dtypes, SHAPES)


def others(device: str) -> Iterator[Configuration]:
    yield "schedules", scheduled(device)
    for dtype in DTYPES:
        yield f"accumulator {dtype}", accumulating(device, dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description="Every CUDA kernel at the sizes around its boundaries.")
    parser.add_argument("--race", action="store_true", help="only norms and rules that reduce")
    parser.add_argument("--seconds", type=float, default=math.inf, help="when to stop")
    parser.add_argument("--dry", action="store_true", help="on the CPU")
    args = parser.parse_args()
    device = "cpu" if args.dry else "cuda"
    kinds = (chained, reducing) if args.race else (others, chained, reducing, precise, elementwise)
    # One of each kind in turn: whatever time there is, all kinds are seen.
    todo = [c for turn in zip_longest(*(kind(device) for kind in kinds)) for c in turn if c is not None]
    torch.manual_seed(0)
    start, done, failed = time.monotonic(), 0, 0
    for name, run in todo:
        if time.monotonic() - start > args.seconds:
            break
        try:
            run()
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as problem:
            failed += 1
            print(f"FAILED {name}: {type(problem).__name__}: {problem}", flush=True)
        done += 1
    print(f"{done} of {len(todo)} configurations run, {failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
