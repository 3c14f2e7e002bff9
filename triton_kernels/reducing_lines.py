"""Rows and columns in the kernels for rules that reduce: their sums, states and factors, and where these lie."""

import triton
import triton.language as tl

from .numeric import NONE, divide, narrow, widen
from .stored import pointer

# Columns of the table: int64 numbers and addresses of a tensor.
COLUMNS = (
    *("param", "step", "row_state", "column_state", "element_state", "tensor_state"),
    *("batch", "rows", "columns", "numel", "cut"),
    *("row_factors", "column_factors", "matrix_factors", "row_sums", "column_sums"),
    *("param_sums", "update_sums", "totals", "counters", "n_items", "n_row_blocks", "n_strips"),
    *("row_state2", "column_state2", "average", "copy"),
)
WORK = COLUMNS[COLUMNS.index("row_factors") : COLUMNS.index("counters")]  # addresses of work memory
FLAT, SMALL, TILES = 0, 1, 2  # how a tensor is cut into items
ITEM = ("tensor", "index", "matrix", "row", "column", "n")
PARAM, STEP, ROW_STATE, COLUMN_STATE, ELEMENT_STATE, TENSOR_STATE = (tl.constexpr(k) for k in range(6))
BATCH, ROWS, N_COLUMNS, NUMEL, CUT = (tl.constexpr(k) for k in range(6, 11))
ROW_FACTORS, COLUMN_FACTORS, MATRIX_FACTORS, ROW_SUMS, COLUMN_SUMS = (tl.constexpr(k) for k in range(11, 16))
PARAM_SUMS, UPDATE_SUMS, TOTALS, COUNTERS, N_ITEMS, N_ROW_BLOCKS, N_STRIPS = (tl.constexpr(k) for k in range(16, 23))
ROW_STATE2, COLUMN_STATE2, AVERAGE, COPY = (tl.constexpr(k) for k in range(23, 27))
TABLE_ROW = tl.constexpr(len(COLUMNS))
ITEM_ROW = tl.constexpr(len(ITEM))
LINES = tl.constexpr(256)  # that are finished at once


@triton.jit
def load(address, index, mask, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr):
    return widen(tl.load(pointer(address, DTYPE) + index, mask=mask, other=0), DTYPE, ARITHMETIC)


@triton.jit
def store(address, index, x, mask, DTYPE: tl.constexpr):
    tl.store(pointer(address, DTYPE) + index, narrow(x, DTYPE), mask=mask)


@triton.jit
def work(row_ptr, column, ARITHMETIC: tl.constexpr):
    """The part of the work memory that a column of the table points to, in the arithmetic dtype."""
    return tl.load(row_ptr + column).to(tl.pointer_type(ARITHMETIC))


@triton.jit
def doubles(row_ptr, column):
    return tl.load(row_ptr + column).to(tl.pointer_type(tl.float64))


@triton.jit
def load_grad(
    grad, index, mask, grad_scale_ptr, coefficient_ptr, GRAD: tl.constexpr, ARITHMETIC: tl.constexpr,
    MAXIMIZE: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """A gradient as the rule takes it. LEFT, in the last pass: what then becomes of it in memory."""
    g = load(grad, index, mask, GRAD, ARITHMETIC)
    if grad_scale_ptr is not None:
        g = divide(g, tl.load(grad_scale_ptr).to(ARITHMETIC))
    if coefficient_ptr is not None:
        g = g * tl.load(coefficient_ptr).to(ARITHMETIC)
    if LEFT != "":
        tl.debug_barrier()  # the threads that store an element may not be those that load it
    if LEFT == "zero":
        store(grad, index, tl.zeros_like(g), mask, GRAD)
    if LEFT == "changed":
        store(grad, index, g, mask, GRAD)
    if MAXIMIZE:
        g = -g
    return g


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
    state = load(address, begin + lanes, mask, DTYPE, ARITHMETIC)
    if DTYPE2 == NONE:
        tl.debug_barrier()  # the sum of states: where several threads load the same, none may see what is stored below
        state, _unused, factor, _unused = LINE(mean, state, state, s)
    else:
        address2 = tl.load(row_ptr + (COLUMN_STATE2 if OF_COLUMNS else ROW_STATE2))
        state2 = load(address2, begin + lanes, mask, DTYPE2, ARITHMETIC)
        tl.debug_barrier()
        state, state2, factor, factor2 = LINE(mean, state, state2, s)
        store(address2, begin + lanes, state2, mask, DTYPE2)
        tl.store(factors_ptr + second_factors(row_ptr, OF_COLUMNS) + begin + lanes, factor2, mask=mask)
    store(address, begin + lanes, state, mask, DTYPE)
    tl.store(factors_ptr + begin + lanes, factor, mask=mask)
    return tl.where(mask, state, 0.0)


@triton.jit
def second_factors(row_ptr, OF_COLUMNS: tl.constexpr):
    """Where the second factors of lines begin after the first ones."""
    return tl.load(row_ptr + BATCH) * tl.load(row_ptr + (N_COLUMNS if OF_COLUMNS else ROWS))


@triton.jit
def finish_matrix(row_ptr, matrix, s, LINE: tl.constexpr, MATRIX: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The lines of a matrix whose sums are all there."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    lanes = tl.arange(0, LINES)
    if DTYPES[2] != NONE:
        n_strips = tl.load(row_ptr + N_STRIPS)
        total = tl.zeros([LINES], tl.float64)
        first = 0 * rows
        while first < rows:
            line = matrix * rows + first + lanes
            mask = first + lanes < rows
            sums = tl.zeros([LINES], tl.float64)
            k = 0 * n_strips
            while k < n_strips:
                part = tl.load(work(row_ptr, ROW_SUMS, ARITHMETIC) + line * n_strips + k, mask=mask, other=0.0)
                sums += part.to(tl.float64)
                k += 1
            mean = (sums / columns.to(tl.float64)).to(ARITHMETIC)
            states = finish_lines(
                row_ptr, matrix * rows + first, rows - first, mean, s, LINE, False, DTYPES, ARITHMETIC
            )
            total += states.to(tl.float64)
            first += LINES
        if MATRIX is not None:
            mean_of_rows = (tl.sum(total, axis=0) / rows.to(tl.float64)).to(ARITHMETIC)
            tl.store(work(row_ptr, MATRIX_FACTORS, ARITHMETIC) + matrix, MATRIX(mean_of_rows, s))
    if DTYPES[3] != NONE:
        n_row_blocks = tl.load(row_ptr + N_ROW_BLOCKS)
        first = 0 * columns
        while first < columns:
            mask = first + lanes < columns
            sums = tl.zeros([LINES], tl.float64)
            k = 0 * n_row_blocks
            while k < n_row_blocks:
                index = (matrix * n_row_blocks + k) * columns + first + lanes
                sums += tl.load(work(row_ptr, COLUMN_SUMS, ARITHMETIC) + index, mask=mask, other=0.0).to(tl.float64)
                k += 1
            mean = (sums / rows.to(tl.float64)).to(ARITHMETIC)
            finish_lines(row_ptr, matrix * columns + first, columns - first, mean, s, LINE, True, DTYPES, ARITHMETIC)
            first += LINES


@triton.jit
def sum_small(
    row_ptr, grad, first_matrix, n, grad_scale_ptr, coefficient_ptr, s,
    SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr,
    DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Several whole small matrices: a lane takes a line, then a matrix."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    lanes = tl.arange(0, LINES)
    if DTYPES[2] != NONE:
        first = 0 * rows
        while first < n * rows:
            mask = first + lanes < n * rows
            line = first_matrix * rows + first + lanes
            sums = tl.zeros([LINES], ARITHMETIC)
            k = 0 * columns
            while k < columns:
                g = load_grad(
                    grad, line * columns + k, mask, grad_scale_ptr, coefficient_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE, ""
                )
                sums += tl.where(mask, SQUARE(g, s), 0.0)
                k += 1
            mean = divide(sums, columns.to(ARITHMETIC))
            states = finish_lines(
                row_ptr, first_matrix * rows + first, n * rows - first, mean, s, LINE, False, DTYPES, ARITHMETIC
            )
            tl.store(work(row_ptr, ROW_SUMS, ARITHMETIC) + line, states, mask=mask)
            first += LINES
    if DTYPES[3] != NONE:
        first = 0 * columns
        while first < n * columns:
            mask = first + lanes < n * columns
            line = first_matrix * columns + first + lanes
            begin = line // columns * rows * columns + line % columns
            sums = tl.zeros([LINES], ARITHMETIC)
            k = 0 * rows
            while k < rows:
                g = load_grad(
                    grad,
                    begin + k * columns,
                    mask,
                    grad_scale_ptr,
                    coefficient_ptr,
                    DTYPES[1],
                    ARITHMETIC,
                    MAXIMIZE,
                    "",
                )
                sums += tl.where(mask, SQUARE(g, s), 0.0)
                k += 1
            mean = divide(sums, rows.to(ARITHMETIC))
            finish_lines(
                row_ptr, first_matrix * columns + first, n * columns - first, mean, s, LINE, True, DTYPES, ARITHMETIC
            )
            first += LINES
    if MATRIX is not None:
        tl.debug_barrier()  # the states of the rows, which other threads have written
        first = 0 * n
        while first < n:
            mask = first + lanes < n
            begin = (first_matrix + first + lanes) * rows
            total = tl.zeros([LINES], tl.float64)
            k = 0 * rows
            while k < rows:
                total += tl.load(work(row_ptr, ROW_SUMS, ARITHMETIC) + begin + k, mask=mask, other=0.0).to(tl.float64)
                k += 1
            factor = MATRIX((total / rows.to(tl.float64)).to(ARITHMETIC), s)
            tl.store(work(row_ptr, MATRIX_FACTORS, ARITHMETIC) + first_matrix + first + lanes, factor, mask=mask)
            first += LINES


@triton.jit
def line_factors(row_ptr, begin, mask, SECOND: tl.constexpr, OF_COLUMNS: tl.constexpr, ARITHMETIC: tl.constexpr):
    """The factors of rows or columns, counted through the tensor."""
    factors_ptr = work(row_ptr, COLUMN_FACTORS if OF_COLUMNS else ROW_FACTORS, ARITHMETIC)
    if SECOND:
        factors_ptr += second_factors(row_ptr, OF_COLUMNS)
    return tl.load(factors_ptr + begin, mask=mask, other=0.0)


@triton.jit
def row_factors(
    row_ptr, matrix, row, mask, SECOND: tl.constexpr, MATRIX: tl.constexpr, ARITHMETIC: tl.constexpr
):  # fmt: skip
    """The factors of rows, times their matrices'; ``matrix`` and ``row`` are blocks."""
    factor = line_factors(row_ptr, matrix * tl.load(row_ptr + ROWS) + row, mask, SECOND, False, ARITHMETIC)
    if MATRIX is not None:
        factor *= tl.load(work(row_ptr, MATRIX_FACTORS, ARITHMETIC) + matrix, mask=mask, other=0.0)
    return factor


@triton.jit
def small_factors(
    row_ptr, i, mask, SECOND: tl.constexpr, MATRIX: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr
):  # fmt: skip
    """The factors of the elements ``i`` of a tensor."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    line = i // columns
    matrix = line // rows
    if DTYPES[3] == NONE:
        factor = row_factors(row_ptr, matrix, line % rows, mask, SECOND, MATRIX, ARITHMETIC)
    else:
        factor = line_factors(row_ptr, matrix * columns + i % columns, mask, SECOND, True, ARITHMETIC)
        if DTYPES[2] != NONE:
            factor = row_factors(row_ptr, matrix, line % rows, mask, SECOND, MATRIX, ARITHMETIC) * factor
    return factor


@triton.jit
def tile_factors(
    row_ptr, matrix, row, row_mask, of_columns, SECOND: tl.constexpr, MATRIX: tl.constexpr,
    DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The factors of a tile's elements, as a block that has one row or one column where they are the same."""
    factor = of_columns
    if DTYPES[2] != NONE:
        factor = row_factors(row_ptr, matrix + 0 * row, row, row_mask, SECOND, MATRIX, ARITHMETIC)[:, None]
        if DTYPES[3] != NONE:
            factor = factor * of_columns
    return factor


@triton.jit
def column_factors(
    row_ptr, matrix, column, columns, SECOND: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr
):  # fmt: skip
    """Those of a tile's columns, as a block of one row; of a rule without any, ones."""
    factor = tl.full([1, column.shape[0]], 1, ARITHMETIC)
    if DTYPES[3] != NONE:
        factor = line_factors(row_ptr, matrix * columns + column, column < columns, SECOND, True, ARITHMETIC)[None, :]
    return factor
