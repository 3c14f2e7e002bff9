"""Pass 3 of a rule that reduces: the update itself, and what follows a parameter; then the steps are counted.

Also what is left to do in a step that is skipped. All sums are known by now: none is made here.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .numeric import NONE, changed, load_number, narrow, next_counter, widen
from .records import AVERAGE, COPY, N_COLUMNS, PARAM, ROWS, STEP
from .reducing_items import ARGUMENTS, open_item, step_number
from .reducing_lines import (
    CUT,
    ELEMENT_STATE,
    LINES,
    ROW_STATE,
    TABLE_ROW,
    TOTALS,
    doubles,
    is_last_of,
    small_factors,
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
def leave(grad, begin, lanes, g, mask, GRAD: tl.constexpr, GRAD_AFTER: tl.constexpr, WIDE: tl.constexpr):
    """What becomes of the gradient in memory, after all threads have loaded it."""
    if GRAD_AFTER != "":
        tl.debug_barrier()
        store(grad, begin, lanes, tl.zeros_like(g) if GRAD_AFTER == "zero" else g, mask, GRAD, WIDE)


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
    MAXIMIZE: tl.constexpr, GRAD_AFTER: tl.constexpr, FOLLOWERS: tl.constexpr, SUB: tl.constexpr,
    TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
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
        leave(grad, begin, lanes, g, mask, DTYPES[1], GRAD_AFTER, WIDE)
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
    BLOCK: tl.constexpr, GRAD_AFTER: tl.constexpr, FOLLOWERS: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            if GRAD_AFTER == "zero":
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
                        UPDATE, HAS, MATRIX, DTYPES, ARITHMETIC, MAXIMIZE, GRAD_AFTER, FOLLOWERS, HALF, TILE_ROWS,
                        WIDTH, True,
                    )  # fmt: skip
                else:
                    apply_tiles(
                        row_ptr, grad, matrix, first_row, column, n, scale, coefficient, average_weight, s, f,
                        UPDATE, HAS, MATRIX, DTYPES, ARITHMETIC, MAXIMIZE, GRAD_AFTER, FOLLOWERS, HALF, TILE_ROWS,
                        WIDTH, False,
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
                leave(grad, begin + at, lanes, g, mask, DTYPES[1], GRAD_AFTER, False)
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
