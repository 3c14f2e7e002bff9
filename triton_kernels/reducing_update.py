"""Pass 2 of a rule that reduces, where the rule asks for it: the sum of the squares of the update.

Nothing of a parameter or a state is written: that is left to pass 3.
"""

import triton
import triton.language as tl

from .numeric import changed, load_number, square_root
from .records import N_COLUMNS, NUMEL, ROWS
from .reducing_items import ARGUMENTS, open_item, step_number
from .reducing_lines import (
    COUNTERS,
    CUT,
    N_ITEMS,
    ROW_STATE,
    TOTALS,
    UPDATE_SUMS,
    add_up,
    doubles,
    is_last_of,
    small_factors,
)
from .reducing_tiles import (
    is_wide,
    load,
    matrix_factor,
    tile_column_factors,
    tile_factors,
    tile_lanes,
    tile_row_factors,
    total_of,
)


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
    BLOCK: tl.constexpr, GRAD_AFTER: tl.constexpr, FOLLOWERS: tl.constexpr,
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
