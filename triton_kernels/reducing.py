"""The kernels for rules that reduce, generic over rules: csrc/cuda/reducing.cuh in Triton.

Launches over the same items: sums of squares by rows and columns; sum of the squares of the update, if the rule asks
for it; apply. The last program to come to the end of a matrix or tensor adds up what all have left in memory, in a
fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from . import binding
from .binding import bound
from .launching import Prepared
from .numeric import (
    FP32,
    FP64,
    NONE,
    changed,
    count_of,
    load_number,
    narrow,
    next_counter,
    square_root,
    widen,
)
from .records import AVERAGE, COPY, N_COLUMNS, NUMEL, PARAM, ROWS, STEP
from .reducing_lines import (
    COLUMN_SUMS,
    COUNTERS,
    CUT,
    ELEMENT_STATE,
    ITEM_ROW,
    LINES,
    N_ITEMS,
    N_ROW_BLOCKS,
    N_STRIPS,
    PARAM_SUMS,
    ROW_STATE,
    ROW_SUMS,
    TABLE_ROW,
    TENSOR_STATE,
    TOTALS,
    UPDATE_SUMS,
    add_up,
    doubles,
    finish_tiles,
    is_last_of,
    small_factors,
    sum_small,
    work,
)
from .reducing_tiles import (
    is_wide,
    load,
    matrix_factor,
    store,
    tile_column_factors,
    tile_factors,
    tile_lanes,
    tile_row_factors,
)
from .step import ARGUMENTS as STEP_ARGUMENTS
from .step import block_size, is_interpreted, register_limit

if TYPE_CHECKING:
    from ..rule import Rule

ARGUMENTS = tuple("items_ptr" if name == "chunks_ptr" else name for name in STEP_ARGUMENTS)


@triton.jit
def open_item(table_ptr, items_ptr, grads_ptr):
    """The program's item: its row of the table, its gradient, and its place in the tensor."""
    item_ptr = items_ptr + tl.program_id(0).to(tl.int64) * ITEM_ROW
    tensor = tl.load(item_ptr)
    row_ptr = table_ptr + tensor * TABLE_ROW
    grad = tl.load(grads_ptr + tensor)
    return (
        row_ptr,
        grad,
        tl.load(item_ptr + 1),
        tl.load(item_ptr + 2),
        tl.load(item_ptr + 3),
        tl.load(item_ptr + 4),
        tl.load(item_ptr + 5),
    )


@triton.jit
def step_number(row_ptr):
    return count_of(tl.load(tl.load(row_ptr + STEP).to(tl.pointer_type(tl.float32)))) + 1


@triton.jit
def sum_tile(
    row_ptr, grad, param, line, first_column, n_strips, strip, lanes, mask, left, of_columns, of_params, scale,
    coefficient, s, SQUARE: tl.constexpr, PARAM_SUM: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr,
    TILE_ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums of the rows of a tile, of which ``left`` exist; returns those of columns and parameters with it."""
    begin = line * tl.load(row_ptr + N_COLUMNS) + first_column
    g = load(grad, begin, lanes, mask, DTYPES[1], ARITHMETIC, WIDE)
    if PARAM_SUM:
        p = load(param, begin, lanes, mask, DTYPES[0], ARITHMETIC, WIDE)
        of_params += p * p
    square = tl.where(mask, SQUARE(changed(g, scale, coefficient), s), 0.0)
    if DTYPES[3] != NONE:
        of_columns += square
    if DTYPES[2] != NONE:
        of_rows = tl.sum(tl.sum(square, axis=0), axis=1)
        row_lanes = tl.arange(0, TILE_ROWS)
        row_sums_ptr = work(row_ptr, ROW_SUMS, ARITHMETIC) + (line + row_lanes) * n_strips + strip
        tl.store(row_sums_ptr, of_rows, mask=row_lanes < left)
    return of_columns, of_params


@triton.jit
def sum_tiles(
    row_ptr, grad, param, matrix, strip, row_block, first_row, first_column, n, scale, coefficient, s,
    SQUARE: tl.constexpr, PARAM_SUM: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr, SUB: tl.constexpr,
    TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums of ``n`` rows of a strip, by rows and columns; returns that of the parameters' squares."""
    columns = tl.load(row_ptr + N_COLUMNS)
    n_strips = tl.load(row_ptr + N_STRIPS)
    row, _column, lanes, there = tile_lanes(columns, first_column, SUB, TILE_ROWS, WIDTH, WIDE)
    of_columns = tl.zeros([SUB, TILE_ROWS, WIDTH], ARITHMETIC)
    of_params = tl.zeros([SUB, TILE_ROWS, WIDTH], ARITHMETIC)
    line = matrix * tl.load(row_ptr + ROWS) + first_row
    at = 0 * n
    if WIDE:  # whole tiles, without a mask for rows: with one for each access, loads would wait for each other
        while at < n // TILE_ROWS * TILE_ROWS:
            of_columns, of_params = sum_tile(
                row_ptr, grad, param, line + at, first_column, n_strips, strip, lanes, there, n - at, of_columns,
                of_params, scale, coefficient, s, SQUARE, PARAM_SUM, DTYPES, ARITHMETIC, TILE_ROWS, WIDE,
            )  # fmt: skip
            at += TILE_ROWS
    while at < n:
        mask = (row < n - at) & there
        of_columns, of_params = sum_tile(
            row_ptr, grad, param, line + at, first_column, n_strips, strip, lanes, mask, n - at, of_columns, of_params,
            scale, coefficient, s, SQUARE, PARAM_SUM, DTYPES, ARITHMETIC, TILE_ROWS, WIDE,
        )  # fmt: skip
        at += TILE_ROWS
    if DTYPES[3] != NONE:
        column_sums_ptr = work(row_ptr, COLUMN_SUMS, ARITHMETIC)
        column_sums_ptr += (matrix * tl.load(row_ptr + N_ROW_BLOCKS) + row_block) * columns + first_column
        flat = tl.arange(0, SUB)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(column_sums_ptr + flat, tl.sum(of_columns, axis=1), mask=flat < columns - first_column)
    return total_of(of_params)


@triton.jit
def total_of(x):
    """The sum of all numbers of a tile in float64."""
    return tl.sum(tl.sum(tl.sum(x.to(tl.float64), axis=0), axis=1), axis=0)


@triton.jit(do_not_specialize=ARGUMENTS)
def sums_kernel(
    table_ptr, items_ptr, grads_ptr, hyper_ptr, done_ptr, grad_scale_ptr, found_inf_ptr, coefficient_ptr,
    average_weight_ptr, n_tensors,
    PREPARE: tl.constexpr, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, UPDATE: tl.constexpr, HAS: tl.constexpr, PARAM_SUM: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr, SUB: tl.constexpr, TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, LEFT: tl.constexpr, FOLLOWERS: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:  # the same for all programs and launches
        if tl.load(found_inf_ptr) != 0:
            return
    row_ptr, grad, index, matrix, first_row, first_column, n = open_item(table_ptr, items_ptr, grads_ptr)
    if grad == 0:
        return
    scale = None if grad_scale_ptr is None else load_number(grad_scale_ptr, ARITHMETIC)
    coefficient = None if coefficient_ptr is None else load_number(coefficient_ptr, ARITHMETIC)
    s = PREPARE(hyper_ptr, step_number(row_ptr), ARITHMETIC)
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    cut = tl.load(row_ptr + CUT)
    param = tl.load(row_ptr + PARAM)
    param_sum = tl.zeros([], tl.float64)
    if cut == 2:
        n_strips = tl.load(row_ptr + N_STRIPS)
        strip = index % n_strips
        row_block = index // n_strips % tl.load(row_ptr + N_ROW_BLOCKS)
        if is_wide(columns, grad | param):
            param_sum = sum_tiles(
                row_ptr, grad, param, matrix, strip, row_block, first_row, first_column, n, scale, coefficient, s,
                SQUARE, PARAM_SUM, DTYPES, ARITHMETIC, SUB, TILE_ROWS, WIDTH, True,
            )  # fmt: skip
        else:
            param_sum = sum_tiles(
                row_ptr, grad, param, matrix, strip, row_block, first_row, first_column, n, scale, coefficient, s,
                SQUARE, PARAM_SUM, DTYPES, ARITHMETIC, SUB, TILE_ROWS, WIDTH, False,
            )  # fmt: skip
        finish_tiles(
            row_ptr, matrix, row_block, strip, first_row, n, first_column, s, SUB * WIDTH,
            LINE, MATRIX, DTYPES, ARITHMETIC,
        )  # fmt: skip
    else:
        begin = first_column
        elements = n
        if cut == 1:
            begin = matrix * rows * columns
            elements = n * rows * columns
            sum_small(row_ptr, grad, matrix, n, scale, coefficient, s, SQUARE, LINE, MATRIX, DTYPES, ARITHMETIC)
        if PARAM_SUM:
            sums = tl.zeros([BLOCK], ARITHMETIC)
            at = 0 * n
            while at < elements:
                lanes = tl.arange(0, BLOCK)
                p = load(param, begin + at, lanes, lanes < elements - at, DTYPES[0], ARITHMETIC, False)
                sums += p * p
                at += BLOCK
            param_sum = tl.sum(sums.to(tl.float64), axis=0)
    if PARAM_SUM:
        tl.store(doubles(row_ptr, PARAM_SUMS) + index, param_sum)
        n_items = tl.load(row_ptr + N_ITEMS)
        if is_last_of(tl.load(row_ptr + COUNTERS).to(tl.pointer_type(tl.int32)), n_items.to(tl.int32)):
            total = add_up(doubles(row_ptr, PARAM_SUMS), n_items, 1)
            rms = square_root(total / tl.load(row_ptr + NUMEL).to(tl.float64))
            tl.store(doubles(row_ptr, TOTALS), rms)
            if DTYPES[5] != NONE:
                store(tl.load(row_ptr + TENSOR_STATE), 0, 0, rms, None, DTYPES[5], False)


@triton.jit
def update_tile(
    grad, begin, lanes, row, mask, left, of_rows_ptr, of_matrix, of_columns, scale, coefficient, s,
    DIRECTION: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The squares of the update of a tile."""
    g = load(grad, begin, lanes, mask, DTYPES[1], ARITHMETIC, WIDE)
    factor = tile_factors(of_rows_ptr, row, row < left, of_matrix, of_columns, DTYPES)
    g = changed(g, scale, coefficient)
    if MAXIMIZE:
        g = -g
    direction = tl.where(mask, DIRECTION(g, factor, s), 0.0)
    return direction * direction


@triton.jit
def update_tiles(
    row_ptr, grad, matrix, first_row, first_column, n, scale, coefficient, s,
    DIRECTION: tl.constexpr, MATRIX: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr,
    MAXIMIZE: tl.constexpr, SUB: tl.constexpr, TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sum of the squares of the update of ``n`` rows of a strip."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    row, column, lanes, there = tile_lanes(columns, first_column, SUB, TILE_ROWS, WIDTH, WIDE)
    of_columns = tile_column_factors(row_ptr, matrix, columns, first_column, column, there, False, DTYPES, ARITHMETIC)
    of_matrix = None if MATRIX is None else matrix_factor(row_ptr, matrix, ARITHMETIC)
    of_rows_ptr = tile_row_factors(row_ptr, matrix, rows, False, ARITHMETIC) + first_row
    line = matrix * rows + first_row
    sums = tl.zeros([SUB, TILE_ROWS, WIDTH], ARITHMETIC)
    at = 0 * n
    if WIDE:  # as in sum_tiles
        while at < n // TILE_ROWS * TILE_ROWS:
            begin = (line + at) * columns + first_column
            sums += update_tile(
                grad, begin, lanes, row, there, n - at, of_rows_ptr + at, of_matrix, of_columns, scale, coefficient, s,
                DIRECTION, DTYPES, ARITHMETIC, MAXIMIZE, WIDE,
            )  # fmt: skip
            at += TILE_ROWS
    while at < n:
        begin = (line + at) * columns + first_column
        sums += update_tile(
            grad, begin, lanes, row, (row < n - at) & there, n - at, of_rows_ptr + at, of_matrix, of_columns, scale,
            coefficient, s, DIRECTION, DTYPES, ARITHMETIC, MAXIMIZE, WIDE,
        )  # fmt: skip
        at += TILE_ROWS
    return total_of(sums)


@triton.jit(do_not_specialize=ARGUMENTS)
def update_kernel(
    table_ptr, items_ptr, grads_ptr, hyper_ptr, done_ptr, grad_scale_ptr, found_inf_ptr, coefficient_ptr,
    average_weight_ptr, n_tensors,
    PREPARE: tl.constexpr, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, UPDATE: tl.constexpr, HAS: tl.constexpr, PARAM_SUM: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr, SUB: tl.constexpr, TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, LEFT: tl.constexpr, FOLLOWERS: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    row_ptr, grad, index, matrix, first_row, first_column, n = open_item(table_ptr, items_ptr, grads_ptr)
    if grad == 0:
        return
    scale = None if grad_scale_ptr is None else load_number(grad_scale_ptr, ARITHMETIC)
    coefficient = None if coefficient_ptr is None else load_number(coefficient_ptr, ARITHMETIC)
    s = PREPARE(hyper_ptr, step_number(row_ptr), ARITHMETIC)
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    cut = tl.load(row_ptr + CUT)
    total = tl.zeros([], tl.float64)
    if cut == 2:
        if is_wide(columns, grad):
            total = update_tiles(
                row_ptr, grad, matrix, first_row, first_column, n, scale, coefficient, s,
                DIRECTION, MATRIX, DTYPES, ARITHMETIC, MAXIMIZE, SUB, TILE_ROWS, WIDTH, True,
            )  # fmt: skip
        else:
            total = update_tiles(
                row_ptr, grad, matrix, first_row, first_column, n, scale, coefficient, s,
                DIRECTION, MATRIX, DTYPES, ARITHMETIC, MAXIMIZE, SUB, TILE_ROWS, WIDTH, False,
            )  # fmt: skip
    else:
        begin = first_column
        elements = n
        if cut == 1:
            begin = matrix * rows * columns
            elements = n * rows * columns
        lanes = tl.arange(0, BLOCK)
        sums = tl.zeros([BLOCK], ARITHMETIC)
        at = 0 * n
        while at < elements:
            mask = lanes < elements - at
            g = load(grad, begin + at, lanes, mask, DTYPES[1], ARITHMETIC, False)
            g = changed(g, scale, coefficient)
            if MAXIMIZE:
                g = -g
            if cut == 1:
                i = at.to(tl.int32) + lanes
                factor = small_factors(row_ptr, matrix, i, mask, False, MATRIX, DTYPES, ARITHMETIC)
            else:  # the states are for the last pass to write
                state = load(tl.load(row_ptr + ROW_STATE), begin + at, lanes, mask, DTYPES[2], ARITHMETIC, False)
                _unused, factor = LINE(SQUARE(g, s), state, s)
            direction = tl.where(mask, DIRECTION(g, factor, s), 0.0)
            sums += direction * direction
            at += BLOCK
        total = tl.sum(sums.to(tl.float64), axis=0)
    tl.store(doubles(row_ptr, UPDATE_SUMS) + index, total)
    n_items = tl.load(row_ptr + N_ITEMS)
    if is_last_of(tl.load(row_ptr + COUNTERS).to(tl.pointer_type(tl.int32)) + 1, n_items.to(tl.int32)):
        sum = add_up(doubles(row_ptr, UPDATE_SUMS), n_items, 1)
        tl.store(doubles(row_ptr, TOTALS) + 1, square_root(sum / tl.load(row_ptr + NUMEL).to(tl.float64)))


class Elements(NamedTuple):
    """What a block of elements has before the update, and the addresses that it is loaded from and stored to."""

    grad: tl.tensor
    param: tl.tensor
    state: tl.tensor
    average: tl.tensor
    param_ptr: tl.tensor
    state_ptr: tl.tensor
    average_ptr: tl.tensor
    copy_ptr: tl.tensor


@triton.jit
def addresses_of(row_ptr, grad, DTYPES: tl.constexpr, FOLLOWERS: tl.constexpr):
    """All addresses of a tensor's elements, or'ed."""
    addresses = grad | tl.load(row_ptr + PARAM)
    if DTYPES[4] != NONE:
        addresses = addresses | tl.load(row_ptr + ELEMENT_STATE)
    if FOLLOWERS[0] != NONE:
        addresses = addresses | tl.load(row_ptr + AVERAGE)
    if FOLLOWERS[1] != NONE:
        addresses = addresses | tl.load(row_ptr + COPY)
    return addresses


@triton.jit
def load_elements(
    row_ptr, grad, begin, lanes, mask, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr, FOLLOWERS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    param_ptr = tl.load(row_ptr + PARAM)
    state_ptr = tl.load(row_ptr + ELEMENT_STATE)
    average_ptr = tl.load(row_ptr + AVERAGE)
    g = load(grad, begin, lanes, mask, DTYPES[1], ARITHMETIC, WIDE)
    p = load(param_ptr, begin, lanes, mask, DTYPES[0], ARITHMETIC, WIDE)
    state, average = p, p  # stand in for what is absent
    if DTYPES[4] != NONE:
        state = load(state_ptr, begin, lanes, mask, DTYPES[4], ARITHMETIC, WIDE)
    if FOLLOWERS[0] != NONE:
        average = load(average_ptr, begin, lanes, mask, FOLLOWERS[0], ARITHMETIC, WIDE)
    return Elements(g, p, state, average, param_ptr, state_ptr, average_ptr, tl.load(row_ptr + COPY))


@triton.jit
def leave(grad, begin, lanes, g, mask, GRAD: tl.constexpr, LEFT: tl.constexpr, WIDE: tl.constexpr):
    """What becomes of the gradient in memory, after all threads have loaded it."""
    if LEFT != "":
        tl.debug_barrier()
        store(grad, begin, lanes, tl.zeros_like(g) if LEFT == "zero" else g, mask, GRAD, WIDE)


@triton.jit
def store_elements(
    e, begin, lanes, mask, p, state, average_weight, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr,
    FOLLOWERS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The new parameters and states, and what follows the parameters as they are stored."""
    if DTYPES[4] != NONE:
        store(e.state_ptr, begin, lanes, state, mask, DTYPES[4], WIDE)
    store(e.param_ptr, begin, lanes, p, mask, DTYPES[0], WIDE)
    p = widen(narrow(p, DTYPES[0]), DTYPES[0], ARITHMETIC)
    if FOLLOWERS[0] != NONE:
        store(e.average_ptr, begin, lanes, e.average + average_weight * (p - e.average), mask, FOLLOWERS[0], WIDE)
    if FOLLOWERS[1] != NONE:
        store(e.copy_ptr, begin, lanes, p, mask, FOLLOWERS[1], WIDE)


@triton.jit
def updated(e, g, factor, factor2, s, f, UPDATE: tl.constexpr, HAS: tl.constexpr, TWO: tl.constexpr):
    """The new parameters and states; what stands in for states comes back where the rule names none."""
    states = ()
    if len(HAS) == 1:
        states = (e.state,)
    if TWO:
        new = UPDATE(e.param, g, factor, factor2, *states, s, f, HAS)
    else:
        new = UPDATE(e.param, g, factor, *states, s, f, HAS)
    state = e.state
    if len(HAS) == 1:
        state = new[1]
    return new[0], state


@triton.jit
def apply_tiles(
    row_ptr, grad, matrix, first_row, first_column, n, scale, coefficient, average_weight, s, f,
    UPDATE: tl.constexpr, HAS: tl.constexpr, MATRIX: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr,
    MAXIMIZE: tl.constexpr, LEFT: tl.constexpr, FOLLOWERS: tl.constexpr, SUB: tl.constexpr, TILE_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The update of ``n`` rows of a strip."""
    TWO: tl.constexpr = DTYPES[6] != NONE or DTYPES[7] != NONE  # states and factors of a line
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    row, column, lanes, there = tile_lanes(columns, first_column, SUB, TILE_ROWS, WIDTH, WIDE)
    of_columns = tile_column_factors(row_ptr, matrix, columns, first_column, column, there, False, DTYPES, ARITHMETIC)
    of_columns2 = tile_column_factors(row_ptr, matrix, columns, first_column, column, there, TWO, DTYPES, ARITHMETIC)
    of_matrix = None if MATRIX is None else matrix_factor(row_ptr, matrix, ARITHMETIC)
    of_rows_ptr = tile_row_factors(row_ptr, matrix, rows, False, ARITHMETIC) + first_row
    of_rows2_ptr = tile_row_factors(row_ptr, matrix, rows, TWO, ARITHMETIC) + first_row
    at = 0 * n
    while at < n:
        begin = (matrix * rows + first_row + at) * columns + first_column
        row_mask = row < n - at
        mask = row_mask & there
        e = load_elements(row_ptr, grad, begin, lanes, mask, DTYPES, ARITHMETIC, FOLLOWERS, WIDE)
        factor = tile_factors(of_rows_ptr + at, row, row_mask, of_matrix, of_columns, DTYPES)
        factor2 = tile_factors(of_rows2_ptr + at, row, row_mask, of_matrix, of_columns2, DTYPES)
        g = changed(e.grad, scale, coefficient)
        leave(grad, begin, lanes, g, mask, DTYPES[1], LEFT, WIDE)
        if MAXIMIZE:
            g = -g
        p, state = updated(e, g, factor, factor2, s, f, UPDATE, HAS, TWO)
        store_elements(e, begin, lanes, mask, p, state, average_weight, DTYPES, ARITHMETIC, FOLLOWERS, WIDE)
        at += TILE_ROWS


@triton.jit
def zero_tiles(
    row_ptr, grad, matrix, first_row, first_column, n, GRAD: tl.constexpr, SUB: tl.constexpr, TILE_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    row, _column, lanes, there = tile_lanes(columns, first_column, SUB, TILE_ROWS, WIDTH, False)
    at = 0 * n
    while at < n:
        begin = (matrix * rows + first_row + at) * columns + first_column
        mask = (row < n - at) & there
        store(grad, begin, lanes, tl.zeros([SUB, TILE_ROWS, WIDTH], tl.float32), mask, GRAD, False)
        at += TILE_ROWS


@triton.jit
def zero_item(
    table_ptr, items_ptr, grads_ptr, GRAD: tl.constexpr, SUB: tl.constexpr, TILE_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is left of a step that is skipped: zeros in the gradient."""
    row_ptr, grad, _, matrix, first_row, first_column, n = open_item(table_ptr, items_ptr, grads_ptr)
    if grad != 0:
        cut = tl.load(row_ptr + CUT)
        if cut == 2:
            zero_tiles(row_ptr, grad, matrix, first_row, first_column, n, GRAD, SUB, TILE_ROWS, WIDTH)
        else:
            begin = first_column
            elements = n
            if cut == 1:
                size = tl.load(row_ptr + ROWS) * tl.load(row_ptr + N_COLUMNS)
                begin = matrix * size
                elements = n * size
            lanes = tl.arange(0, BLOCK)
            at = 0 * n
            while at < elements:
                store(grad, begin + at, lanes, tl.zeros([BLOCK], tl.float32), lanes < elements - at, GRAD, False)
                at += BLOCK


@triton.jit(do_not_specialize=ARGUMENTS)
def apply_kernel(
    table_ptr, items_ptr, grads_ptr, hyper_ptr, done_ptr, grad_scale_ptr, found_inf_ptr, coefficient_ptr,
    average_weight_ptr, n_tensors,
    PREPARE: tl.constexpr, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, UPDATE: tl.constexpr, HAS: tl.constexpr, PARAM_SUM: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr, SUB: tl.constexpr, TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, LEFT: tl.constexpr, FOLLOWERS: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            if LEFT == "zero":
                zero_item(table_ptr, items_ptr, grads_ptr, DTYPES[1], SUB, TILE_ROWS, WIDTH, BLOCK)
            return
    row_ptr, grad, _, matrix, first_row, first_column, n = open_item(table_ptr, items_ptr, grads_ptr)
    if grad != 0:
        scale = None if grad_scale_ptr is None else load_number(grad_scale_ptr, ARITHMETIC)
        coefficient = None if coefficient_ptr is None else load_number(coefficient_ptr, ARITHMETIC)
        average_weight = None if average_weight_ptr is None else load_number(average_weight_ptr, ARITHMETIC)
        s = PREPARE(hyper_ptr, step_number(row_ptr), ARITHMETIC)
        totals = doubles(row_ptr, TOTALS)
        f = None if FINISH is None else FINISH(s, tl.load(totals), tl.load(totals + 1), ARITHMETIC)
        TWO: tl.constexpr = DTYPES[6] != NONE or DTYPES[7] != NONE  # states and factors of a line
        rows = tl.load(row_ptr + ROWS)
        columns = tl.load(row_ptr + N_COLUMNS)
        cut = tl.load(row_ptr + CUT)
        if cut == 2:
            # Half a tile at a time: there are more arrays than in the passes before.
            HALF: tl.constexpr = (SUB + 1) // 2
            wide = is_wide(columns, addresses_of(row_ptr, grad, DTYPES, FOLLOWERS))
            column = first_column
            while column < tl.minimum(first_column + SUB * WIDTH, columns):
                if wide:
                    apply_tiles(
                        row_ptr, grad, matrix, first_row, column, n, scale, coefficient, average_weight, s, f,
                        UPDATE, HAS, MATRIX, DTYPES, ARITHMETIC, MAXIMIZE, LEFT, FOLLOWERS, HALF, TILE_ROWS, WIDTH,
                        True,
                    )  # fmt: skip
                else:
                    apply_tiles(
                        row_ptr, grad, matrix, first_row, column, n, scale, coefficient, average_weight, s, f,
                        UPDATE, HAS, MATRIX, DTYPES, ARITHMETIC, MAXIMIZE, LEFT, FOLLOWERS, HALF, TILE_ROWS, WIDTH,
                        False,
                    )  # fmt: skip
                column += HALF * WIDTH
        else:
            begin = first_column
            elements = n
            if cut == 1:
                begin = matrix * rows * columns
                elements = n * rows * columns
            lanes = tl.arange(0, BLOCK)
            at = 0 * n
            while at < elements:
                mask = lanes < elements - at
                e = load_elements(row_ptr, grad, begin + at, lanes, mask, DTYPES, ARITHMETIC, FOLLOWERS, False)
                g = changed(e.grad, scale, coefficient)
                leave(grad, begin + at, lanes, g, mask, DTYPES[1], LEFT, False)
                if MAXIMIZE:
                    g = -g
                factor = tl.zeros([BLOCK], ARITHMETIC)
                factor2 = factor
                if cut == 1:
                    i = at.to(tl.int32) + lanes
                    factor = small_factors(row_ptr, matrix, i, mask, False, MATRIX, DTYPES, ARITHMETIC)
                    factor2 = small_factors(row_ptr, matrix, i, mask, TWO, MATRIX, DTYPES, ARITHMETIC)
                elif not TWO:
                    state_ptr = tl.load(row_ptr + ROW_STATE)
                    state = load(state_ptr, begin + at, lanes, mask, DTYPES[2], ARITHMETIC, False)
                    state, factor = LINE(SQUARE(g, s), state, s)
                    store(state_ptr, begin + at, lanes, state, mask, DTYPES[2], False)
                p, state = updated(e, g, factor, factor2, s, f, UPDATE, HAS, TWO)
                store_elements(
                    e, begin + at, lanes, mask, p, state, average_weight, DTYPES, ARITHMETIC, FOLLOWERS, False
                )
                at += BLOCK

    # The last program to come here advances the counters: all have read the steps by then.
    if is_last_of(done_ptr, tl.num_programs(0)):
        first = 0 * n_tensors
        while first < n_tensors:
            tensor = first + tl.arange(0, LINES)
            active = tl.load(grads_ptr + tensor, mask=tensor < n_tensors, other=0) != 0
            address = tl.load(table_ptr + tensor.to(tl.int64) * TABLE_ROW + STEP, mask=active, other=0)
            step_ptr = address.to(tl.pointer_type(tl.float32))
            tl.store(step_ptr, next_counter(tl.load(step_ptr, mask=active, other=0.0)), mask=active)
            first += LINES


def kernels_of(rule: type[Rule]) -> tuple[triton.JITFunction, ...]:
    """The launches of a step."""
    return (sums_kernel, update_kernel, apply_kernel) if rule.direction else (sums_kernel, apply_kernel)


def constants(
    rule: type[Rule], dtypes: tuple[int, ...], followers: tuple[int, int], maximize: bool, left: str
) -> dict[str, Any]:
    """The compile-time arguments of the kernels.

    ``dtypes`` of param, grad, the state of rows or flat elements, that of columns, of each element and of the tensor,
    the second states of rows and of columns, as numeric.py counts them; NONE for an absent one. The others:
    as in step.py.
    """
    functions = {name: getattr(rule, name) for name in ("square", "line", "matrix", "direction", "update")}
    sub, rows, width = tile(dtypes[1])
    return {
        **{name.upper(): None if function is None else bound(function) for name, function in functions.items()},
        "PREPARE": binding.prepare(rule),
        "FINISH": None if rule.finish is None else binding.finish(rule),
        "HAS": rule.has(dtypes[4] != NONE.value for _ in rule.names_of("element")),
        "PARAM_SUM": rule.finish is not None,
        "DTYPES": dtypes,
        "ARITHMETIC": tl.float64 if dtypes[0] == FP64.value else tl.float32,
        "MAXIMIZE": maximize,
        "SUB": sub,
        "TILE_ROWS": rows,
        "WIDTH": width,
        "BLOCK": block_size() // 2,
        "LEFT": left,
        "FOLLOWERS": followers,
    }


def tile(grad: int) -> tuple[int, int, int]:
    """The pieces, rows and columns of a piece that a program takes at a time, by the dtype of the gradient.

    In the interpreter each time costs the same, hence many.
    """
    if is_interpreted():
        return 1, 128, 128
    return {FP32.value: (4, 8, 128), FP64.value: (4, 8, 64)}.get(grad, (2, 8, 256))


def prepare(rule: type[Rule], *args: Any) -> list[Prepared]:
    """The kernels of a step, in order, with the arguments that `constants` takes. A launch is given:

    table: int64, (tensors, TABLE_ROW): records, and what reducing_lines.COLUMNS names.
    items: int64, (programs, len(ITEM)).
    and from the third on what step.py's kernel is given.
    """
    fixed = constants(rule, *args)
    return [
        Prepared(kernel, fixed, **register_limit(3 if kernel is update_kernel else 2)) for kernel in kernels_of(rule)
    ]
