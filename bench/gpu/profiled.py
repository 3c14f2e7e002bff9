"""One step of each kind of kernel between the profiler's start and stop, for ncu.

ncu --profile-from-start off python bench/gpu/profiled.py [--dry]
"""

from __future__ import annotations

import argparse
import sys

import torch

import fusedstep
from fusedstep.cases import PRECISION

ELEMENTS = 100_000_000
BF16 = torch.bfloat16
STEPS = (  # name, class, dtype, options
    ("AdamW fp32", "AdamW", torch.float32, {}),
    ("AdamW bf16", "AdamW", BF16, {}),
    ("AdamW bf16, split, 8-bit states", "AdamW", BF16, PRECISION["split, 8-bit states"]),
    ("AdamW fp32, bf16 states", "AdamW", torch.float32, PRECISION["bf16 states"]),
    ("clip + AdamW fp32", "AdamW", torch.float32, {"max_grad_norm": 1.0}),
    ("clip + AdamW bf16", "AdamW", BF16, {"max_grad_norm": 1.0}),
    ("Adafactor fp32", "TorchAdafactor", torch.float32, {}),
    ("Adafactor bf16", "TorchAdafactor", BF16, {}),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="One step of each kind of kernel, for ncu.")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with little work")
    args = parser.parse_args()
    device = "cpu" if args.dry else "cuda"
    elements = 10_000 if args.dry else ELEMENTS
    failed = False
    for backend in ("cpu",) if args.dry else ("cuda", "triton"):
        # ncu takes a second or two for a launch.
        for name, made, dtype, options in STEPS if backend != "triton" else (*STEPS[:2], STEPS[-1]):
            shape = (elements // 4000, 4000) if made == "TorchAdafactor" else (elements,)
            param = torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype))
            param.grad = torch.randn(shape, device=device, dtype=dtype)
            try:
                optimizer = getattr(fusedstep, made)([param], backend=backend, **options)
                optimizer.step()
                if not args.dry:
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                optimizer.step()
                if not args.dry:
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
                print(f"{backend}: {name}, {optimizer.kernel_calls} launches", flush=True)
            except Exception as problem:
                failed = True
                print(f"FAILED {backend}: {name}: {type(problem).__name__}: {problem}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
