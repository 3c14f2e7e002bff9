"""Compiles the Triton kernels for sm_90 without a GPU and prints what their code holds, as JSON.

Must run without TRITON_INTERPRET.
"""

import json
import re
import sys

import triton
from fusedstep.triton_kernels import norm, reducing
from fusedstep.triton_kernels.rules import RULES
from fusedstep.triton_kernels.step import constants, step_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    **{"table_ptr": "*i64", "chunks_ptr": "*i64", "grads_ptr": "*i64", "hyper_ptr": "*fp64", "done_ptr": "*i32"},
    **{"grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32", "coefficient_ptr": "*fp64", "average_weight_ptr": "*fp64"},
    **{"sums_ptr": "*fp64", "norm_ptr": "*fp64", "limits_ptr": "*fp64", "found_before_ptr": "*fp32"},
}


def compile_ptx(rule: str, present: int, dtype: str, scaled: bool) -> str:
    """The kernel's PTX for tensors that are all stored in ``dtype``; bit k of ``present``: whether there is state k."""
    states = tuple(dtype if present >> k & 1 else "" for k in range(RULES[rule].n_named))
    fixed = constants(rule, (dtype, dtype, *states), ("", ""), maximize=False, left="", block=2048)
    if not scaled:
        fixed |= {"grad_scale_ptr": None, "found_inf_ptr": None, "coefficient_ptr": None, "average_weight_ptr": None}
    return ptx_of(step_kernel, fixed)


def compile_reducing_ptx(rule: str, element_state: bool, dtype: str) -> list[str]:
    """The PTX of a reducing rule's kernels for tensors that are all stored in ``dtype``."""
    has = reducing.REDUCING_RULES[rule]
    states = (has.row, has.column, has.element and element_state, has.tensor, has.row2, has.column2)
    dtypes = (dtype, dtype, *(dtype if state else "" for state in states))
    absent = dict.fromkeys(("grad_scale_ptr", "found_inf_ptr", "coefficient_ptr"))
    fixed = reducing.constants(rule, dtypes, ("", ""), False, "", False) | absent
    return [ptx_of(kernel, fixed) for kernel in reducing.kernels_of(rule)]


def compile_norm_ptx(dtype: str, last: bool) -> str:
    """The PTX of the kernel that sums over gradients of one dtype."""
    limits = (1.0, 1e-6, False, False, True, True)
    return ptx_of(norm.norm_kernel, norm.constants(dtype, False, last, limits, block=2048))


def compile_stored_ptx(form: str, state: str) -> str:
    """The PTX of Adam's kernel for bf16 weights in a form, with states in "i8" (and "u8") or a dtype."""
    dtypes = ("bf16", "bf16", state, "u8" if state == "i8" else state, "")
    fixed = constants("adam", dtypes, ("", ""), False, "", 2048, form)
    absent = dict.fromkeys(("grad_scale_ptr", "found_inf_ptr", "coefficient_ptr", "average_weight_ptr"))
    return ptx_of(step_kernel, fixed | absent)


def ptx_of(kernel, fixed: dict) -> str:
    """The PTX of a kernel with its compile-time arguments."""
    names = kernel.arg_names
    signature = {**POINTERS, "items_ptr": "*i64", "n_tensors": "i32", **dict.fromkeys(fixed, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: type_ for name, type_ in signature.items() if name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in (*POINTERS, "items_ptr")
            if name in names and name not in fixed
        },
    )
    options = {"num_warps": 8, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def count(ptx: str) -> dict[str, int]:
    """How often what matters occurs. In float64 an approximation is only where the logarithm begins."""
    patterns = {
        "wide_loads": r"\bld\.global[.\w:]*\.v(4\.b32|2\.b64)",
        "wide_stores": r"\bst\.global[.\w:]*\.v(4\.b32|2\.b64)",
        "fma": r"\bfma\.",
        "local": r"\.local\b",
        "approximate": r"\b(div|sqrt|rcp|rsqrt)\.(full|approx)[.\w]*\.f32",
        "rounded_roots": r"\bsqrt\.rn\.f",
        "rounded_divisions": r"\bdiv\.rn\.f",
    }
    return {name: len(re.findall(pattern, ptx)) for name, pattern in patterns.items()}


if __name__ == "__main__":
    if sys.argv[1] == "stored":
        print(json.dumps([count(compile_stored_ptx(*variant.split(","))) for variant in sys.argv[2:]]))
        sys.exit()
    if sys.argv[1] == "norm":
        print(json.dumps([count(compile_norm_ptx(d, last == "1")) for d, last in (v.split(",") for v in sys.argv[2:])]))
        sys.exit()
    reduces = sys.argv[1] == "reducing"
    variants = [tuple(variant.split(",")) for variant in sys.argv[1 + reduces :]]
    if reduces:
        print(json.dumps([[count(ptx) for ptx in compile_reducing_ptx(r, n == "1", d)] for r, n, d in variants]))
    else:
        print(json.dumps([count(compile_ptx(r, int(n), d, s == "scaled")) for r, n, d, s in variants]))
