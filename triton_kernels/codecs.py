"""How weights and states are stored in fewer bits: csrc/codecs.h in Triton, with the same formats to the same bits."""

import triton
import triton.language as tl

from .numeric import BF16, I8, U8, divide, narrow, widen

SCALE_BLOCK = tl.constexpr(256)  # numbers that share a scale
I4, U4 = tl.constexpr(7), tl.constexpr(8)  # codes from I4 on share a byte; csrc/numeric.h's Dtype


@triton.jit
def pack(codes, N: tl.constexpr):
    """The bytes of N codes, of which the first one of a pair is in the lower half."""
    first, second = tl.split(tl.reshape(codes, (N // 2, 2)))
    return ((first & 15) | ((second & 15) << 4)).to(tl.uint8)


@triton.jit
def unpack(pairs, DTYPE: tl.constexpr, N: tl.constexpr):
    bits = pairs.to(tl.int32)
    codes = tl.reshape(tl.join(bits & 15, bits >> 4), (N,))
    return (codes ^ 8) - 8 if DTYPE == I4 else codes


@triton.jit
def philox(seed, index, step, group):
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    none = low * 0
    return tl.philox(seed, low, high, none + index.to(tl.uint32), none + step.to(tl.uint32), 10)


@triton.jit
def random_16_of(seed, index, step, element):
    """16 random bits for each of some elements, wherever they are."""
    w0, w1, w2, w3 = philox(seed, index, step, element // 8)
    within = element % 8
    words = tl.where(within < 4, tl.where(within < 2, w0, w1), tl.where(within < 6, w2, w3))
    return tl.where(within % 2 == 0, words & 0xFFFF, words >> 16)


@triton.jit
def random_16(seed, index, step, group, N: tl.constexpr):
    """16 random bits for each element of some groups of eight, N elements."""
    w0, w1, w2, w3 = philox(seed, index, step, group)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (N // 8, 4))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (N,))


@triton.jit
def narrow_stochastic(x, random, DTYPE: tl.constexpr):
    """As they are stored, rounded up with the probability of what rounding down would cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    sign = (bits >> 16) & 0x8000
    if DTYPE == BF16:
        narrowed = tl.where(magnitude > 0x7F800000, 0x7FC0, (magnitude + random) >> 16)
        return (narrowed | sign).to(tl.uint16)
    else:
        normal = (magnitude + (random & 0x1FFF) - 0x38000000) >> 13
        # Below 2^-14 numbers are multiples of 2^-24; the sum is in units of 2^-40.
        small = tl.where(magnitude < 0x38800000, tl.abs(x), 0.0)
        tiny = ((small * 1099511627776.0).to(tl.int32).to(tl.uint32) + random) >> 16
        finite = tl.where(magnitude < 0x38800000, tiny, tl.where(magnitude < 0x47800000, normal, 0x7C00))
        narrowed = tl.where(magnitude > 0x7F800000, 0x7E00, finite)
        return (narrowed | sign).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def split(x):
    """fp32 as bf16, to nearest with ties away from zero, and the lower 16 bits, both as uint16."""
    given = x.to(tl.uint32, bitcast=True)
    bits = tl.where((given & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, given).to(tl.uint32)
    return ((bits + 0x8000) >> 16).to(tl.uint16), (bits & 0xFFFF).to(tl.uint16)


@triton.jit
def join(upper, lower):
    """The fp32 numbers that `split` took apart; zeros that somebody has written beside a negative rest as zeros."""
    high, low = upper.to(tl.uint32) << 16, lower.to(tl.uint32)
    borrow = (low >> 15) << 16
    bits = tl.where((high & 0x7FFFFFFF) < borrow, high, high + low - borrow)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def compensate(x, DTYPE: tl.constexpr):
    """As they are stored, and what that lost, stored in the same way."""
    narrowed = narrow(x, DTYPE)
    wide = widen(narrowed, DTYPE, tl.float32)
    finite = (wide.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000
    return narrowed, narrow(tl.where(finite, x - wide, 0.0), DTYPE)


@triton.jit
def quantize(x, exists, DTYPE: tl.constexpr, N: tl.constexpr):
    """The codes of N numbers, I8 or I4 with a sign, U8 or U4 without, and the scales of their blocks.

    Codes of 8 bits are in that, those of 4 bits the lowest bits of an int32. What does not exist has the code zero.
    """
    counts = tl.reshape(exists, (N // SCALE_BLOCK, SCALE_BLOCK))
    bits = tl.where(counts, tl.reshape(x.to(tl.uint32, bitcast=True), (N // SCALE_BLOCK, SCALE_BLOCK)), 0).to(tl.uint32)
    magnitude = bits & 0x7FFFFFFF
    max_abs = tl.max(magnitude.to(tl.int32), 1)
    coded = (max_abs >= 0x00800000) & (max_abs < 0x7F800000)
    scale = tl.where(coded, max_abs, tl.where(max_abs < 0x7F800000, 0, 0x7FC00000)).to(tl.float32, bitcast=True)
    divisor = tl.where(coded, scale, 1.0)
    inverse = tl.where(coded, divide(divisor * 0.0 + 1.0, divisor), 0.0)
    kept = tl.where(coded[:, None], magnitude, 0).to(tl.uint32).to(tl.float32, bitcast=True)
    relative = (kept * inverse[:, None]).to(tl.uint32, bitcast=True)
    if DTYPE == I8 or DTYPE == I4:
        root = ((relative >> 1) + 0x1FC00000) | (bits & 0x80000000)
        steps = 127.0 if DTYPE == I8 else 7.0
        number = (root.to(tl.float32, bitcast=True) * steps + 12582912.0).to(tl.uint32, bitcast=True)
    else:
        root = (relative >> 2) + (0x33A00000 if DTYPE == U8 else 0x31A00000)  # 256 or 16 times the root
        number = (root.to(tl.float32, bitcast=True) + 8388608.0).to(tl.uint32, bitcast=True)
        number = tl.maximum(number, 0x4B000001) - 0x4B000001
    if DTYPE == I8:
        codes = (number & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True)
    elif DTYPE == U8:
        codes = number.to(tl.uint8)
    else:
        codes = number.to(tl.int32, bitcast=True)
    return tl.reshape(codes, (N,)), scale


@triton.jit
def dequantize(codes, scale, DTYPE: tl.constexpr):
    """The numbers of codes, each with its scale."""
    if DTYPE == I8 or DTYPE == I4:
        number = codes.to(tl.float32)
        step = 0.007874015718698502 if DTYPE == I8 else 0.1428571492433548  # 1 / 127 and 1 / 7 in fp32
        root = (number * step).to(tl.uint32, bitcast=True)
        relative = ((root - 0x1FC00000) << 1) | (root & 0x80000000)
        return tl.where(codes == 0, 0, relative).to(tl.uint32).to(tl.float32, bitcast=True) * scale
    else:
        number = (codes.to(tl.int32) + 1).to(tl.float32).to(tl.uint32, bitcast=True)
        bias = 0x33A00000 if DTYPE == U8 else 0x31A00000
        return ((number - bias) << 2).to(tl.float32, bitcast=True) * scale
