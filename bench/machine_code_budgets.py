"""The kernels that bench/machine_code.py holds against a budget: by which names, and which of the lab's sets it.

A new kernel gets a row here. Nothing is compiled or measured in this file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

SLACK = 1.10  # instructions an element that a kernel may take more than its budget


@dataclasses.dataclass(frozen=True)
class Row:
    """Kernels that do the same work: those whose demangled names match, and the lab's kernel that sets their budget."""

    name: str
    kernel: str  # a regular expression, or "" while the package has none
    lab: str  # another
    read: int  # bytes an element by 16-byte loads
    written: int = 0  # and stores
    beside: int = 0  # bytes a thread by 16-byte loads of what belongs to columns, not to elements
    elements: int = 0  # of a thread on the main path, where that is fixed
    slack: tuple[tuple[int, float], ...] = ()  # (architecture, instead of SLACK there)
    # The share of a copy's speed that the lab's kernel has reached on an H200, and the benchmark's case on a GPU.
    predicted: float | None = None
    case: str = ""


def reducing(name: str, stored: str, beside: str) -> str:
    """The name of a kernel of Adafactor, of tensors or of parts of them."""
    return rf"\b(?:part_)?{name}_kernel<\S*Adafactor<false>, \S*Packed<\S*\b{stored}, float>, \S*\b{beside}>"


def step(kind: int, followed: str = "false") -> str:
    """The name of AdamW's kernel for the format of that index in csrc/cuda/formats.h."""
    return rf"\bstep_kernel<\S*Tile<\S*\bAdam<false>, {kind}, {followed}>, 4000>"


ROWS: tuple[Row, ...] = (
    # On sm_80 alone nvcc makes two kernels of one of the lab's that has 4 numbers a thread, one for each kind of weight
    # decay, of which the shorter one is the budget. With followers the package's also asks which ones there are.
    Row(
        "fp32",
        step(0),
        r"lab::adamw<float, float, float>",
        16,
        12,
        elements=4,
        slack=((80, 1.13),),
        predicted=0.99,
        case="AdamW 10^9 fp32",
    ),
    Row(
        "bf16",
        step(5),
        r"lab::adamw<lab::BF16, lab::BF16, lab::BF16>",
        8,
        6,
        elements=8,
        predicted=0.99,
        case="AdamW 10^9 bf16",
    ),
    Row(
        "fp32, bf16 states",
        step(2),
        r"lab::adamw<float, float, lab::BF16>",
        12,
        8,
        elements=8,
        predicted=0.97,
        case="AdamW 10^9 fp32, bf16 states",
    ),
    Row("fp32, bf16 gradient", step(1), r"lab::adamw<float, lab::BF16, float>", 14, 12, elements=8, predicted=0.93),
    Row(
        "split, fp32 states",
        step(10),
        r"lab::adamw<lab::Split, lab::BF16, float>",
        14,
        12,
        elements=8,
        predicted=0.93,
        case="AdamW 10^9 bf16, split",
    ),
    Row(
        "split, bf16 states",
        step(11),
        r"lab::adamw<lab::Split, lab::BF16, lab::BF16>",
        10,
        8,
        elements=8,
        predicted=0.95,
        case="AdamW 10^9 bf16, split, bf16 states",
    ),
    Row(
        "bf16, 8-bit states",
        step(7),
        r"lab::adamw_8bit<lab::BF16, lab::BF16>",
        4,
        2,
        elements=8,
        predicted=0.82,
        case="AdamW 10^9 bf16, 8-bit states",
    ),
    Row(
        "split, 8-bit states",
        step(12),
        r"lab::adamw_8bit<lab::Split, lab::BF16>",
        6,
        4,
        elements=8,
        predicted=0.86,
        case="AdamW 10^9 bf16, split, 8-bit states",
    ),
    Row(
        "fp32, 8-bit states",
        step(3),
        r"lab::adamw_8bit<float, float>",
        8,
        4,
        elements=8,
        predicted=0.96,
        case="AdamW 10^9 fp32, 8-bit states",
    ),
    Row("fp32, average", step(0, "true"), r"lab::adamw_average<false>", 20, 16, elements=4, slack=((80, 1.14),)),
    Row("fp32, average, zeros", "", r"lab::adamw_average<true>", 20, 20, elements=4),
    Row("norm, fp32", r"norm_kernel<448, false>", r"lab::norm<float>", 4),
    Row("sums, fp32", reducing("sums", "float", "Unchanged"), r"lab::sums<float>", 8),
    Row("sums, bf16", reducing("sums", "BF16", "Unchanged"), r"lab::sums<lab::BF16>", 4),
    Row("squares, fp32", reducing("update", "float", "Unchanged"), r"lab::squares<float>", 4, beside=16),
    Row("squares, bf16", reducing("update", "BF16", "Unchanged"), r"lab::squares<lab::BF16>", 2, beside=32),
    Row("apply, fp32", reducing("apply", "float", "NothingBeside"), r"lab::apply<float>", 8, 4, beside=16),
    Row("apply, bf16", reducing("apply", "BF16", "NothingBeside"), r"lab::apply<lab::BF16>", 4, 2, beside=32),
)


def row_of(name: str, rows: Sequence[Row] = ROWS) -> Row | None:
    """The row of a kernel of the package or of the lab."""
    matches = [row for row in rows if (row.kernel and re.search(row.kernel, name)) or re.search(row.lab, name)]
    return matches[0] if matches else None
