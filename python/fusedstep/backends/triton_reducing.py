"""What the Triton kernels of rules that reduce need of a plan: a table, items, and memory to work in."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..record import words_of

if TYPE_CHECKING:
    from ..rule import Rule
    from .triton import TritonPlan

SPANS = ("row", "column", "flat", "element", "tensor")
SMALL_MATRIX = 1024  # elements; up to here a program takes several whole matrices
ITEM_ELEMENTS = 16_384
ITEM_ROWS, ROW_BLOCKS = 64, 128  # of a matrix in tiles: rows of an item, or more where these would be too many items
MANY_COLUMNS = 1 << 27  # from here on a program takes one row: offsets within a tile have 32 bits


class Names(NamedTuple):
    """The names of a rule's states by what they belong to; "" for none."""

    row: str
    column: str
    flat: str
    element: str
    tensor: str
    row2: str
    column2: str


@functools.cache
def names_of(rule: type[Rule]) -> Names:
    first, second = ({span: names[n] for span in SPANS if len(names := rule.names_of(span)) > n} for n in (0, 1))
    return Names(*(first.get(span, "") for span in SPANS), *(second.get(span, "") for span in SPANS[:2]))


def dtypes_of(states: dict[str, int], rule: type[Rule], factored: bool) -> tuple[int, ...]:
    """The dtypes of a tensor's states, as the kernels' constants take them."""
    from ..triton_kernels.numeric import NONE

    names = names_of(rule)
    lines = (names.row, names.column) if factored else (names.flat, names.flat)
    return tuple(
        states.get(name, NONE.value) for name in (*lines, names.element, names.tensor, names.row2, names.column2)
    )


class ReducingTable:
    """The table, items and work memory of tensors with the same dtypes. Cuts depend on each tensor's shape alone."""

    def __init__(self, dtypes: tuple[int, ...], indices: list[int], plan: TritonPlan) -> None:
        from ..triton_kernels import reducing, reducing_lines
        from ..triton_kernels.numeric import FP64

        self.size = 8 if dtypes[0] == FP64.value else 4
        sub, _, width = reducing.tile(dtypes[1])
        self.tile_columns = sub * width
        self.bytes = self.counters = 0
        records = plan.native_records()[indices]
        rows = [self._row(plan, record) for record in records]
        self.work = torch.empty(self.bytes, dtype=torch.uint8, device=plan.device)
        self.count = torch.zeros(self.counters, dtype=torch.int32, device=plan.device)
        table = np.zeros((len(rows), len(reducing_lines.COLUMNS)), dtype=np.int64)  # beside the records
        items = []
        for number, row in enumerate(rows):
            for name in reducing_lines.WORK:
                row[name] += self.work.data_ptr()
            row["counters"] = self.count.data_ptr() + 4 * row["counters"]
            table[number] = [row[name] for name in reducing_lines.COLUMNS]
            items += [(number, *item) for item in row["items"]]
        self.table = plan.upload(torch.from_numpy(np.hstack([words_of(records), table])))
        self.items = plan.upload(torch.tensor(items, dtype=torch.int64))

    def _take(self, n: int, size: int) -> int:
        offset = self.bytes
        self.bytes += -(-n * size // 16) * 16
        return offset

    def _row(self, plan: TritonPlan, record: np.void) -> dict:
        """A tensor's row of the table, with offsets for addresses in the work memory, and its items."""
        from ..triton_kernels import reducing_lines

        names = names_of(plan.functions)
        address = dict(zip(plan.optimizer.state_names, record["states"].tolist(), strict=False))
        numel, factored = record["numel"].item(), bool(record["factored"])
        batch, rows, columns = (record[name].item() for name in ("batch", "rows", "columns"))
        n_strips = n_row_blocks = 1
        if not factored:
            cut = reducing_lines.FLAT
            items = [(0, 0, at, min(ITEM_ELEMENTS, numel - at)) for at in range(0, numel, ITEM_ELEMENTS)]
        elif rows * columns <= SMALL_MATRIX:
            cut = reducing_lines.SMALL
            several = max(ITEM_ELEMENTS // max(rows * columns, 1), 1)
            items = [(at, 0, 0, min(several, batch - at)) for at in range(0, batch, several)]
        else:
            cut = reducing_lines.TILES
            wanted = max(ITEM_ROWS, 1 << (-(-rows // ROW_BLOCKS) - 1).bit_length())
            item_rows = min(wanted, rows) if columns < MANY_COLUMNS else 1
            n_row_blocks, n_strips = -(-rows // item_rows), -(-columns // self.tile_columns)
            items = [
                (matrix, row, column, min(item_rows, rows - row))
                for matrix in range(batch)
                for row in range(0, rows, item_rows)
                for column in range(0, columns, self.tile_columns)
            ]
        items = items or [(0, 0, 0, 0)]  # an empty tensor has an RMS and perhaps lines, which are not a number
        factors = 2 if names.row2 or names.column2 else 1
        of_rows = batch * rows if factored and names.row else 0
        of_columns = batch * columns if factored and names.column else 0
        # Two counters for the sums over all items; a matrix has one for each block of rows, each strip, and itself.
        of_matrix = n_row_blocks + n_strips + 1 if cut == reducing_lines.TILES else 0
        counters, self.counters = self.counters, self.counters + 2 + batch * of_matrix
        return {
            "row_state": address.get(names.row if factored else names.flat) or 0,
            "column_state": address.get(names.column) or 0,
            "element_state": address.get(names.element) or 0,
            "tensor_state": address.get(names.tensor) or 0,
            "row_state2": address.get(names.row2) or 0,
            "column_state2": address.get(names.column2) or 0,
            "cut": cut,
            "row_factors": self._take(factors * of_rows, self.size),
            "column_factors": self._take(factors * of_columns, self.size),
            "matrix_factors": self._take(batch if factored else 0, self.size),
            "row_sums": self._take(of_rows * n_strips, self.size),
            "column_sums": self._take(of_columns * n_row_blocks if cut == reducing_lines.TILES else 0, self.size),
            "param_sums": self._take(len(items), 8),
            "update_sums": self._take(len(items), 8),
            "matrix_sums": self._take(batch * n_row_blocks if cut == reducing_lines.TILES else 0, 8),
            "totals": self._take(2, 8),
            "counters": counters,
            "n_items": len(items),
            "n_row_blocks": n_row_blocks,
            "n_strips": n_strips,
            "items": [(number, *item) for number, item in enumerate(items)],
        }
