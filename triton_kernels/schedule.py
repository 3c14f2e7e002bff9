"""Learning-rate schedules: csrc/schedule.h in Triton. A program counts a step of one parameter group."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .launching import Prepared
from .numeric import divide, power, square_root


@triton.jit
def cos_pi(x):
    x = tl.abs(x)
    x = x - 2.0 * tl.floor(0.5 * x)
    x = tl.where(x > 1.0, 2.0 - x, x)
    sign = tl.where(x > 0.5, -1.0, 1.0)
    x = tl.where(x > 0.5, 1.0 - x, x)
    square = x * x
    cosine = square * -1.3878952462213771e-07 + 4.303069587032947e-06
    cosine = cosine * square + -0.0001046381049248457
    cosine = cosine * square + 0.0019295743094039231
    cosine = cosine * square + -0.02580689139001406
    cosine = cosine * square + 0.2353306303588932
    cosine = cosine * square + -1.3352627688545895
    cosine = cosine * square + 4.0587121264167685
    cosine = cosine * square + -4.934802200544679
    cosine = cosine * square + 1.0
    rest = 0.5 - x
    square = rest * rest
    sine = square * 7.952054001475513e-07 + -2.1915353447830217e-05
    sine = sine * square + 0.00046630280576761255
    sine = sine * square + -0.0073704309457143504
    sine = sine * square + 0.08214588661112823
    sine = sine * square + -0.5992645293207921
    sine = sine * square + 2.5501640398773455
    sine = sine * square + -5.16771278004997
    sine = sine * square + 3.141592653589793
    return sign * tl.where(x <= 0.25, cosine, rest * sine)


@triton.jit
def half_power(x, exponent):
    count = tl.abs(exponent).to(tl.int64)
    result = power(x, count // 2)
    if count % 2 == 1:
        result = result * square_root(x)
    if exponent < 0.0:
        result = divide(result * 0.0 + 1.0, result)
    return result


@triton.jit(do_not_specialize=("values_ptr", "table_ptr", "found_inf_ptr", "n"))
def schedule_kernel(values_ptr, table_ptr, found_inf_ptr, n):
    if found_inf_ptr is not None:  # the step was skipped: it does not count
        if tl.load(found_inf_ptr) != 0:
            return
    i = tl.program_id(0)
    t = tl.load(values_ptr + i) + 1.0
    begin = tl.load(table_ptr + i).to(tl.int64)
    n_pieces = tl.load(table_ptr + begin).to(tl.int64)
    piece_ptr = table_ptr + begin + 1
    row = 0 * n_pieces
    k = 0 * n_pieces
    while k < n_pieces:
        row = tl.where(tl.load(piece_ptr + k * 7) <= t, k, row)
        k += 1
    piece_ptr += row * 7
    kind = tl.load(piece_ptr + 1)
    high = tl.load(piece_ptr + 2)
    low = tl.load(piece_ptr + 3)
    length = tl.load(piece_ptr + 5)
    exponent = tl.load(piece_ptr + 6)
    since = t - tl.load(piece_ptr) + tl.load(piece_ptr + 4)
    lr = low
    if kind == 3.0:
        lr = high * power(exponent, since.to(tl.int64))
        lr = tl.where(lr > low, lr, low)
    else:
        x = divide(since, length)
        if kind == 0.0:
            lr = low + (high - low) * half_power(x, exponent)
        else:
            turns = exponent * x
            if kind == 2.0:
                turns = turns - tl.floor(turns)
            lr = low + (high - low) * (0.5 * (1.0 + cos_pi(turns)))
    tl.debug_barrier()  # all threads have loaded the count
    tl.store(values_ptr + i, t)
    tl.store(values_ptr + n + i, lr)


@functools.cache
def prepare() -> Prepared:
    """The kernel. A launch counts a step of ``n`` groups, with a program for each, and is given:

    values: float64: n counts, then n learning rates.
    table: float64: the schedules' pieces, as csrc/schedule.h reads them.
    found_inf: one fp32 number, or None.
    n: int.
    """
    return Prepared(schedule_kernel, {}, num_warps=1)
