"""The kernels for rules that reduce, generic over rules: csrc/cuda/reducing.cuh in Triton.

Three launches over the same items: sums of squares by rows and columns, sum of the squares of the update, apply. The
last program to come to the end of a matrix or tensor adds up what all have left in memory, in a fixed order.

They have run under Triton's interpreter and compile for sm_90; they have never run on a GPU yet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .numeric import divide, narrow, square_root, widen
from .reducing_rules import REDUCING_RULES
from .stored import pointer

# Columns of the table: int64 numbers and addresses of a tensor.
COLUMNS = (
    *("param", "step", "row_state", "column_state", "element_state", "tensor_state"),
    *("batch", "rows", "columns", "numel", "cut"),
    *("row_factors", "column_factors", "matrix_factors", "row_sums", "column_sums"),
    *("param_sums", "update_sums", "totals", "counters", "n_items", "n_row_blocks", "n_strips"),
)
FLAT, SMALL, TILES = 0, 1, 2  # how a tensor is cut into items
ITEM = ("tensor", "index", "matrix", "row", "column", "n")
PARAM, STEP, ROW_STATE, COLUMN_STATE, ELEMENT_STATE, TENSOR_STATE = (tl.constexpr(k) for k in range(6))
BATCH, ROWS, N_COLUMNS, NUMEL, CUT = (tl.constexpr(k) for k in range(6, 11))
ROW_FACTORS, COLUMN_FACTORS, MATRIX_FACTORS, ROW_SUMS, COLUMN_SUMS = (tl.constexpr(k) for k in range(11, 16))
PARAM_SUMS, UPDATE_SUMS, TOTALS, COUNTERS, N_ITEMS, N_ROW_BLOCKS, N_STRIPS = (tl.constexpr(k) for k in range(16, 23))
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
def load_grad(grad, index, mask, grad_scale_ptr, GRAD: tl.constexpr, ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr):
    g = load(grad, index, mask, GRAD, ARITHMETIC)
    if grad_scale_ptr is not None:
        g = divide(g, tl.load(grad_scale_ptr).to(ARITHMETIC))
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
    address, begin, n, mean, factors_ptr, LINE: tl.constexpr, s, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr
):
    """The states and factors of ``n`` lines from ``begin`` on; returns the states."""
    lanes = tl.arange(0, LINES)
    state = load(address, begin + lanes, lanes < n, DTYPE, ARITHMETIC)
    state, factor = LINE(mean, state, s)
    store(address, begin + lanes, state, lanes < n, DTYPE)
    tl.store(factors_ptr + begin + lanes, factor, mask=lanes < n)
    return tl.where(lanes < n, state, 0.0)


@triton.jit
def finish_matrix(
    row_ptr, matrix, s, LINE: tl.constexpr, MATRIX: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """The lines of a matrix whose sums are all there."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    n_strips = tl.load(row_ptr + N_STRIPS)
    n_row_blocks = tl.load(row_ptr + N_ROW_BLOCKS)
    lanes = tl.arange(0, LINES)
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
        total += finish_lines(
            tl.load(row_ptr + ROW_STATE), matrix * rows + first, rows - first, mean,
            work(row_ptr, ROW_FACTORS, ARITHMETIC), LINE, s, ROW, ARITHMETIC,
        ).to(tl.float64)  # fmt: skip
        first += LINES
    mean_of_rows = (tl.sum(total, axis=0) / rows.to(tl.float64)).to(ARITHMETIC)
    tl.store(work(row_ptr, MATRIX_FACTORS, ARITHMETIC) + matrix, MATRIX(mean_of_rows, s))
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
        finish_lines(
            tl.load(row_ptr + COLUMN_STATE), matrix * columns + first, columns - first, mean,
            work(row_ptr, COLUMN_FACTORS, ARITHMETIC), LINE, s, COLUMN, ARITHMETIC,
        )  # fmt: skip
        first += LINES


@triton.jit
def sum_small(
    row_ptr, grad, first_matrix, n, grad_scale_ptr, s, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr,
    GRAD: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Several whole small matrices: a lane takes a line, then a matrix."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    lanes = tl.arange(0, LINES)
    first = 0 * rows
    while first < n * rows:
        mask = first + lanes < n * rows
        line = first_matrix * rows + first + lanes
        sums = tl.zeros([LINES], ARITHMETIC)
        k = 0 * columns
        while k < columns:
            g = load_grad(grad, line * columns + k, mask, grad_scale_ptr, GRAD, ARITHMETIC, MAXIMIZE)
            sums += tl.where(mask, SQUARE(g, s), 0.0)
            k += 1
        states = finish_lines(
            tl.load(row_ptr + ROW_STATE), first_matrix * rows + first, n * rows - first,
            divide(sums, columns.to(ARITHMETIC)), work(row_ptr, ROW_FACTORS, ARITHMETIC), LINE, s, ROW, ARITHMETIC,
        )  # fmt: skip
        tl.store(work(row_ptr, ROW_SUMS, ARITHMETIC) + line, states, mask=mask)
        first += LINES
    first = 0 * columns
    while first < n * columns:
        mask = first + lanes < n * columns
        line = first_matrix * columns + first + lanes
        begin = line // columns * rows * columns + line % columns
        sums = tl.zeros([LINES], ARITHMETIC)
        k = 0 * rows
        while k < rows:
            g = load_grad(grad, begin + k * columns, mask, grad_scale_ptr, GRAD, ARITHMETIC, MAXIMIZE)
            sums += tl.where(mask, SQUARE(g, s), 0.0)
            k += 1
        finish_lines(
            tl.load(row_ptr + COLUMN_STATE), first_matrix * columns + first, n * columns - first,
            divide(sums, rows.to(ARITHMETIC)), work(row_ptr, COLUMN_FACTORS, ARITHMETIC), LINE, s, COLUMN, ARITHMETIC,
        )  # fmt: skip
        first += LINES
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
        mean = (total / rows.to(tl.float64)).to(ARITHMETIC)
        tl.store(work(row_ptr, MATRIX_FACTORS, ARITHMETIC) + first_matrix + first + lanes, MATRIX(mean, s), mask=mask)
        first += LINES


@triton.jit
def row_factors(row_ptr, matrix, row, mask, ARITHMETIC: tl.constexpr):
    """The factors of rows, times their matrices'; ``matrix`` and ``row`` are blocks."""
    factor = tl.load(
        work(row_ptr, ROW_FACTORS, ARITHMETIC) + matrix * tl.load(row_ptr + ROWS) + row, mask=mask, other=0.0
    )
    return factor * tl.load(work(row_ptr, MATRIX_FACTORS, ARITHMETIC) + matrix, mask=mask, other=0.0)


@triton.jit
def column_factors(row_ptr, matrix, column, mask, ARITHMETIC: tl.constexpr):
    index = matrix * tl.load(row_ptr + N_COLUMNS) + column
    return tl.load(work(row_ptr, COLUMN_FACTORS, ARITHMETIC) + index, mask=mask, other=0.0)


@triton.jit
def small_factors(row_ptr, i, mask, ARITHMETIC: tl.constexpr):
    """The factors of the elements ``i`` of a tensor."""
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    line = i // columns
    factor = row_factors(row_ptr, line // rows, line % rows, mask, ARITHMETIC)
    return factor * column_factors(row_ptr, line // rows, i % columns, mask, ARITHMETIC)


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
    return tl.load(tl.load(row_ptr + STEP).to(tl.pointer_type(tl.float32))).to(tl.int64) + 1


@triton.jit
def sums_kernel(
    table_ptr, items_ptr, grads_ptr, hyper_ptr, done_ptr, grad_scale_ptr, found_inf_ptr, n_tensors,
    PREPARE: tl.constexpr, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, UPDATE: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:  # the same for all programs and launches
        if tl.load(found_inf_ptr) != 0:
            return
    row_ptr, grad, index, matrix, first_row, first_column, n = open_item(table_ptr, items_ptr, grads_ptr)
    if grad == 0:
        return
    s = PREPARE(hyper_ptr, step_number(row_ptr), ARITHMETIC)
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    cut = tl.load(row_ptr + CUT)
    param = tl.load(row_ptr + PARAM)
    param_sum = tl.zeros([], tl.float64)
    if cut == 2:
        n_strips = tl.load(row_ptr + N_STRIPS)
        n_row_blocks = tl.load(row_ptr + N_ROW_BLOCKS)
        column = first_column + tl.arange(0, TILE_COLUMNS)
        sums = tl.zeros([TILE_COLUMNS], ARITHMETIC)
        row = first_row
        while row < first_row + n:
            row_lanes = row + tl.arange(0, TILE_ROWS)
            row_mask = row_lanes < first_row + n
            mask = row_mask[:, None] & (column < columns)[None, :]
            at = ((matrix * rows + row_lanes) * columns)[:, None] + column[None, :]
            g = load_grad(grad, at, mask, grad_scale_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE)
            square = tl.where(mask, SQUARE(g, s), 0.0)
            sums += tl.sum(square, axis=0)
            strip = first_column // TILE_COLUMNS
            row_sums = work(row_ptr, ROW_SUMS, ARITHMETIC) + (matrix * rows + row_lanes) * n_strips + strip
            tl.store(row_sums, tl.sum(square, axis=1), mask=row_mask)
            p = load(param, at, mask, DTYPES[0], ARITHMETIC)
            param_sum += tl.sum(tl.sum(p * p, axis=1).to(tl.float64), axis=0)
            row += TILE_ROWS
        column_sums = work(row_ptr, COLUMN_SUMS, ARITHMETIC)
        column_sums += (matrix * n_row_blocks + index // n_strips % n_row_blocks) * columns + column
        tl.store(column_sums, sums, mask=column < columns)
        counter_ptr = tl.load(row_ptr + COUNTERS).to(tl.pointer_type(tl.int32)) + 2 + matrix
        if is_last_of(counter_ptr, (n_strips * n_row_blocks).to(tl.int32)):
            finish_matrix(row_ptr, matrix, s, LINE, MATRIX, DTYPES[2], DTYPES[3], ARITHMETIC)
    else:
        begin = first_column
        elements = n
        if cut == 1:
            begin = matrix * rows * columns
            elements = n * rows * columns
            sum_small(
                row_ptr, grad, matrix, n, grad_scale_ptr, s, SQUARE, LINE, MATRIX,
                DTYPES[1], DTYPES[2], DTYPES[3], ARITHMETIC, MAXIMIZE,
            )  # fmt: skip
        at = 0 * n
        while at < elements:
            lanes = at + tl.arange(0, BLOCK)
            p = load(param, begin + lanes, lanes < elements, DTYPES[0], ARITHMETIC)
            param_sum += tl.sum(p * p, axis=0).to(tl.float64)
            at += BLOCK
    tl.store(doubles(row_ptr, PARAM_SUMS) + index, param_sum)
    n_items = tl.load(row_ptr + N_ITEMS)
    if is_last_of(tl.load(row_ptr + COUNTERS).to(tl.pointer_type(tl.int32)), n_items.to(tl.int32)):
        total = add_up(doubles(row_ptr, PARAM_SUMS), n_items, 1)
        rms = square_root(total / tl.load(row_ptr + NUMEL).to(tl.float64))
        tl.store(doubles(row_ptr, TOTALS), rms)
        if DTYPES[5] != "":
            store(tl.load(row_ptr + TENSOR_STATE), 0, rms, None, DTYPES[5])


@triton.jit
def update_kernel(
    table_ptr, items_ptr, grads_ptr, hyper_ptr, done_ptr, grad_scale_ptr, found_inf_ptr, n_tensors,
    PREPARE: tl.constexpr, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, UPDATE: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    row_ptr, grad, index, matrix, first_row, first_column, n = open_item(table_ptr, items_ptr, grads_ptr)
    if grad == 0:
        return
    s = PREPARE(hyper_ptr, step_number(row_ptr), ARITHMETIC)
    rows = tl.load(row_ptr + ROWS)
    columns = tl.load(row_ptr + N_COLUMNS)
    cut = tl.load(row_ptr + CUT)
    total = tl.zeros([], tl.float64)
    if cut == 2:
        column = first_column + tl.arange(0, TILE_COLUMNS)
        of_columns = column_factors(row_ptr, matrix, column, column < columns, ARITHMETIC)
        row = first_row
        while row < first_row + n:
            row_lanes = row + tl.arange(0, TILE_ROWS)
            row_mask = row_lanes < first_row + n
            mask = row_mask[:, None] & (column < columns)[None, :]
            at = ((matrix * rows + row_lanes) * columns)[:, None] + column[None, :]
            g = load_grad(grad, at, mask, grad_scale_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE)
            of_rows = row_factors(row_ptr, matrix + 0 * row_lanes, row_lanes, row_mask, ARITHMETIC)
            factor = of_rows[:, None] * of_columns[None, :]
            direction = tl.where(mask, DIRECTION(g, factor, s), 0.0)
            total += tl.sum(tl.sum(direction * direction, axis=1).to(tl.float64), axis=0)
            row += TILE_ROWS
    else:
        begin = first_column
        elements = n
        if cut == 1:
            begin = matrix * rows * columns
            elements = n * rows * columns
        at = 0 * n
        while at < elements:
            lanes = at + tl.arange(0, BLOCK)
            i = begin + lanes
            mask = lanes < elements
            g = load_grad(grad, i, mask, grad_scale_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE)
            if cut == 1:
                factor = small_factors(row_ptr, i, mask, ARITHMETIC)
            else:  # the states are for the last pass to write
                state = load(tl.load(row_ptr + ROW_STATE), i, mask, DTYPES[2], ARITHMETIC)
                state, factor = LINE(SQUARE(g, s), state, s)
            direction = tl.where(mask, DIRECTION(g, factor, s), 0.0)
            total += tl.sum(direction * direction, axis=0).to(tl.float64)
            at += BLOCK
    tl.store(doubles(row_ptr, UPDATE_SUMS) + index, total)
    n_items = tl.load(row_ptr + N_ITEMS)
    if is_last_of(tl.load(row_ptr + COUNTERS).to(tl.pointer_type(tl.int32)) + 1, n_items.to(tl.int32)):
        sum = add_up(doubles(row_ptr, UPDATE_SUMS), n_items, 1)
        tl.store(doubles(row_ptr, TOTALS) + 1, square_root(sum / tl.load(row_ptr + NUMEL).to(tl.float64)))


@triton.jit
def update_elements(
    row_ptr, at, mask, g, factor, s, f, UPDATE: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr,
):  # fmt: skip
    param = tl.load(row_ptr + PARAM)
    p = load(param, at, mask, DTYPES[0], ARITHMETIC)
    HAS_STATE: tl.constexpr = DTYPES[4] != ""
    if HAS_STATE:
        state = load(tl.load(row_ptr + ELEMENT_STATE), at, mask, DTYPES[4], ARITHMETIC)
        p, state = UPDATE(p, g, factor, state, s, f, True)
        store(tl.load(row_ptr + ELEMENT_STATE), at, state, mask, DTYPES[4])
    else:
        p, _ = UPDATE(p, g, factor, p, s, f, False)
    store(param, at, p, mask, DTYPES[0])


@triton.jit
def apply_kernel(
    table_ptr, items_ptr, grads_ptr, hyper_ptr, done_ptr, grad_scale_ptr, found_inf_ptr, n_tensors,
    PREPARE: tl.constexpr, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, UPDATE: tl.constexpr, DTYPES: tl.constexpr, ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    row_ptr, grad, _, matrix, first_row, first_column, n = open_item(table_ptr, items_ptr, grads_ptr)
    if grad != 0:
        s = PREPARE(hyper_ptr, step_number(row_ptr), ARITHMETIC)
        totals = doubles(row_ptr, TOTALS)
        f = FINISH(s, tl.load(totals), tl.load(totals + 1), ARITHMETIC)
        rows = tl.load(row_ptr + ROWS)
        columns = tl.load(row_ptr + N_COLUMNS)
        cut = tl.load(row_ptr + CUT)
        if cut == 2:
            column = first_column + tl.arange(0, TILE_COLUMNS)
            of_columns = column_factors(row_ptr, matrix, column, column < columns, ARITHMETIC)
            row = first_row
            while row < first_row + n:
                row_lanes = row + tl.arange(0, TILE_ROWS)
                row_mask = row_lanes < first_row + n
                mask = row_mask[:, None] & (column < columns)[None, :]
                at = ((matrix * rows + row_lanes) * columns)[:, None] + column[None, :]
                g = load_grad(grad, at, mask, grad_scale_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE)
                of_rows = row_factors(row_ptr, matrix + 0 * row_lanes, row_lanes, row_mask, ARITHMETIC)
                factor = of_rows[:, None] * of_columns[None, :]
                update_elements(row_ptr, at, mask, g, factor, s, f, UPDATE, DTYPES, ARITHMETIC)
                row += TILE_ROWS
        else:
            begin = first_column
            elements = n
            if cut == 1:
                begin = matrix * rows * columns
                elements = n * rows * columns
            at = 0 * n
            while at < elements:
                lanes = at + tl.arange(0, BLOCK)
                i = begin + lanes
                mask = lanes < elements
                g = load_grad(grad, i, mask, grad_scale_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE)
                if cut == 1:
                    factor = small_factors(row_ptr, i, mask, ARITHMETIC)
                else:
                    state = load(tl.load(row_ptr + ROW_STATE), i, mask, DTYPES[2], ARITHMETIC)
                    state, factor = LINE(SQUARE(g, s), state, s)
                    store(tl.load(row_ptr + ROW_STATE), i, state, mask, DTYPES[2])
                update_elements(row_ptr, i, mask, g, factor, s, f, UPDATE, DTYPES, ARITHMETIC)
                at += BLOCK

    # The last program to come here advances the counters: all have read the steps by then.
    if is_last_of(done_ptr, tl.num_programs(0)):
        first = 0 * n_tensors
        while first < n_tensors:
            tensor = first + tl.arange(0, LINES)
            active = tl.load(grads_ptr + tensor, mask=tensor < n_tensors, other=0) != 0
            address = tl.load(table_ptr + tensor.to(tl.int64) * TABLE_ROW + STEP, mask=active, other=0)
            step_ptr = address.to(tl.pointer_type(tl.float32))
            tl.store(step_ptr, tl.load(step_ptr, mask=active, other=0.0) + 1.0, mask=active)
            first += LINES


KERNELS = (sums_kernel, update_kernel, apply_kernel)


def constants(rule: str, dtypes: tuple[str, ...], maximize: bool, interpreted: bool) -> dict:
    """The compile-time arguments of the kernels.

    ``dtypes`` of param, grad, the state of rows or flat elements, that of columns, of each element and of the tensor:
    "fp32", "bf16" and so on; "" for an absent one.
    """
    functions = REDUCING_RULES[rule]
    names = ("prepare", "square", "line", "matrix", "direction", "finish", "update")
    rows, columns = tile(interpreted)
    return {
        **{name.upper(): getattr(functions, name) for name in names},
        "DTYPES": dtypes,
        "ARITHMETIC": tl.float64 if dtypes[0] == "fp64" else tl.float32,
        "MAXIMIZE": maximize,
        "TILE_ROWS": rows,
        "TILE_COLUMNS": columns,
        "BLOCK": 16_384 if interpreted else 2048,
    }


def tile(interpreted: bool) -> tuple[int, int]:
    """Rows and columns that a program takes at a time; in the interpreter many, because each time costs the same."""
    return (128, 128) if interpreted else (16, 128)


def launch(
    rule: str,
    dtypes: tuple[str, ...],
    maximize: bool,
    table: Tensor,
    items: Tensor,
    grads: Tensor,
    hyper: Tensor,
    done: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> int:
    """Queue one update of the tensors of ``table``, all of which have the same dtypes; returns the number of launches.

    Args:
        rule: its name in `REDUCING_RULES`.
        dtypes: as of `constants`.
        maximize: whether gradients are negated.
        table: int64, (tensors, len(COLUMNS)).
        items: int64, (programs, len(ITEM)).
        grads: int64, (tensors,): addresses of the gradients, 0 for tensors that take no part.
        hyper: float64: the rule's hyperparameters.
        done: int32, one zero; it is zero again afterwards.
        grad_scale, found_inf: one fp32 number each, or None.
    """
    fixed = constants(rule, dtypes, maximize, table.device.type == "cpu")
    for kernel in KERNELS:
        kernel[(items.shape[0],)](
            *(table, items, grads, hyper, done, grad_scale, found_inf, table.shape[0]),
            **fixed,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return len(KERNELS)
