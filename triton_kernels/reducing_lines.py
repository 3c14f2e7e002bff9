"""Rows and columns in the kernels for rules that reduce: their sums, states and factors, and where these lie."""

import triton
import triton.language as tl

from .numeric import NONE, changed, divide, narrow, widen
from .records import BATCH, N_COLUMNS, RECORD, ROWS
from .stored import pointer

# What follows the record in a tensor's row of the table: int64 numbers and addresses.
COLUMNS = (
    *("row_state", "column_state", "element_state", "tensor_state", "row_state2", "column_state2", "cut"),
    *("row_factors", "column_factors", "matrix_factors", "row_sums", "column_sums"),
    *("param_sums", "update_sums", "matrix_sums", "totals", "counters", "n_items", "n_row_blocks", "n_strips"),
)
WORK = COLUMNS[COLUMNS.index("row_factors") : COLUMNS.index("counters")]  # addresses of work memory
FLAT, SMALL, TILES = 0, 1, 2  # how a tensor is cut into items
ITEM = ("tensor", "index", "matrix", "row", "column", "n")
_FIRST = RECORD.value
ROW_STATE, COLUMN_STATE, ELEMENT_STATE, TENSOR_STATE = (tl.constexpr(_FIRST + k) for k in range(4))
ROW_STATE2, COLUMN_STATE2, CUT = (tl.constexpr(_FIRST + k) for k in range(4, 7))
ROW_FACTORS, COLUMN_FACTORS, MATRIX_FACTORS, ROW_SUMS, COLUMN_SUMS = (tl.constexpr(_FIRST + k) for k in range(7, 12))
PARAM_SUMS, UPDATE_SUMS, MATRIX_SUMS, TOTALS, COUNTERS = (tl.constexpr(_FIRST + k) for k in range(12, 17))
N_ITEMS, N_ROW_BLOCKS, N_STRIPS = (tl.constexpr(_FIRST + k) for k in range(17, 20))
TABLE_ROW = tl.constexpr(_FIRST + len(COLUMNS))
ITEM_ROW = tl.constexpr(len(ITEM))
LINES = tl.constexpr(256)  # that are finished at once
PARTS = tl.constexpr(8)  # of their sums that are added up at once


@triton.jit
def load(address, begin, lanes, mask, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Elements ``begin + lanes``."""
    return widen(tl.load(pointer(address, DTYPE) + begin + lanes, mask=mask, other=0), DTYPE, ARITHMETIC)


@triton.jit
def store(address, begin, lanes, x, mask, DTYPE: tl.constexpr):
    tl.store(pointer(address, DTYPE) + begin + lanes, narrow(x, DTYPE), mask=mask)


@triton.jit
def work(row_ptr, column, ARITHMETIC: tl.constexpr):
    """The part of the work memory that a column of the table points to, in the arithmetic dtype."""
    return tl.load(row_ptr + column).to(tl.pointer_type(ARITHMETIC))


@triton.jit
def doubles(row_ptr, column):
    return tl.load(row_ptr + column).to(tl.pointer_type(tl.float64))


@triton.jit
def is_last_of(counter_ptr, n):
    """Whether this program is the last of ``n`` to come here; then it sees what the others have written."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1) == n - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def add_up(numbers_ptr, n, stride):
    """The sum of ``n`` numbers in float64, in a fixed order."""
    lanes = tl.arange(0, LINES)
    sums = tl.zeros([LINES], tl.float64)
    first = 0 * n
    while first < n:
        index = (first + lanes).to(tl.int64)
        sums += tl.load(numbers_ptr + index * stride, mask=index < n, other=0.0).to(tl.float64)
        first += LINES
    return tl.sum(sums, axis=0)


@triton.jit
def finish_lines(
    row_ptr, begin, n, mean, s, LINE: tl.constexpr, OF_COLUMNS: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The states and factors of ``n`` rows or columns from ``begin`` on; returns the first states."""
    lanes = tl.arange(0, LINES)
    mask = lanes < n
    DTYPE: tl.constexpr = DTYPES[3] if OF_COLUMNS else DTYPES[2]
    DTYPE2: tl.constexpr = DTYPES[7] if OF_COLUMNS else DTYPES[6]
    address = tl.load(row_ptr + (COLUMN_STATE if OF_COLUMNS else ROW_STATE))
    factors_ptr = work(row_ptr, COLUMN_FACTORS if OF_COLUMNS else ROW_FACTORS, ARITHMETIC)
    state = load(address, begin, lanes, mask, DTYPE, ARITHMETIC)
    if DTYPE2 == NONE:
        tl.debug_barrier()  # the sum of states: where several threads load the same, none may see what is stored below
        state, factor = LINE(mean, state, s)
    else:
        address2 = tl.load(row_ptr + (COLUMN_STATE2 if OF_COLUMNS else ROW_STATE2))
        state2 = load(address2, begin, lanes, mask, DTYPE2, ARITHMETIC)
        tl.debug_barrier()
        state, state2, factor, factor2 = LINE(mean, state, state2, s)
        store(address2, begin, lanes, state2, mask, DTYPE2)
        tl.store(factors_ptr + second_factors(row_ptr, OF_COLUMNS) + begin + lanes, factor2, mask=mask)
    store(address, begin, lanes, state, mask, DTYPE)
    tl.store(factors_ptr + begin + lanes, factor, mask=mask)
    return tl.where(mask, state, 0.0)


@triton.jit
def second_factors(row_ptr, OF_COLUMNS: tl.constexpr):
    """Where the second factors of lines begin after the first ones."""
    return tl.load(row_ptr + BATCH) * tl.load(row_ptr + (N_COLUMNS if OF_COLUMNS else ROWS))


@triton.jit
def add_parts(numbers_ptr, mask, n, stride):
    """For each line the sum of ``n`` numbers that lie ``stride`` apart, in float64, in a fixed order."""
    parts = tl.arange(0, PARTS)
    sums = tl.zeros([PARTS, LINES], tl.float64)
    first = 0 * n
    while first < n:
        part = first + parts
        there = (part < n)[:, None] & mask[None, :]
        sums += tl.load(numbers_ptr[None, :] + (part * stride)[:, None], mask=there, other=0.0).to(tl.float64)
        first += PARTS
    return tl.sum(sums, axis=0)


@triton.jit
def finish_rows(row_ptr, matrix, first_row, n, s, LINE: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr):
    """``n`` rows of a matrix whose sums are all there; returns the sum of their first states."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    n_strips = tl.load(row_ptr + N_STRIPS)
    sums_ptr = work(row_ptr, ROW_SUMS, ARITHMETIC)
    lanes = tl.arange(0, LINES)
    total = tl.zeros([LINES], tl.float64)
    first = 0 * n
    while first < n:
        begin = matrix * rows + first_row + first
        mask = first + lanes < n
        sums = add_parts(sums_ptr + (begin + lanes) * n_strips, mask, n_strips, 1)
        mean = (sums / columns.to(tl.float64)).to(ARITHMETIC)
        total += finish_lines(row_ptr, begin, n - first, mean, s, LINE, False, DTYPES, ARITHMETIC).to(tl.float64)
        first += LINES
    return tl.sum(total, axis=0)


@triton.jit
def finish_columns(
    row_ptr, matrix, first_column, n, s, LINE: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr
):
    """``n`` columns of a matrix whose sums are all there."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    n_row_blocks = tl.load(row_ptr + N_ROW_BLOCKS)
    sums_ptr = work(row_ptr, COLUMN_SUMS, ARITHMETIC) + matrix * n_row_blocks * columns + first_column
    lanes = tl.arange(0, LINES)
    first = 0 * n
    while first < n:
        begin = matrix * columns + first_column + first
        sums = add_parts(sums_ptr + first + lanes, first + lanes < n, n_row_blocks, columns)
        mean = (sums / rows.to(tl.float64)).to(ARITHMETIC)
        finish_lines(row_ptr, begin, n - first, mean, s, LINE, True, DTYPES, ARITHMETIC)
        first += LINES


@triton.jit
def finish_tiles(
    row_ptr, matrix, row_block, strip, first_row, n, first_column, s, TILE_COLUMNS: tl.constexpr,
    LINE: tl.constexpr, MATRIX: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """What this program's sums were the last for: its rows, then perhaps the matrix, and its columns."""
    n_strips = tl.load(row_ptr + N_STRIPS)
    n_row_blocks = tl.load(row_ptr + N_ROW_BLOCKS)
    counters_ptr = tl.load(row_ptr + COUNTERS).to(tl.pointer_type(tl.int32))
    counters_ptr += 2 + matrix * (n_row_blocks + n_strips + 1)
    if DTYPES[2] != NONE:
        if is_last_of(counters_ptr + row_block, n_strips.to(tl.int32)):
            total = finish_rows(row_ptr, matrix, first_row, n, s, LINE, DTYPES, ARITHMETIC)
            if MATRIX is not None:
                sums_ptr = doubles(row_ptr, MATRIX_SUMS) + matrix * n_row_blocks
                tl.store(sums_ptr + row_block, total)
                if is_last_of(counters_ptr + n_row_blocks + n_strips, n_row_blocks.to(tl.int32)):
                    mean = (add_up(sums_ptr, n_row_blocks, 1) / tl.load(row_ptr + ROWS).to(tl.float64)).to(ARITHMETIC)
                    tl.store(work(row_ptr, MATRIX_FACTORS, ARITHMETIC) + matrix, MATRIX(mean, s))
    if DTYPES[3] != NONE:
        if is_last_of(counters_ptr + n_row_blocks + strip, n_row_blocks.to(tl.int32)):
            left = tl.minimum(tl.load(row_ptr + N_COLUMNS) - first_column, TILE_COLUMNS)
            finish_columns(row_ptr, matrix, first_column, left, s, LINE, DTYPES, ARITHMETIC)


@triton.jit
def sum_small(
    row_ptr, grad, first_matrix, n, scale, coefficient, s, SQUARE: tl.constexpr, LINE: tl.constexpr,
    MATRIX: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """Several whole small matrices: a lane takes a line, then a matrix. All is counted from the first of them."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    begin = first_matrix * rows * columns
    row_sums_ptr = work(row_ptr, ROW_SUMS, ARITHMETIC) + first_matrix * rows
    first_row = first_matrix * rows
    first_column = first_matrix * columns
    rows = rows.to(tl.int32)
    columns = columns.to(tl.int32)
    n = n.to(tl.int32)
    lanes = tl.arange(0, LINES)
    if DTYPES[2] != NONE:
        first = 0 * rows
        while first < n * rows:
            line = first + lanes
            mask = line < n * rows
            sums = tl.zeros([LINES], ARITHMETIC)
            k = 0 * columns
            while k < columns:
                g = changed(load(grad, begin, line * columns + k, mask, DTYPES[1], ARITHMETIC), scale, coefficient)
                sums += tl.where(mask, SQUARE(g, s), 0.0)
                k += 1
            mean = divide(sums, columns.to(ARITHMETIC))
            states = finish_lines(
                row_ptr, first_row + first, n * rows - first, mean, s, LINE, False, DTYPES, ARITHMETIC
            )
            tl.store(row_sums_ptr + line, states, mask=mask)
            first += LINES
    if DTYPES[3] != NONE:
        first = 0 * columns
        while first < n * columns:
            line = first + lanes
            mask = line < n * columns
            at = line // columns * rows * columns + line % columns
            sums = tl.zeros([LINES], ARITHMETIC)
            k = 0 * rows
            while k < rows:
                g = changed(load(grad, begin, at + k * columns, mask, DTYPES[1], ARITHMETIC), scale, coefficient)
                sums += tl.where(mask, SQUARE(g, s), 0.0)
                k += 1
            mean = divide(sums, rows.to(ARITHMETIC))
            finish_lines(row_ptr, first_column + first, n * columns - first, mean, s, LINE, True, DTYPES, ARITHMETIC)
            first += LINES
    if MATRIX is not None:
        tl.debug_barrier()  # the states of the rows, which other threads have written
        first = 0 * n
        while first < n:
            matrix = first + lanes
            mask = matrix < n
            total = tl.zeros([LINES], tl.float64)
            k = 0 * rows
            while k < rows:
                total += tl.load(row_sums_ptr + matrix * rows + k, mask=mask, other=0.0).to(tl.float64)
                k += 1
            factor = MATRIX((total / rows.to(tl.float64)).to(ARITHMETIC), s)
            tl.store(work(row_ptr, MATRIX_FACTORS, ARITHMETIC) + first_matrix + matrix, factor, mask=mask)
            first += LINES


@triton.jit
def small_factors(
    row_ptr, first_matrix, i, mask, SECOND: tl.constexpr, MATRIX: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The factors of elements of several small matrices, which are counted from the first of them in 32 bits."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    line = i // columns.to(tl.int32)
    matrix = line // rows.to(tl.int32)
    if DTYPES[3] != NONE:
        columns_ptr = work(row_ptr, COLUMN_FACTORS, ARITHMETIC) + first_matrix * columns
        if SECOND:
            columns_ptr += second_factors(row_ptr, True)
        of_column = tl.load(columns_ptr + (matrix - line) * columns.to(tl.int32) + i, mask=mask, other=0.0)
        factor = of_column
    if DTYPES[2] != NONE:
        rows_ptr = work(row_ptr, ROW_FACTORS, ARITHMETIC) + first_matrix * rows
        if SECOND:
            rows_ptr += second_factors(row_ptr, False)
        factor = tl.load(rows_ptr + line, mask=mask, other=0.0)
        if MATRIX is not None:
            matrices_ptr = work(row_ptr, MATRIX_FACTORS, ARITHMETIC) + first_matrix
            factor = factor * tl.load(matrices_ptr + matrix, mask=mask, other=0.0)
        if DTYPES[3] != NONE:
            factor = factor * of_column
    return factor
