"""Compiles the Triton kernel of schedules for sm_90 without a GPU and prints what its code holds, as JSON.

Must run without TRITON_INTERPRET.
"""

import json
import re
import struct

import triton
from fusedstep.triton_kernels.schedule import schedule_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if __name__ == "__main__":
    signature = {"values_ptr": "*fp64", "table_ptr": "*fp64", "found_inf_ptr": "*fp32", "n": "i32"}
    options = {"num_warps": 1, "enable_fp_fusion": False}
    source = ASTSource(fn=schedule_kernel, signature=signature, constexprs={}, attrs={})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    patterns = {
        "fma": r"\bfma\.",
        "approximate": r"\b(div|sqrt|rcp|rsqrt)\.(full|approx)",
        "single": r"\b(add|sub|mul|div)\.(rn\.)?f32",
        "local": r"\.local\b",
        "rounded_roots": r"\bsqrt\.rn\.f64",
        "rounded_divisions": r"\bdiv\.rn\.f64",
    }
    found = {name: len(re.findall(pattern, ptx)) for name, pattern in patterns.items()}
    words = set(re.findall(r"\b0d([0-9A-Fa-f]{16})\b", ptx))
    found["constants"] = [struct.unpack(">d", bytes.fromhex(word))[0].hex() for word in words]
    print(json.dumps(found))
