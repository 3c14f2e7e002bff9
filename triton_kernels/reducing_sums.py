"""Pass 1 of a rule that reduces: squares of gradients by rows and columns, and of parameters; it updates no element.

The last program to come to the end of a line, matrix or tensor finishes it, by what is in reducing_lines.py.
"""

import triton
import triton.language as tl

from .numeric import NONE, changed, load_number, square_root
from .records import N_COLUMNS, NUMEL, PARAM, ROWS
from .reducing_items import ARGUMENTS, open_item, step_number
from .reducing_lines import (
    COLUMN_SUMS,
    COUNTERS,
    CUT,
    N_ITEMS,
    N_ROW_BLOCKS,
    N_STRIPS,
    PARAM_SUMS,
    ROW_SUMS,
    TENSOR_STATE,
    TOTALS,
    add_up,
    doubles,
    finish_tiles,
    is_last_of,
    sum_small,
    work,
)
from .reducing_tiles import is_wide, load, store, tile_lanes, total_of


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


@triton.jit(do_not_specialize=ARGUMENTS)
def sums_kernel(
    table_ptr, items_ptr, grads_ptr, hyper_ptr, done_ptr, grad_scale_ptr, found_inf_ptr, coefficient_ptr,
    average_weight_ptr, n_tensors,
    PREPARE: tl.constexpr, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, UPDATE: tl.constexpr, HAS: tl.constexpr, PARAM_SUM: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr, SUB: tl.constexpr, TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, GRAD_AFTER: tl.constexpr, FOLLOWERS: tl.constexpr,
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
