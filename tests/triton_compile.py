"""Compiles the Triton kernels without a GPU, as their launches do, and prints what their code holds.

Triton's driver is replaced by one that says which GPU there is. Reads kernels from the standard input as
`triton_code.py` describes them, a JSON list; prints a JSON list with what it says of each. Must run without
TRITON_INTERPRET.
"""

import base64
import json
import re
import sys

import torch
import triton_barriers
from fusedstep.triton_kernels import norm, reducing, schedule, step
from fusedstep.triton_kernels.numeric import NONE
from kinds import RULES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from fusedstep.backends.triton import DTYPES

NUMBERS = {
    **{"": NONE.value, "fp32": DTYPES[torch.float32], "bf16": DTYPES[torch.bfloat16]},
    **{"fp16": DTYPES[torch.float16], "fp64": DTYPES[torch.float64], "i8": DTYPES[torch.int8]},
    **{"u8": DTYPES[torch.uint8]},
}
ARGUMENTS = {
    **dict.fromkeys(("table_ptr", "chunks_ptr", "items_ptr", "grads_ptr"), torch.int64),
    **dict.fromkeys(("hyper_ptr", "coefficient_ptr", "average_weight_ptr"), torch.float64),
    **dict.fromkeys(("sums_ptr", "norm_ptr", "limits_ptr", "values_ptr"), torch.float64),
    **dict.fromkeys(("grad_scale_ptr", "found_inf_ptr", "found_before_ptr"), torch.float32),
    "done_ptr": torch.int32,
}
OPTIONAL = ("grad_scale_ptr", "found_inf_ptr", "coefficient_ptr", "found_before_ptr")


class Driver:
    """What Triton's compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def prepared(kernel: str, wanted: dict) -> list:
    """What the backend would launch."""
    if kernel == "schedule":
        return [schedule.prepare()]
    if kernel == "norm":
        limits = (1.0, 1e-6, wanted["by_max_abs"], True, True, True)
        return [norm.prepare(NUMBERS[wanted["dtype"]], wanted["first"], wanted["last"], limits, 2 * step.block_size())]
    dtypes = tuple(NUMBERS[name] for name in wanted["dtypes"])
    followers = tuple(NUMBERS[name] for name in wanted["followers"])
    rule = RULES[wanted["rule"]]
    chosen = (rule, dtypes, followers, wanted["maximize"], wanted["left"])
    if rule.reduces:
        return reducing.prepare(*chosen)
    return [step.prepare(*chosen, step.block_size(), wanted["weight_format"])]


def arguments(names: list[str], wanted: dict) -> list:
    """Stand-ins for what a launch is given."""
    given = []
    for name in names:
        if name in ("n_tensors", "n"):
            given.append(7)
        elif (name in OPTIONAL and not wanted["optional"]) or (
            name == "average_weight_ptr" and wanted["followers"][0] == ""
        ):
            given.append(None)
        else:
            given.append(
                MockTensor(torch.float64 if name == "table_ptr" and "values_ptr" in names else ARGUMENTS[name])
            )
    return given


def compiled(kernel: str, wanted: dict) -> list:
    """The compiled kernels of a step."""
    driver.set_active(Driver(wanted["capability"]))
    found = []
    for launch in prepared(kernel, wanted):
        names = [name for name in launch.kernel.arg_names if name not in launch.constants]
        given = arguments(names, wanted)
        found.append(launch.kernel.warmup(*given, **launch.constants, **launch.options, grid=(1,)))
    return found


def describe(kernel, machine_code: bool) -> dict:
    """How often what matters occurs. In float64 an approximation is only where the logarithm begins."""
    patterns = {
        "wide_loads": r"\bld\.global[.\w:]*\.v(4\.b32|2\.b64)",
        "wide_stores": r"\bst\.global[.\w:]*\.v(4\.b32|2\.b64)",
        "fma": r"\bfma\.",
        "local": r"\.local\b",
        "approximate": r"\b(div|sqrt|rcp|rsqrt)\.(full|approx)[.\w]*\.f32",
        "flushing": r"\.ftz\b",
        "rounded_roots": r"\bsqrt\.rn\.f",
        "rounded_divisions": r"\bdiv\.rn\.f",
    }
    found = {name: len(re.findall(pattern, kernel.asm["ptx"])) for name, pattern in patterns.items()}
    ttgir = kernel.asm["ttgir"]
    return {
        **found,
        "name": kernel.metadata.name,
        "cubin": base64.b64encode(kernel.asm["cubin"]).decode() if machine_code else "",
        "unordered": triton_barriers.unordered(ttgir),
        "gradient_pairs": triton_barriers.gradient_pairs(ttgir),
    }


if __name__ == "__main__":
    found = []
    for kernel, wanted in json.load(sys.stdin):
        try:
            machine_code = wanted.get("machine_code", False)
            found.append([describe(each, machine_code) for each in compiled(kernel, wanted)])
        except Exception as error:
            raise RuntimeError(f"{kernel} {wanted}") from error
    print(json.dumps(found))
