"""Compiles the Triton kernel for sm_90 without a GPU and prints what its code holds, as JSON.

Must run without TRITON_INTERPRET.
"""

import json
import re
import sys

import triton
from fusedstep.triton_kernels.rules import RULES
from fusedstep.triton_kernels.step import constants, step_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    **{"table_ptr": "*i64", "chunks_ptr": "*i64", "grads_ptr": "*i64", "hyper_ptr": "*fp64", "done_ptr": "*i32"},
    **{"grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32"},
}


def compile_ptx(rule: str, present: int, dtype: str, scaled: bool) -> str:
    """The kernel's PTX for tensors that are all stored in ``dtype``; bit k of ``present``: whether there is state k."""
    states = tuple(dtype if present >> k & 1 else "" for k in range(RULES[rule].n_named))
    fixed = constants(rule, (dtype, dtype, *states), maximize=False, zero_grads=False, block=2048)
    if not scaled:
        fixed |= {"grad_scale_ptr": None, "found_inf_ptr": None}
    signature = {**POINTERS, "n_tensors": "i32", **dict.fromkeys(fixed, "constexpr")}
    names = step_kernel.arg_names
    source = ASTSource(
        fn=step_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS if name not in fixed},
    )
    options = {"num_warps": 8, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def count(ptx: str) -> dict[str, int]:
    """How often what matters occurs."""
    patterns = {
        "wide_loads": r"\bld\.global[.\w:]*\.v(4\.b32|2\.b64)",
        "wide_stores": r"\bst\.global[.\w:]*\.v(4\.b32|2\.b64)",
        "fma": r"\bfma\.",
        "local": r"\.local\b",
        "approximate": r"\b(div|sqrt|rcp|rsqrt)\.(full|approx)",
        "rounded_roots": r"\bsqrt\.rn\.f",
        "rounded_divisions": r"\bdiv\.rn\.f",
    }
    return {name: len(re.findall(pattern, ptx)) for name, pattern in patterns.items()}


if __name__ == "__main__":
    variants = [tuple(variant.split(",")) for variant in sys.argv[1:]]
    print(json.dumps([count(compile_ptx(r, int(n), d, s == "scaled")) for r, n, d, s in variants]))
