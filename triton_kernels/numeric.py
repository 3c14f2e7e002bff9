"""Number formats and correctly rounded arithmetic: csrc/numeric.h, and what rules take of numerics.py, in Triton."""

import triton
import triton.language as tl

# How numbers are stored: csrc/numeric.h's Dtype. Numbers, because Triton before 3.8 takes no strings in a tuple.
# From I8 on they are codes; codecs.py has those of states that share a byte.
FP32, BF16, FP16, FP64, I8, U8, BITS = (tl.constexpr(k) for k in range(7))
NONE = tl.constexpr(-1)  # there is nothing


@triton.jit
def real(n):
    return n.to(tl.float64)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)  # IEEE in float64
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(a, b):
    if b.dtype == tl.float64:
        return a / b  # IEEE in float64
    else:
        return tl.div_rn(a, b)


@triton.jit
def load_number(ptr, ARITHMETIC: tl.constexpr):
    """A number in device memory. Callers see to an absent one: Triton 3.6 compiles no function that returns None."""
    return tl.load(ptr).to(ARITHMETIC)


@triton.jit
def load_several(ptr, N: tl.constexpr):
    """``N`` numbers side by side."""
    numbers = ()
    for k in tl.static_range(N):
        numbers = numbers + (tl.load(ptr + k),)
    return numbers


@triton.jit
def changed(g, scale, coefficient):
    """Gradients unscaled and clipped, each where there is a number for it."""
    if scale is not None:
        g = divide(g, scale)
    if coefficient is not None:
        g = g * coefficient
    return g


@triton.jit
def maximum(a, b):  # NaN wins, as in torch.maximum
    return tl.where(b > a, b, tl.where(b != b, b, a))


@triton.jit
def minimum(a, b):
    return tl.where(b < a, b, tl.where(b != b, b, a))


@triton.jit
def power(base, exponent):
    """base^exponent by squaring: only IEEE multiplications, hence the same bits wherever it runs."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def real_power(base, exponent):
    return tl.exp(tl.log(base) * exponent)


@triton.jit
def reciprocal(x):
    return 1.0 / x  # in float64


@triton.jit
def interpolate(a, b, weight):
    """From ``a`` to ``b`` as torch.lerp goes: exactly there for a weight of 1."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1.0 - weight))


@triton.jit
def widen(stored, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Stored numbers in the arithmetic dtype. bf16 is stored as its bits, which need only be shifted."""
    if DTYPE == BF16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(ARITHMETIC)
    else:
        return stored.to(ARITHMETIC)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Numbers as they are stored, rounded to nearest even: bf16 by integer operations, as every backend does it."""
    if DTYPE == BF16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
    elif DTYPE == FP16:
        return x.to(tl.float32).to(tl.float16)
    elif DTYPE == FP64:
        return x.to(tl.float64)
    else:
        return x.to(tl.float32)


EXACT_COUNTER, LAST_COUNTER = tl.constexpr(0x4B800000), tl.constexpr(0x7F7FFFFF)  # the bits of 2^24, and of the largest


@triton.jit
def count_of(counter):
    """The number of steps for which an fp32 counter stands; csrc/table.h explains it."""
    bits = counter.to(tl.int32, bitcast=True)
    return tl.where(bits > EXACT_COUNTER, (bits - EXACT_COUNTER).to(tl.int64) + 16777216, counter.to(tl.int64))


@triton.jit
def next_counter(counter):
    bits = counter.to(tl.int32, bitcast=True)
    moved = (bits + 1).to(tl.float32, bitcast=True)
    return tl.where((bits >= EXACT_COUNTER) & (bits < LAST_COUNTER), moved, counter + 1.0)
