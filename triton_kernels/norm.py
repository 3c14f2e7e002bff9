"""The kernel that sums over gradients, and what follows from the sums: csrc/cuda/norm.cuh and csrc/norm.h in Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launching import Prepared
from .numeric import FP64, maximum, minimum
from .step import CHUNK_ROW
from .stored import load

SUM, LARGEST, NORM, COEFFICIENT = (tl.constexpr(k) for k in range(4))  # numbers of csrc/norm.h's Norm
ARGUMENTS = (  # those of a launch
    *("chunks_ptr", "grads_ptr", "sums_ptr", "norm_ptr", "done_ptr", "limits_ptr", "found_inf_ptr"),
    *("grad_scale_ptr", "found_before_ptr"),
)
LANES = tl.constexpr(256)  # chunks whose sums are added up at once


@triton.jit
def magnitude_bits(x):
    """The bits of absolute values, which compare as these do; infinity and NaN are the largest."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def is_finite(x):
    return x - x == 0.0


@triton.jit
def see(
    grad,
    begin,
    lanes,
    mask,
    sums,
    max_abs,
    inverse,
    GRAD: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    UNMASKED: tl.constexpr,
):
    """Add elements ``begin + lanes`` of one gradient to each lane's sum of squares and largest size."""
    g = load(grad, begin, lanes, mask, GRAD, ARITHMETIC, UNMASKED)
    if not UNMASKED:
        g = tl.where(mask, g, 0.0)
    bits = magnitude_bits(g)
    unscaled = g * inverse
    return sums + unscaled * unscaled, tl.where(bits > max_abs, bits, max_abs)


@triton.jit(do_not_specialize=ARGUMENTS)
def norm_kernel(
    chunks_ptr,
    grads_ptr,
    sums_ptr,
    norm_ptr,
    done_ptr,
    limits_ptr,
    found_inf_ptr,
    grad_scale_ptr,
    found_before_ptr,
    GRAD: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BY_MAX_ABS: tl.constexpr,
    NAN_IF_NONFINITE: tl.constexpr,
    FIND_NONFINITE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK_ROW: tl.constexpr,
):
    scale = tl.full([], 1.0, tl.float64)
    if grad_scale_ptr is not None:
        scale = tl.load(grad_scale_ptr).to(tl.float64)
    program = tl.program_id(0)
    chunk_ptr = chunks_ptr + program.to(tl.int64) * CHUNK_ROW
    n = tl.load(chunk_ptr + 1).to(tl.int32)
    offset = tl.load(chunk_ptr + 2)
    grad = tl.load(grads_ptr + tl.load(chunk_ptr))
    inverse = (1.0 / scale).to(ARITHMETIC)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], ARITHMETIC)
    max_abs = magnitude_bits(sums)
    if grad != 0:
        whole = 0 * n
        if grad % 16 == 0:
            whole = n // BLOCK * BLOCK
        start = 0 * n
        while start < whole:
            sums, max_abs = see(
                grad, offset + start, lanes, None, sums, max_abs, inverse, GRAD, ARITHMETIC, True
            )  # fmt: skip
            start += BLOCK
        while start < n:
            sums, max_abs = see(
                grad, offset + start, lanes, start + lanes < n, sums, max_abs, inverse, GRAD, ARITHMETIC, False
            )  # fmt: skip
            start += BLOCK
    most = tl.max(max_abs, axis=0).to(ARITHMETIC, bitcast=True)
    tl.store(sums_ptr + 2 * program, tl.sum(sums.to(tl.float64), axis=0))
    tl.store(sums_ptr + 2 * program + 1, most.to(tl.float64))

    # The last program to come here adds up what all have left, in a fixed order.
    tl.debug_barrier()
    if tl.atomic_add(done_ptr, 1) == tl.num_programs(0) - 1:
        tl.debug_barrier()
        tl.store(done_ptr, 0)
        n_chunks = tl.num_programs(0)
        partial = tl.zeros([LANES], tl.float64)
        magnitudes = magnitude_bits(partial)
        first = 0 * n_chunks
        while first < n_chunks:
            index = first + tl.arange(0, LANES)
            partial += tl.load(sums_ptr + 2 * index, mask=index < n_chunks, other=0.0)
            bits = magnitude_bits(tl.load(sums_ptr + 2 * index + 1, mask=index < n_chunks, other=0.0))
            magnitudes = tl.where(bits > magnitudes, bits, magnitudes)
            first += LANES
        total = tl.sum(partial, axis=0)
        size = tl.max(magnitudes, axis=0).to(tl.float64, bitcast=True)
        if not FIRST:
            total = tl.load(norm_ptr + SUM) + total
            size = maximum(tl.load(norm_ptr + LARGEST), size)
            tl.debug_barrier()  # all threads load these numbers, one stores new ones
        tl.store(norm_ptr + SUM, total)
        tl.store(norm_ptr + LARGEST, size)
        if LAST:
            norm = tl.sqrt(total)
            if BY_MAX_ABS:
                norm = size / scale
            coefficient = minimum(1.0, tl.load(limits_ptr) / (norm + tl.load(limits_ptr + 1)))
            if NAN_IF_NONFINITE:
                coefficient = coefficient + (norm - norm)
            skipped = norm < 0.0
            if found_before_ptr is not None:
                skipped = skipped | (tl.load(found_before_ptr) != 0)
            if FIND_NONFINITE:
                skipped = skipped | (size - size != 0.0)
            if SKIP_NONFINITE:
                skipped = skipped | (norm - norm != 0.0)
            tl.store(norm_ptr + NORM, norm)
            tl.store(norm_ptr + COEFFICIENT, coefficient)
            tl.store(found_inf_ptr, skipped.to(tl.float32))


def constants(dtype: int, first: bool, last: bool, limits: tuple, block: int) -> dict[str, Any]:
    """The compile-time arguments of `norm_kernel`.

    ``dtype``: of the gradients, as numeric.py counts them.
    ``first``: the sums replace those in the norm's memory, instead of being added to them.
    ``last``: what follows from the sums is filled in.
    ``limits``: csrc/norm.h's NormLimits, of which the numbers are given in device memory.
    ``block``: elements that a program sums at a time.
    """
    _, _, by_max_abs, nan_if_nonfinite, find_nonfinite, skip_nonfinite = limits
    return {
        "GRAD": dtype,
        "ARITHMETIC": tl.float64 if dtype == FP64.value else tl.float32,
        "FIRST": first,
        "LAST": last,
        "BY_MAX_ABS": by_max_abs,
        "NAN_IF_NONFINITE": nan_if_nonfinite,
        "FIND_NONFINITE": find_nonfinite,
        "SKIP_NONFINITE": skip_nonfinite,
        "BLOCK": block,
        "CHUNK_ROW": CHUNK_ROW,
    }


def prepare(*args: Any) -> Prepared:
    """The kernel with the arguments that `constants` takes. A launch sums over gradients of one dtype, and is given:

    chunks: int64, (programs, CHUNK_ROW): which elements each program sums.
    grads: int64: addresses of the gradients, 0 for those that do not count.
    sums: float64, (programs, 2): memory for each program's sums.
    norm: float64, csrc/norm.h's Norm.
    done: int32, one zero; it is zero again afterwards.
    numbers: float64: the first two of the limits.
    found_inf: one fp32 number: whether the step is skipped.
    grad_scale, found_before: one fp32 number each, or None.
    """
    return Prepared(norm_kernel, constants(*args))
