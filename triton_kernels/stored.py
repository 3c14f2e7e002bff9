"""Weights and states in memory, in every form and format: what a block of elements is loaded from and stored to."""

from typing import NamedTuple

import triton
import triton.language as tl

from .codecs import (
    I4,
    SCALE_BLOCK,
    compensate,
    decode,
    encode,
    join,
    narrow_stochastic,
    pack,
    random_16,
    random_16_of,
    split,
    unpack,
)
from .numeric import BF16, BITS, FP16, FP32, FP64, I8, NONE, U8, load_several, narrow, widen
from .records import AVERAGE, COMPANION, COPY, INDEX, PARAM, PLACE, SCALES, SEED, STATES


class Row(NamedTuple):
    """What a step needs of a tensor's record: addresses, and two numbers."""

    param: tl.tensor
    states: tl.tuple
    companion: tl.tensor
    scales: tl.tuple
    seed: tl.tensor
    index: tl.tensor
    place: tl.tuple
    average: tl.tensor
    copy: tl.tensor


@triton.jit
def open_row(row_ptr, N_STATES: tl.constexpr):
    """Read once, as what a program stores might be a table, for all that the compiler knows."""
    return Row(
        tl.load(row_ptr + PARAM),
        load_several(row_ptr + STATES, N_STATES),
        tl.load(row_ptr + COMPANION),
        load_several(row_ptr + SCALES, N_STATES),
        tl.load(row_ptr + SEED),
        tl.load(row_ptr + INDEX) & 0xFFFFFFFF,
        load_several(row_ptr + PLACE, 5),
        tl.load(row_ptr + AVERAGE),
        tl.load(row_ptr + COPY),
    )


@triton.jit
def element_of(place, i):
    """Which element of the whole tensor element ``i`` of a part is; csrc/table.h's Place."""
    first, run, runs, stride, outer = place
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
    row, begin, lanes, mask, PARAM: tl.constexpr, FORM: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr
):
    if FORM == "master":
        return load(row.companion, begin, lanes, mask, FP32, ARITHMETIC, WHOLE)
    elif FORM == "split":
        upper = load_stored(row.param, begin, lanes, mask, BITS, WHOLE)
        return join(upper, load_stored(row.companion, begin, lanes, mask, BITS, WHOLE))
    elif FORM == "kahan":
        rest = load(row.companion, begin, lanes, mask, PARAM, ARITHMETIC, WHOLE)
        return load(row.param, begin, lanes, mask, PARAM, ARITHMETIC, WHOLE) + rest
    else:
        return load(row.param, begin, lanes, mask, PARAM, ARITHMETIC, WHOLE)


@triton.jit
def store_weight(
    row, begin, lanes, mask, x, step,
    PARAM: tl.constexpr, FORM: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Returns what followers follow: the fp32 weight where one is kept, else the stored one."""
    if FORM == "master":
        store(row.companion, begin, lanes, mask, x, FP32, WHOLE)
        store(row.param, begin, lanes, mask, x, PARAM, WHOLE)
        return x
    elif FORM == "split":
        upper, lower = split(x)
        store_stored(row.param, begin, lanes, mask, upper, BITS, WHOLE)
        store_stored(row.companion, begin, lanes, mask, lower, BITS, WHOLE)
        return x
    elif FORM == "kahan":
        narrowed, rest = compensate(x, PARAM)
        store_stored(row.param, begin, lanes, mask, narrowed, PARAM, WHOLE)
        store_stored(row.companion, begin, lanes, mask, rest, PARAM, WHOLE)
        return widen(narrowed, PARAM, ARITHMETIC)
    elif FORM == "stochastic" or FORM == "scattered":
        if FORM == "stochastic":
            group = element_of(row.place, begin + 8 * tl.arange(0, N // 8)) // 8
            random = random_16(row.seed, row.index, step, group, N)
        else:
            random = random_16_of(row.seed, row.index, step, element_of(row.place, begin + lanes))
        narrowed = narrow_stochastic(x, random, PARAM)
        store_stored(row.param, begin, lanes, mask, narrowed, PARAM, WHOLE)
        return widen(narrowed, PARAM, ARITHMETIC)
    else:
        narrowed = narrow(x, PARAM)
        store_stored(row.param, begin, lanes, mask, narrowed, PARAM, WHOLE)
        return widen(narrowed, PARAM, ARITHMETIC)


@triton.jit
def load_codes(address, begin, lanes, mask, STATE: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr):
    if STATE >= I4:
        pairs = tl.arange(0, N // 2)
        return unpack(load_stored(address, begin // 2, pairs, pairs_there(mask, WHOLE, N), U8, WHOLE), STATE, N)
    else:
        return load_stored(address, begin, lanes, mask, STATE, WHOLE)


@triton.jit
def store_codes(address, begin, lanes, mask, codes, STATE: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr):
    if STATE >= I4:
        pairs = tl.arange(0, N // 2)
        store_stored(address, begin // 2, pairs, pairs_there(mask, WHOLE, N), pack(codes, N), U8, WHOLE)
    else:
        store_stored(address, begin, lanes, mask, codes, STATE, WHOLE)


@triton.jit
def pairs_there(mask, WHOLE: tl.constexpr, N: tl.constexpr):
    """Which pairs of elements have a first one that exists."""
    if WHOLE:
        return None
    else:
        return tl.max(tl.reshape(mask, (N // 2, 2)).to(tl.int32), 1) != 0


@triton.jit
def load_state(
    address, scales, begin, lanes, mask, STATE: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    if STATE >= I8:
        codes = load_codes(address, begin, lanes, mask, STATE, WHOLE, N)
        blocks = tl.arange(0, N // SCALE_BLOCK)
        there = blocks_there(mask, WHOLE, N)
        of_blocks = tl.load(pointer(scales, FP32) + begin // SCALE_BLOCK + blocks, mask=there)
        each = tl.reshape(tl.broadcast_to(of_blocks[:, None], (N // SCALE_BLOCK, SCALE_BLOCK)), (N,))
        return decode(codes, each, STATE)
    else:
        return load(address, begin, lanes, mask, STATE, ARITHMETIC, WHOLE)


@triton.jit
def store_state(address, scales, begin, lanes, mask, x, STATE: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr):
    if STATE >= I8:
        codes, of_blocks = encode(x, lanes >= 0 if WHOLE else mask, STATE, N)
        store_codes(address, begin, lanes, mask, codes, STATE, WHOLE, N)
        blocks = tl.arange(0, N // SCALE_BLOCK)
        tl.store(pointer(scales, FP32) + begin // SCALE_BLOCK + blocks, of_blocks, mask=blocks_there(mask, WHOLE, N))
    else:
        store(address, begin, lanes, mask, x, STATE, WHOLE)


@triton.jit
def load_states(
    row, stand_in, begin, lanes, mask, STATES: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """All states that a rule names, with a stand-in for each that is absent."""
    states = ()
    for k in tl.static_range(len(STATES)):
        state = stand_in
        if STATES[k] != NONE:
            state = load_state(
                row.states[k], row.scales[k], begin, lanes, mask, tl.constexpr(STATES[k]), ARITHMETIC, WHOLE, N
            )
        states = states + (state,)
    return states


@triton.jit
def store_states(row, begin, lanes, mask, states, STATES: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr):
    for k in tl.static_range(len(STATES)):
        if STATES[k] != NONE:
            store_state(row.states[k], row.scales[k], begin, lanes, mask, states[k], tl.constexpr(STATES[k]), WHOLE, N)


@triton.jit
def blocks_there(mask, WHOLE: tl.constexpr, N: tl.constexpr):
    """Which blocks that share a scale have elements that exist."""
    if WHOLE:
        return tl.arange(0, N // SCALE_BLOCK) >= 0
    else:
        return tl.max(tl.reshape(mask, (N // SCALE_BLOCK, SCALE_BLOCK)).to(tl.int32), 1) != 0
