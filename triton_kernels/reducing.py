"""The kernels for rules that reduce, generic over rules: csrc/cuda/reducing.cuh in Triton.

Launches over the same items: sums of squares by rows and columns; sum of the squares of the update, if the rule asks
for it; apply. The last program to come to the end of a matrix or tensor adds up what all have left in memory, in a
fixed order.

They have run under Triton's interpreter and compile for sm_90; they have never run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launching import Prepared
from .numeric import FP64, NONE, count_of, narrow, next_counter, square_root, widen
from .reducing_lines import (
    AVERAGE,
    COLUMN_SUMS,
    COPY,
    COUNTERS,
    CUT,
    ELEMENT_STATE,
    ITEM_ROW,
    LINES,
    N_COLUMNS,
    N_ITEMS,
    N_ROW_BLOCKS,
    N_STRIPS,
    NUMEL,
    PARAM,
    PARAM_SUMS,
    ROW_STATE,
    ROW_SUMS,
    ROWS,
    STEP,
    TABLE_ROW,
    TENSOR_STATE,
    TOTALS,
    UPDATE_SUMS,
    add_up,
    column_factors,
    doubles,
    finish_matrix,
    is_last_of,
    load,
    load_grad,
    small_factors,
    store,
    sum_small,
    tile_factors,
    work,
)
from .reducing_rules import REDUCING_RULES
from .step import ARGUMENTS as STEP_ARGUMENTS
from .step import block_size, is_interpreted

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


@triton.jit(do_not_specialize=ARGUMENTS)
def sums_kernel(
    table_ptr, items_ptr, grads_ptr, hyper_ptr, done_ptr, grad_scale_ptr, found_inf_ptr, coefficient_ptr,
    average_weight_ptr, n_tensors,
    PREPARE: tl.constexpr, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, UPDATE: tl.constexpr, PARAM_SUM: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, LEFT: tl.constexpr, FOLLOWERS: tl.constexpr,
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
            g = load_grad(grad, at, mask, grad_scale_ptr, coefficient_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE, "")
            square = tl.where(mask, SQUARE(g, s), 0.0)
            if DTYPES[3] != NONE:
                sums += tl.sum(square, axis=0)
            if DTYPES[2] != NONE:
                strip = first_column // TILE_COLUMNS
                row_sums = work(row_ptr, ROW_SUMS, ARITHMETIC) + (matrix * rows + row_lanes) * n_strips + strip
                tl.store(row_sums, tl.sum(square, axis=1), mask=row_mask)
            if PARAM_SUM:
                p = load(param, at, mask, DTYPES[0], ARITHMETIC)
                param_sum += tl.sum(tl.sum(p * p, axis=1).to(tl.float64), axis=0)
            row += TILE_ROWS
        if DTYPES[3] != NONE:
            column_sums = work(row_ptr, COLUMN_SUMS, ARITHMETIC)
            column_sums += (matrix * n_row_blocks + index // n_strips % n_row_blocks) * columns + column
            tl.store(column_sums, sums, mask=column < columns)
        counter_ptr = tl.load(row_ptr + COUNTERS).to(tl.pointer_type(tl.int32)) + 2 + matrix
        if is_last_of(counter_ptr, (n_strips * n_row_blocks).to(tl.int32)):
            finish_matrix(row_ptr, matrix, s, LINE, MATRIX, DTYPES, ARITHMETIC)
    else:
        begin = first_column
        elements = n
        if cut == 1:
            begin = matrix * rows * columns
            elements = n * rows * columns
            sum_small(
                row_ptr, grad, matrix, n, grad_scale_ptr, coefficient_ptr, s,
                SQUARE, LINE, MATRIX, DTYPES, ARITHMETIC, MAXIMIZE,
            )  # fmt: skip
        if PARAM_SUM:
            at = 0 * n
            while at < elements:
                lanes = at + tl.arange(0, BLOCK)
                p = load(param, begin + lanes, lanes < elements, DTYPES[0], ARITHMETIC)
                param_sum += tl.sum(p * p, axis=0).to(tl.float64)
                at += BLOCK
    if PARAM_SUM:
        tl.store(doubles(row_ptr, PARAM_SUMS) + index, param_sum)
        n_items = tl.load(row_ptr + N_ITEMS)
        if is_last_of(tl.load(row_ptr + COUNTERS).to(tl.pointer_type(tl.int32)), n_items.to(tl.int32)):
            total = add_up(doubles(row_ptr, PARAM_SUMS), n_items, 1)
            rms = square_root(total / tl.load(row_ptr + NUMEL).to(tl.float64))
            tl.store(doubles(row_ptr, TOTALS), rms)
            if DTYPES[5] != NONE:
                store(tl.load(row_ptr + TENSOR_STATE), 0, rms, None, DTYPES[5])


@triton.jit(do_not_specialize=ARGUMENTS)
def update_kernel(
    table_ptr, items_ptr, grads_ptr, hyper_ptr, done_ptr, grad_scale_ptr, found_inf_ptr, coefficient_ptr,
    average_weight_ptr, n_tensors,
    PREPARE: tl.constexpr, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, UPDATE: tl.constexpr, PARAM_SUM: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, LEFT: tl.constexpr, FOLLOWERS: tl.constexpr,
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
        of_columns = column_factors(row_ptr, matrix, column, columns, False, DTYPES, ARITHMETIC)
        row = first_row
        while row < first_row + n:
            row_lanes = row + tl.arange(0, TILE_ROWS)
            row_mask = row_lanes < first_row + n
            mask = row_mask[:, None] & (column < columns)[None, :]
            at = ((matrix * rows + row_lanes) * columns)[:, None] + column[None, :]
            g = load_grad(grad, at, mask, grad_scale_ptr, coefficient_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE, "")
            factor = tile_factors(row_ptr, matrix, row_lanes, row_mask, of_columns, False, MATRIX, DTYPES, ARITHMETIC)
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
            g = load_grad(grad, i, mask, grad_scale_ptr, coefficient_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE, "")
            if cut == 1:
                factor = small_factors(row_ptr, i, mask, False, MATRIX, DTYPES, ARITHMETIC)
            else:  # the states are for the last pass to write
                state = load(tl.load(row_ptr + ROW_STATE), i, mask, DTYPES[2], ARITHMETIC)
                _unused, _unused, factor, _unused = LINE(SQUARE(g, s), state, state, s)
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
    row_ptr, at, mask, g, factor, factor2, s, f, UPDATE: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    param = tl.load(row_ptr + PARAM)
    p = load(param, at, mask, DTYPES[0], ARITHMETIC)
    HAS_STATE: tl.constexpr = DTYPES[4] != NONE
    if HAS_STATE:
        state = load(tl.load(row_ptr + ELEMENT_STATE), at, mask, DTYPES[4], ARITHMETIC)
        p, state = UPDATE(p, g, factor, factor2, state, s, f, True)
        store(tl.load(row_ptr + ELEMENT_STATE), at, state, mask, DTYPES[4])
    else:
        p, _ = UPDATE(p, g, factor, factor2, p, s, f, False)
    store(param, at, p, mask, DTYPES[0])
    return widen(narrow(p, DTYPES[0]), DTYPES[0], ARITHMETIC)  # as it is stored


@triton.jit
def follow(row_ptr, at, mask, p, average_weight_ptr, ARITHMETIC: tl.constexpr, FOLLOWERS: tl.constexpr):
    """Update the average and the copy of parameters ``p``."""
    if FOLLOWERS[0] != NONE:
        average = load(tl.load(row_ptr + AVERAGE), at, mask, FOLLOWERS[0], ARITHMETIC)
        average = average + tl.load(average_weight_ptr).to(ARITHMETIC) * (p - average)
        store(tl.load(row_ptr + AVERAGE), at, average, mask, FOLLOWERS[0])
    if FOLLOWERS[1] != NONE:
        store(tl.load(row_ptr + COPY), at, p, mask, FOLLOWERS[1])


@triton.jit
def zero_item(
    table_ptr, items_ptr, grads_ptr, GRAD: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is left of a step that is skipped: zeros in the gradient."""
    row_ptr, grad, _, matrix, first_row, first_column, n = open_item(table_ptr, items_ptr, grads_ptr)
    if grad != 0:
        rows = tl.load(row_ptr + ROWS)
        columns = tl.load(row_ptr + N_COLUMNS)
        cut = tl.load(row_ptr + CUT)
        if cut == 2:
            column = first_column + tl.arange(0, TILE_COLUMNS)
            row = first_row
            while row < first_row + n:
                row_lanes = row + tl.arange(0, TILE_ROWS)
                mask = (row_lanes < first_row + n)[:, None] & (column < columns)[None, :]
                at = ((matrix * rows + row_lanes) * columns)[:, None] + column[None, :]
                store(grad, at, tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32), mask, GRAD)
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
                store(grad, begin + lanes, tl.zeros([BLOCK], tl.float32), lanes < elements, GRAD)
                at += BLOCK


@triton.jit(do_not_specialize=ARGUMENTS)
def apply_kernel(
    table_ptr, items_ptr, grads_ptr, hyper_ptr, done_ptr, grad_scale_ptr, found_inf_ptr, coefficient_ptr,
    average_weight_ptr, n_tensors,
    PREPARE: tl.constexpr, SQUARE: tl.constexpr, LINE: tl.constexpr, MATRIX: tl.constexpr, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, UPDATE: tl.constexpr, PARAM_SUM: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr, MAXIMIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, LEFT: tl.constexpr, FOLLOWERS: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            if LEFT == "zero":
                zero_item(table_ptr, items_ptr, grads_ptr, DTYPES[1], TILE_ROWS, TILE_COLUMNS, BLOCK)
            return
    row_ptr, grad, _, matrix, first_row, first_column, n = open_item(table_ptr, items_ptr, grads_ptr)
    if grad != 0:
        s = PREPARE(hyper_ptr, step_number(row_ptr), ARITHMETIC)
        totals = doubles(row_ptr, TOTALS)
        f = FINISH(s, tl.load(totals), tl.load(totals + 1), ARITHMETIC)
        TWO: tl.constexpr = DTYPES[6] != NONE or DTYPES[7] != NONE  # states and factors of a line
        rows = tl.load(row_ptr + ROWS)
        columns = tl.load(row_ptr + N_COLUMNS)
        cut = tl.load(row_ptr + CUT)
        if cut == 2:
            column = first_column + tl.arange(0, TILE_COLUMNS)
            of_columns = column_factors(row_ptr, matrix, column, columns, False, DTYPES, ARITHMETIC)
            of_columns2 = column_factors(row_ptr, matrix, column, columns, TWO, DTYPES, ARITHMETIC)
            row = first_row
            while row < first_row + n:
                row_lanes = row + tl.arange(0, TILE_ROWS)
                row_mask = row_lanes < first_row + n
                mask = row_mask[:, None] & (column < columns)[None, :]
                at = ((matrix * rows + row_lanes) * columns)[:, None] + column[None, :]
                g = load_grad(grad, at, mask, grad_scale_ptr, coefficient_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE, LEFT)
                factor = tile_factors(
                    row_ptr, matrix, row_lanes, row_mask, of_columns, False, MATRIX, DTYPES, ARITHMETIC
                )
                factor2 = tile_factors(
                    row_ptr, matrix, row_lanes, row_mask, of_columns2, TWO, MATRIX, DTYPES, ARITHMETIC
                )
                p = update_elements(row_ptr, at, mask, g, factor, factor2, s, f, UPDATE, DTYPES, ARITHMETIC)
                follow(row_ptr, at, mask, p, average_weight_ptr, ARITHMETIC, FOLLOWERS)
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
                g = load_grad(grad, i, mask, grad_scale_ptr, coefficient_ptr, DTYPES[1], ARITHMETIC, MAXIMIZE, LEFT)
                factor = tl.zeros([BLOCK], ARITHMETIC)
                factor2 = factor
                if cut == 1:
                    factor = small_factors(row_ptr, i, mask, False, MATRIX, DTYPES, ARITHMETIC)
                    factor2 = small_factors(row_ptr, i, mask, TWO, MATRIX, DTYPES, ARITHMETIC)
                elif not TWO:
                    state = load(tl.load(row_ptr + ROW_STATE), i, mask, DTYPES[2], ARITHMETIC)
                    state, _unused, factor, factor2 = LINE(SQUARE(g, s), state, state, s)
                    store(tl.load(row_ptr + ROW_STATE), i, state, mask, DTYPES[2])
                p = update_elements(row_ptr, i, mask, g, factor, factor2, s, f, UPDATE, DTYPES, ARITHMETIC)
                follow(row_ptr, i, mask, p, average_weight_ptr, ARITHMETIC, FOLLOWERS)
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


def kernels_of(rule: str) -> tuple[triton.JITFunction, ...]:
    """The launches of a step."""
    return (sums_kernel, update_kernel, apply_kernel) if REDUCING_RULES[rule].direction else (sums_kernel, apply_kernel)


def constants(
    rule: str, dtypes: tuple[int, ...], followers: tuple[int, int], maximize: bool, left: str
) -> dict[str, Any]:
    """The compile-time arguments of the kernels.

    ``dtypes`` of param, grad, the state of rows or flat elements, that of columns, of each element and of the tensor,
    the second states of rows and of columns, as numeric.py counts them; NONE for an absent one. The others:
    as in step.py.
    """
    functions = REDUCING_RULES[rule]
    names = ("prepare", "square", "line", "matrix", "direction", "finish", "update")
    rows, columns = tile()
    return {
        **{name.upper(): getattr(functions, name) for name in names},
        "PARAM_SUM": functions.param_sum,
        "DTYPES": dtypes,
        "ARITHMETIC": tl.float64 if dtypes[0] == FP64.value else tl.float32,
        "MAXIMIZE": maximize,
        "TILE_ROWS": rows,
        "TILE_COLUMNS": columns,
        "BLOCK": block_size(),
        "LEFT": left,
        "FOLLOWERS": followers,
    }


def tile() -> tuple[int, int]:
    """Rows and columns that a program takes at a time; in the interpreter many, because each time costs the same."""
    return (128, 128) if is_interpreted() else (16, 128)


def prepare(rule: str, *args: Any) -> list[Prepared]:
    """The kernels of a step, in order, with the arguments that `constants` takes. A launch is given:

    table: int64, (tensors, len(COLUMNS)).
    items: int64, (programs, len(ITEM)).
    and from the third on what step.py's kernel is given.
    """
    fixed = constants(rule, *args)
    return [Prepared(kernel, fixed) for kernel in kernels_of(rule)]
