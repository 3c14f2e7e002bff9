"""The items that the passes of a rule that reduces are launched over: what each program is given and takes.

An item is a part of one tensor, as backends/triton_reducing.py cuts it. No pass over its elements is here, and no sum.
"""

import triton
import triton.language as tl

from .numeric import count_of
from .records import STEP
from .reducing_lines import ITEM_ROW, TABLE_ROW
from .step import ARGUMENTS as STEP_ARGUMENTS

# Those of a launch, in the order in which all passes are given them.
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
