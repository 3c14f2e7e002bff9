"""Weights and states in memory, in every form and format: what a block of elements is loaded from and stored to."""

import triton
import triton.language as tl

from .codecs import compensate, decode, encode, join, narrow_stochastic, random_16, split
from .numeric import BF16, BITS, FP16, FP32, FP64, I8, U8, narrow, widen

COMPANION = tl.constexpr(7)  # its place in a tensor's row of the table; the scales of its states, seed and index follow
SCALES = tl.constexpr(8)
SEED = tl.constexpr(13)
INDEX = tl.constexpr(14)
AVERAGE, COPY = tl.constexpr(15), tl.constexpr(16)


@triton.jit
def pointer(address, DTYPE: tl.constexpr):
    if DTYPE == BF16 or DTYPE == BITS:
        return address.to(tl.pointer_type(tl.uint16))  # bf16 as bits: the interpreter would truncate when it rounds
    elif DTYPE == FP16:
        return address.to(tl.pointer_type(tl.float16))
    elif DTYPE == FP64:
        return address.to(tl.pointer_type(tl.float64))
    elif DTYPE == I8:
        return address.to(tl.pointer_type(tl.int8))
    elif DTYPE == U8:
        return address.to(tl.pointer_type(tl.uint8))
    else:
        return address.to(tl.pointer_type(tl.float32))


@triton.jit
def load_stored(address, begin, lanes, mask, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    ptr = pointer(address, DTYPE) + begin
    if WHOLE:
        return tl.load(tl.multiple_of(ptr, 16) + lanes)
    else:
        return tl.load(ptr + lanes, mask=mask)


@triton.jit
def store_stored(address, begin, lanes, mask, stored, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    ptr = pointer(address, DTYPE) + begin
    if WHOLE:
        tl.store(tl.multiple_of(ptr, 16) + lanes, stored)
    else:
        tl.store(ptr + lanes, stored, mask=mask)


@triton.jit
def load(address, begin, lanes, mask, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr):
    return widen(load_stored(address, begin, lanes, mask, DTYPE, WHOLE), DTYPE, ARITHMETIC)


@triton.jit
def store(address, begin, lanes, mask, x, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    store_stored(address, begin, lanes, mask, narrow(x, DTYPE), DTYPE, WHOLE)


@triton.jit
def load_weight(
    row_ptr, begin, lanes, mask, PARAM: tl.constexpr, FORM: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr
):
    param = tl.load(row_ptr)
    if FORM == "master":
        return load(tl.load(row_ptr + COMPANION), begin, lanes, mask, FP32, ARITHMETIC, WHOLE)
    elif FORM == "split":
        upper = load_stored(param, begin, lanes, mask, BITS, WHOLE)
        return join(upper, load_stored(tl.load(row_ptr + COMPANION), begin, lanes, mask, BITS, WHOLE))
    elif FORM == "kahan":
        rest = load(tl.load(row_ptr + COMPANION), begin, lanes, mask, PARAM, ARITHMETIC, WHOLE)
        return load(param, begin, lanes, mask, PARAM, ARITHMETIC, WHOLE) + rest
    else:
        return load(param, begin, lanes, mask, PARAM, ARITHMETIC, WHOLE)


@triton.jit
def store_weight(
    row_ptr, begin, lanes, mask, x, step,
    PARAM: tl.constexpr, FORM: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Returns what followers follow: the fp32 weight where one is kept, else the stored one."""
    param = tl.load(row_ptr)
    if FORM == "master":
        store(tl.load(row_ptr + COMPANION), begin, lanes, mask, x, FP32, WHOLE)
        store(param, begin, lanes, mask, x, PARAM, WHOLE)
        return x
    elif FORM == "split":
        upper, lower = split(x)
        store_stored(param, begin, lanes, mask, upper, BITS, WHOLE)
        store_stored(tl.load(row_ptr + COMPANION), begin, lanes, mask, lower, BITS, WHOLE)
        return x
    elif FORM == "kahan":
        narrowed, rest = compensate(x, PARAM)
        store_stored(param, begin, lanes, mask, narrowed, PARAM, WHOLE)
        store_stored(tl.load(row_ptr + COMPANION), begin, lanes, mask, rest, PARAM, WHOLE)
        return widen(narrowed, PARAM, ARITHMETIC)
    elif FORM == "stochastic":
        random = random_16(tl.load(row_ptr + SEED), tl.load(row_ptr + INDEX), step, begin, lanes, N)
        narrowed = narrow_stochastic(x, random, PARAM)
        store_stored(param, begin, lanes, mask, narrowed, PARAM, WHOLE)
        return widen(narrowed, PARAM, ARITHMETIC)
    else:
        narrowed = narrow(x, PARAM)
        store_stored(param, begin, lanes, mask, narrowed, PARAM, WHOLE)
        return widen(narrowed, PARAM, ARITHMETIC)


@triton.jit
def load_state(
    row_ptr, k: tl.constexpr, begin, lanes, mask, STATE: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr
):
    address = tl.load(row_ptr + 2 + k)
    if STATE == I8 or STATE == U8:
        codes = load_stored(address, begin, lanes, mask, STATE, WHOLE)
        blocks = (begin + lanes) // 256
        scales = tl.load(pointer(tl.load(row_ptr + SCALES + k), FP32) + blocks, mask=mask)
        return decode(codes, scales, STATE)
    else:
        return load(address, begin, lanes, mask, STATE, ARITHMETIC, WHOLE)


@triton.jit
def store_state(
    row_ptr, k: tl.constexpr, begin, lanes, mask, x, STATE: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr
):
    address = tl.load(row_ptr + 2 + k)
    if STATE == I8 or STATE == U8:
        exists = lanes >= 0 if WHOLE else mask
        codes, scales = encode(x, exists, STATE, N)
        store_stored(address, begin, lanes, mask, codes, STATE, WHOLE)
        blocks = tl.arange(0, N // 256)
        there = tl.max(tl.reshape(exists, (N // 256, 256)).to(tl.int32), 1) != 0
        tl.store(pointer(tl.load(row_ptr + SCALES + k), FP32) + begin // 256 + blocks, scales, mask=there)
    else:
        store(address, begin, lanes, mask, x, STATE, WHOLE)
