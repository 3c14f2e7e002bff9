"""Weights and states in memory, in every format: what a block of elements is loaded from and stored to."""

from typing import NamedTuple

import triton
import triton.language as tl

from .codecs import (
    I4,
    SCALE_BLOCK,
    compensate,
    dequantize,
    join,
    narrow_stochastic,
    pack,
    quantize,
    random_16,
    random_16_of,
    split,
    unpack,
)
from .numeric import BF16, BITS, FP16, FP32, FP64, I8, NONE, U8, load_several, narrow, widen
from .records import AUX, AVERAGE, COPY, ELEMENT_MAP, INDEX, PARAM, SCALES, SEED, STATES


class Row(NamedTuple):
    """What a step needs of a tensor's record: addresses, and two numbers."""

    param: tl.tensor
    states: tl.tuple
    aux: tl.tensor
    scales: tl.tuple
    seed: tl.tensor
    index: tl.tensor
    element_map: tl.tuple
    average: tl.tensor
    copy: tl.tensor


@triton.jit
def open_row(row_ptr, N_STATES: tl.constexpr):
    """Read once, as what a program stores might be a table, for all that the compiler knows."""
    return Row(
        tl.load(row_ptr + PARAM),
        load_several(row_ptr + STATES, N_STATES),
        tl.load(row_ptr + AUX),
        load_several(row_ptr + SCALES, N_STATES),
        tl.load(row_ptr + SEED),
        tl.load(row_ptr + INDEX) & 0xFFFFFFFF,
        load_several(row_ptr + ELEMENT_MAP, 5),
        tl.load(row_ptr + AVERAGE),
        tl.load(row_ptr + COPY),
    )


@triton.jit
def element_of(element_map, i):
    """Which element of the whole tensor element ``i`` of a part is; csrc/table.h's ElementMap."""
    first, run, runs, stride, outer = element_map
    element = first + i
    if run > 0:
        begun = i // run
        element = first + i % run + begun % runs * stride + begun // runs * outer
    return element


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
def load_stored(address, begin, lanes, mask, DTYPE: tl.constexpr, UNMASKED: tl.constexpr):
    ptr = pointer(address, DTYPE) + begin
    if UNMASKED:
        return tl.load(tl.multiple_of(ptr, 16) + lanes)
    else:
        return tl.load(ptr + lanes, mask=mask)


@triton.jit
def store_stored(address, begin, lanes, mask, stored, DTYPE: tl.constexpr, UNMASKED: tl.constexpr):
    ptr = pointer(address, DTYPE) + begin
    if UNMASKED:
        tl.store(tl.multiple_of(ptr, 16) + lanes, stored)
    else:
        tl.store(ptr + lanes, stored, mask=mask)


@triton.jit
def load(address, begin, lanes, mask, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr, UNMASKED: tl.constexpr):
    return widen(load_stored(address, begin, lanes, mask, DTYPE, UNMASKED), DTYPE, ARITHMETIC)


@triton.jit
def store(address, begin, lanes, mask, x, DTYPE: tl.constexpr, UNMASKED: tl.constexpr):
    store_stored(address, begin, lanes, mask, narrow(x, DTYPE), DTYPE, UNMASKED)


@triton.jit
def load_weight(
    row, begin, lanes, mask, PARAM: tl.constexpr, FORMAT: tl.constexpr, ARITHMETIC: tl.constexpr, UNMASKED: tl.constexpr
):
    if FORMAT == "master":
        return load(row.aux, begin, lanes, mask, FP32, ARITHMETIC, UNMASKED)
    elif FORMAT == "split":
        upper = load_stored(row.param, begin, lanes, mask, BITS, UNMASKED)
        return join(upper, load_stored(row.aux, begin, lanes, mask, BITS, UNMASKED))
    elif FORMAT == "kahan":
        rest = load(row.aux, begin, lanes, mask, PARAM, ARITHMETIC, UNMASKED)
        return load(row.param, begin, lanes, mask, PARAM, ARITHMETIC, UNMASKED) + rest
    else:
        return load(row.param, begin, lanes, mask, PARAM, ARITHMETIC, UNMASKED)


@triton.jit
def store_weight(
    row, begin, lanes, mask, x, step,
    PARAM: tl.constexpr, FORMAT: tl.constexpr, ARITHMETIC: tl.constexpr, UNMASKED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Returns what followers follow: the fp32 weight where one is kept, else the stored one."""
    if FORMAT == "master":
        store(row.aux, begin, lanes, mask, x, FP32, UNMASKED)
        store(row.param, begin, lanes, mask, x, PARAM, UNMASKED)
        return x
    elif FORMAT == "split":
        upper, lower = split(x)
        store_stored(row.param, begin, lanes, mask, upper, BITS, UNMASKED)
        store_stored(row.aux, begin, lanes, mask, lower, BITS, UNMASKED)
        return x
    elif FORMAT == "kahan":
        narrowed, rest = compensate(x, PARAM)
        store_stored(row.param, begin, lanes, mask, narrowed, PARAM, UNMASKED)
        store_stored(row.aux, begin, lanes, mask, rest, PARAM, UNMASKED)
        return widen(narrowed, PARAM, ARITHMETIC)
    elif FORMAT == "stochastic" or FORMAT == "scattered":
        if FORMAT == "stochastic":
            group = element_of(row.element_map, begin + 8 * tl.arange(0, N // 8)) // 8
            random = random_16(row.seed, row.index, step, group, N)
        else:
            random = random_16_of(row.seed, row.index, step, element_of(row.element_map, begin + lanes))
        narrowed = narrow_stochastic(x, random, PARAM)
        store_stored(row.param, begin, lanes, mask, narrowed, PARAM, UNMASKED)
        return widen(narrowed, PARAM, ARITHMETIC)
    else:
        narrowed = narrow(x, PARAM)
        store_stored(row.param, begin, lanes, mask, narrowed, PARAM, UNMASKED)
        return widen(narrowed, PARAM, ARITHMETIC)


@triton.jit
def load_codes(address, begin, lanes, mask, STATE: tl.constexpr, UNMASKED: tl.constexpr, N: tl.constexpr):
    if STATE >= I4:
        pairs = tl.arange(0, N // 2)
        return unpack(load_stored(address, begin // 2, pairs, pairs_there(mask, UNMASKED, N), U8, UNMASKED), STATE, N)
    else:
        return load_stored(address, begin, lanes, mask, STATE, UNMASKED)


@triton.jit
def store_codes(address, begin, lanes, mask, codes, STATE: tl.constexpr, UNMASKED: tl.constexpr, N: tl.constexpr):
    if STATE >= I4:
        pairs = tl.arange(0, N // 2)
        store_stored(address, begin // 2, pairs, pairs_there(mask, UNMASKED, N), pack(codes, N), U8, UNMASKED)
    else:
        store_stored(address, begin, lanes, mask, codes, STATE, UNMASKED)


@triton.jit
def pairs_there(mask, UNMASKED: tl.constexpr, N: tl.constexpr):
    """Which pairs of elements have a first one that exists."""
    if UNMASKED:
        return None
    else:
        return tl.max(tl.reshape(mask, (N // 2, 2)).to(tl.int32), 1) != 0


@triton.jit
def load_state(
    address, scales, begin, lanes, mask, STATE: tl.constexpr, ARITHMETIC: tl.constexpr, UNMASKED: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    if STATE >= I8:
        codes = load_codes(address, begin, lanes, mask, STATE, UNMASKED, N)
        blocks = tl.arange(0, N // SCALE_BLOCK)
        there = blocks_there(mask, UNMASKED, N)
        of_blocks = tl.load(pointer(scales, FP32) + begin // SCALE_BLOCK + blocks, mask=there)
        each = tl.reshape(tl.broadcast_to(of_blocks[:, None], (N // SCALE_BLOCK, SCALE_BLOCK)), (N,))
        return dequantize(codes, each, STATE)
    else:
        return load(address, begin, lanes, mask, STATE, ARITHMETIC, UNMASKED)


@triton.jit
def store_state(address, scales, begin, lanes, mask, x, STATE: tl.constexpr, UNMASKED: tl.constexpr, N: tl.constexpr):
    if STATE >= I8:
        codes, of_blocks = quantize(x, lanes >= 0 if UNMASKED else mask, STATE, N)
        store_codes(address, begin, lanes, mask, codes, STATE, UNMASKED, N)
        blocks = tl.arange(0, N // SCALE_BLOCK)
        tl.store(pointer(scales, FP32) + begin // SCALE_BLOCK + blocks, of_blocks, mask=blocks_there(mask, UNMASKED, N))
    else:
        store(address, begin, lanes, mask, x, STATE, UNMASKED)


@triton.jit
def load_states(
    row, stand_in, begin, lanes, mask, STATES: tl.constexpr, ARITHMETIC: tl.constexpr, UNMASKED: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """All states that a rule names, with a stand-in for each that is absent."""
    states = ()
    for k in tl.static_range(len(STATES)):
        state = stand_in
        if STATES[k] != NONE:
            state = load_state(
                row.states[k], row.scales[k], begin, lanes, mask, tl.constexpr(STATES[k]), ARITHMETIC, UNMASKED, N
            )
        states = states + (state,)
    return states


@triton.jit
def store_states(row, begin, lanes, mask, states, STATES: tl.constexpr, UNMASKED: tl.constexpr, N: tl.constexpr):
    for k in tl.static_range(len(STATES)):
        if STATES[k] != NONE:
            store_state(
                row.states[k], row.scales[k], begin, lanes, mask, states[k], tl.constexpr(STATES[k]), UNMASKED, N
            )


@triton.jit
def blocks_there(mask, UNMASKED: tl.constexpr, N: tl.constexpr):
    """Which blocks that share a scale have elements that exist."""
    if UNMASKED:
        return tl.arange(0, N // SCALE_BLOCK) >= 0
    else:
        return tl.max(tl.reshape(mask, (N // SCALE_BLOCK, SCALE_BLOCK)).to(tl.int32), 1) != 0
