"""Blocks of elements of a tensor whose rule reduces: where they lie, and what is loaded from and stored to them.

A tile has three dimensions: SUB pieces side by side, TILE_ROWS rows, and the WIDTH columns of a piece, which are 16
bytes for each thread of a warp. So a warp takes whole rows: sums along rows need no other warp, and sums along columns
are kept for each warp until its last tile.
"""

import triton
import triton.language as tl

from .numeric import NONE, narrow, widen
from .reducing_lines import COLUMN_FACTORS, MATRIX_FACTORS, ROW_FACTORS, second_factors, work
from .stored import pointer


@triton.jit
def load(address, begin, lanes, mask, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr, WIDE: tl.constexpr):
    """Elements ``begin + lanes``; WIDE: ``begin`` lies at a multiple of 16 bytes."""
    ptr = pointer(address, DTYPE) + begin
    if WIDE:
        ptr = tl.multiple_of(ptr, 16)
    return widen(tl.load(ptr + lanes, mask=mask, other=0), DTYPE, ARITHMETIC)


@triton.jit
def store(address, begin, lanes, x, mask, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    ptr = pointer(address, DTYPE) + begin
    if WIDE:
        ptr = tl.multiple_of(ptr, 16)
    tl.store(ptr + lanes, narrow(x, DTYPE), mask=mask)


@triton.jit
def is_wide(columns, addresses):
    """Whether rows of a matrix, and all that lies at ``addresses`` (or'ed), can be accessed 16 bytes at a time."""
    return (columns % 8 == 0) & (addresses % 16 == 0)


@triton.jit
def tile_lanes(columns, first_column, SUB: tl.constexpr, TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The rows and columns of a tile at ``first_column``, offsets of its elements, and which columns exist."""
    row = tl.arange(0, TILE_ROWS)[None, :, None]
    column = tl.arange(0, SUB)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    stride = columns.to(tl.int32)  # an item has one row where there are too many columns for this
    left = tl.minimum(columns - first_column, SUB * WIDTH).to(tl.int32)
    if WIDE:
        stride = tl.multiple_of(stride, 8)
        left = tl.multiple_of(left, 8)
    return row, column, row * stride + column, column < left


@triton.jit
def tile_column_factors(
    row_ptr, matrix, columns, first_column, column, mask, SECOND: tl.constexpr, DTYPES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """Those of a tile's columns; of a rule without any, ones."""
    factor = tl.full([1, 1, 1], 1, ARITHMETIC)
    if DTYPES[3] != NONE:
        factors_ptr = work(row_ptr, COLUMN_FACTORS, ARITHMETIC) + matrix * columns + first_column
        if SECOND:
            factors_ptr += second_factors(row_ptr, True)
        factor = tl.load(factors_ptr + column, mask=mask, other=0.0)
    return factor


@triton.jit
def tile_row_factors(row_ptr, matrix, rows, SECOND: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Where those of a matrix' rows begin."""
    factors_ptr = work(row_ptr, ROW_FACTORS, ARITHMETIC) + matrix * rows
    if SECOND:
        factors_ptr += second_factors(row_ptr, False)
    return factors_ptr


@triton.jit
def matrix_factor(row_ptr, matrix, ARITHMETIC: tl.constexpr):
    """What the factors of a matrix' rows are multiplied with, where there is such a thing."""
    return tl.load(work(row_ptr, MATRIX_FACTORS, ARITHMETIC) + matrix)


@triton.jit
def tile_factors(rows_ptr, row, mask, of_matrix, of_columns, DTYPES: tl.constexpr):
    """The factors of a tile's elements, as a block that has one row or one column where they are the same."""
    factor = of_columns
    if DTYPES[2] != NONE:
        factor = tl.load(rows_ptr + row, mask=mask, other=0.0)
        if of_matrix is not None:
            factor = factor * of_matrix
        if DTYPES[3] != NONE:
            factor = factor * of_columns
    return factor


@triton.jit
def total_of(x):
    """The sum of all numbers of a tile in float64."""
    return tl.sum(tl.sum(tl.sum(x.to(tl.float64), axis=0), axis=1), axis=0)
