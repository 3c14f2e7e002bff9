"""A step of a rule that reduces, as launches: csrc/cuda/reducing.cuh in Triton. Which kernels, compiled for what.

Launches over the same items: sums of squares by rows and columns (reducing_sums.py); sum of the squares of the update,
if the rule asks for it (reducing_update.py); apply (reducing_apply.py). The last program to come to the end of a matrix
or tensor adds up what all have left in memory, in a fixed order. What runs on the GPU is in those files, not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from . import binding
from .binding import bound
from .launching import Prepared
from .numeric import FP32, FP64, NONE
from .reducing_apply import apply_kernel
from .reducing_sums import sums_kernel
from .reducing_update import update_kernel
from .step import block_size, is_interpreted, register_limit

if TYPE_CHECKING:
    from ..rule import Rule


def kernels_of(rule: type[Rule]) -> tuple[triton.JITFunction, ...]:
    """The launches of a step."""
    return (sums_kernel, update_kernel, apply_kernel) if rule.direction else (sums_kernel, apply_kernel)


def constants(
    rule: type[Rule], dtypes: tuple[int, ...], followers: tuple[int, int], maximize: bool, left: str
) -> dict[str, Any]:
    """The compile-time arguments of the kernels.

    ``dtypes`` of param, grad, the state of rows or flat elements, that of columns, of each element and of the tensor,
    the second states of rows and of columns, as numeric.py counts them; NONE for an absent one. The others:
    as in step.py.
    """
    functions = {name: getattr(rule, name) for name in ("square", "line", "matrix", "direction", "update")}
    sub, rows, width = tile(dtypes[1])
    return {
        **{name.upper(): None if function is None else bound(function) for name, function in functions.items()},
        "PREPARE": binding.prepare(rule),
        "FINISH": None if rule.finish is None else binding.finish(rule),
        "HAS": rule.has(dtypes[4] != NONE.value for _ in rule.names_of("element")),
        "PARAM_SUM": rule.finish is not None,
        "DTYPES": dtypes,
        "ARITHMETIC": tl.float64 if dtypes[0] == FP64.value else tl.float32,
        "MAXIMIZE": maximize,
        "SUB": sub,
        "TILE_ROWS": rows,
        "WIDTH": width,
        "BLOCK": block_size() // 2,
        "GRAD_AFTER": left,
        "FOLLOWERS": followers,
    }


def tile(grad: int) -> tuple[int, int, int]:
    """The pieces, rows and columns of a piece that a program takes at a time, by the dtype of the gradient.

    In the interpreter each time costs the same, hence many.
    """
    if is_interpreted():
        return 1, 128, 128
    return {FP32.value: (4, 8, 128), FP64.value: (4, 8, 64)}.get(grad, (2, 8, 256))


def prepare(rule: type[Rule], *args: Any) -> list[Prepared]:
    """The kernels of a step, in order, with the arguments that `constants` takes. A launch is given:

    table: int64, (tensors, TABLE_ROW): records, and what reducing_lines.COLUMNS names.
    items: int64, (programs, len(ITEM)).
    and from the third on what step.py's kernel is given.
    """
    fixed = constants(rule, *args)
    return [
        Prepared(kernel, fixed, **register_limit(3 if kernel is update_kernel else 2)) for kernel in kernels_of(rule)
    ]
