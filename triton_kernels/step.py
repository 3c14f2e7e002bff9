"""The one kernel, generic over rules: each program takes a chunk of one tensor, found through a table of addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from . import binding
from .launching import Prepared
from .numeric import FP16, FP64, I8, NONE, changed, count_of, load_number, next_counter
from .records import RECORD, STEP
from .stored import load, load_states, load_weight, open_row, store, store_states, store_weight

if TYPE_CHECKING:
    from ..rule import Rule

CHUNK_ROW = 3  # of a chunk: tensor, elements, offset
ARGUMENTS = (  # those of a launch
    *("table_ptr", "chunks_ptr", "grads_ptr", "hyper_ptr", "done_ptr", "grad_scale_ptr", "found_inf_ptr"),
    *("coefficient_ptr", "average_weight_ptr", "n_tensors"),
)


@triton.jit
def update_block(
    row,
    grad,
    begin,
    lanes,
    mask,
    scale,
    coefficient,
    average_weight,
    step,
    s,
    UPDATE: tl.constexpr,
    HAS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATES: tl.constexpr,
    CODED: tl.constexpr,
    FORMAT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    GRAD_AFTER: tl.constexpr,
    FOLLOWERS: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements ``begin + lanes`` of one tensor; UNMASKED: all exist, and ``begin`` lies at a multiple of 16 bytes.

    Only with that promise are the accesses 16 bytes wide.
    """
    p = load_weight(row, begin, lanes, mask, PARAM, FORMAT, ARITHMETIC, UNMASKED)
    g = load(grad, begin, lanes, mask, GRAD, ARITHMETIC, UNMASKED)
    states = load_states(row, p, begin, lanes, mask, STATES, ARITHMETIC, UNMASKED, BLOCK)
    average = p  # stands in for an absent one
    if FOLLOWERS[0] != NONE:
        average = load(row.average, begin, lanes, mask, FOLLOWERS[0], ARITHMETIC, UNMASKED)
    # A thread may store what another has yet to load: loads and stores of the same memory may be shared out to threads
    # in different ways. What is stored depends on what was loaded there, element by element, but for the gradient and
    # for codes, whose blocks share a scale.
    if GRAD_AFTER != "" or CODED:
        tl.debug_barrier()
    g = changed(g, scale, coefficient)
    if GRAD_AFTER == "zero":
        store(grad, begin, lanes, mask, tl.zeros_like(g), GRAD, UNMASKED)
    if GRAD_AFTER == "changed":
        store(grad, begin, lanes, mask, g, GRAD, UNMASKED)
    if MAXIMIZE:
        g = -g
    updated = UPDATE(p, g, *states, s, HAS)
    p = store_weight(row, begin, lanes, mask, updated[0], step, PARAM, FORMAT, ARITHMETIC, UNMASKED, BLOCK)
    if FOLLOWERS[0] != NONE:
        average = average + average_weight * (p - average)
        store(row.average, begin, lanes, mask, average, FOLLOWERS[0], UNMASKED)
    if FOLLOWERS[1] != NONE:
        store(row.copy, begin, lanes, mask, p, FOLLOWERS[1], UNMASKED)
    store_states(row, begin, lanes, mask, updated[1:], STATES, UNMASKED, BLOCK)


@triton.jit
def zero_chunk(chunk_ptr, grads_ptr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """What is left of a step that is skipped: zeros in the gradient."""
    n = tl.load(chunk_ptr + 1).to(tl.int32)
    offset = tl.load(chunk_ptr + 2)
    grad = tl.load(grads_ptr + tl.load(chunk_ptr))
    if grad != 0:
        start = 0 * n
        while start < n:
            lanes = start + tl.arange(0, BLOCK)
            store(grad, offset, lanes, lanes < n, tl.zeros([BLOCK], tl.float32), GRAD, False)
            start += BLOCK


@triton.jit(do_not_specialize=ARGUMENTS)
def step_kernel(
    table_ptr,
    chunks_ptr,
    grads_ptr,
    hyper_ptr,
    done_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    coefficient_ptr,
    average_weight_ptr,
    n_tensors,
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    HAS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATES: tl.constexpr,
    CODED: tl.constexpr,
    FORMAT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    GRAD_AFTER: tl.constexpr,
    FOLLOWERS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK_ROW: tl.constexpr,
):
    if found_inf_ptr is not None:  # the same for all programs: nothing is written, nothing is counted
        if tl.load(found_inf_ptr) != 0:
            if GRAD_AFTER == "zero":
                zero_chunk(chunks_ptr + tl.program_id(0).to(tl.int64) * CHUNK_ROW, grads_ptr, GRAD, BLOCK)
            return
    chunk_ptr = chunks_ptr + tl.program_id(0).to(tl.int64) * CHUNK_ROW
    tensor = tl.load(chunk_ptr)
    n = tl.load(chunk_ptr + 1).to(tl.int32)
    offset = tl.load(chunk_ptr + 2)
    grad = tl.load(grads_ptr + tensor)
    row_ptr = table_ptr + tensor * RECORD
    if (grad != 0) & (n > 0):
        step_ptr = tl.load(row_ptr + STEP).to(tl.pointer_type(tl.float32))
        step = count_of(tl.load(step_ptr)) + 1
        s = PREPARE(hyper_ptr, step, ARITHMETIC)
        row = open_row(row_ptr, len(STATES))
        scale = None if grad_scale_ptr is None else load_number(grad_scale_ptr, ARITHMETIC)
        coefficient = None if coefficient_ptr is None else load_number(coefficient_ptr, ARITHMETIC)
        average_weight = None if average_weight_ptr is None else load_number(average_weight_ptr, ARITHMETIC)
        addresses = row.param | grad | row.aux  # 0 if there is none
        for k in tl.static_range(len(STATES)):
            addresses = addresses | row.states[k]
        if FOLLOWERS[0] != NONE or FOLLOWERS[1] != NONE:
            addresses = addresses | row.average | row.copy
        whole = 0 * n
        if addresses % 16 == 0:
            whole = n // BLOCK * BLOCK
        start = 0 * n
        lanes = tl.arange(0, BLOCK)
        while start < whole:
            update_block(
                row, grad, offset + start, lanes, None, scale, coefficient, average_weight, step, s,
                UPDATE, HAS, PARAM, GRAD, STATES, CODED, FORMAT, ARITHMETIC, MAXIMIZE, GRAD_AFTER, FOLLOWERS, True,
                BLOCK,
            )  # fmt: skip
            start += BLOCK
        while start < n:
            update_block(
                row, grad, offset + start, lanes, start + lanes < n, scale, coefficient, average_weight, step, s,
                UPDATE, HAS, PARAM, GRAD, STATES, CODED, FORMAT, ARITHMETIC, MAXIMIZE, GRAD_AFTER, FOLLOWERS, False,
                BLOCK,
            )  # fmt: skip
            start += BLOCK

    # The last program to come here advances the counters. The barrier: no thread of this one still has to read a step.
    tl.debug_barrier()
    if tl.atomic_add(done_ptr, 1) == tl.num_programs(0) - 1:
        first = 0 * n_tensors
        while first < n_tensors:
            index = first + tl.arange(0, 256)
            active = tl.load(grads_ptr + index, mask=index < n_tensors, other=0) != 0
            address = tl.load(table_ptr + index.to(tl.int64) * RECORD + STEP, mask=active, other=0)
            step_ptr = address.to(tl.pointer_type(tl.float32))
            tl.store(step_ptr, next_counter(tl.load(step_ptr, mask=active, other=0.0)), mask=active)
            first += 256
        tl.store(done_ptr, 0)


def constants(
    rule: type[Rule],
    dtypes: tuple[int, ...],
    followers: tuple[int, int],
    maximize: bool,
    left: str,
    block: int,
    weight_format: str = "plain",
) -> dict[str, Any]:
    """The compile-time arguments of `step_kernel`.

    ``rule``: the class with its functions.
    ``dtypes`` of param, grad and every state that the rule names, as numeric.py counts them; NONE for an absent
    one.
    ``followers``: of the parameters' averages and copies.
    ``maximize``: whether gradients are negated.
    ``left`` in the gradients: "" for what was there, "zero", or "changed" for what the rule used.
    ``block``: elements that a program updates at a time.
    ``form``: how weights are stored: "plain", "master", "split", "kahan", "stochastic", or "scattered" for a stochastic
    one whose groups of eight elements are none of the whole tensor's.
    """
    param, grad, *states = dtypes
    return {
        "PREPARE": binding.prepare(rule),
        "UPDATE": binding.bound(rule.update),
        "HAS": rule.has(dtype != NONE.value for dtype in states),
        "PARAM": param,
        "GRAD": grad,
        "STATES": tuple(states),
        "CODED": any(dtype >= I8.value for dtype in states),
        "FORMAT": weight_format,
        "ARITHMETIC": tl.float64 if param == FP64.value else tl.float32,
        "MAXIMIZE": maximize,
        "GRAD_AFTER": left,
        "FOLLOWERS": followers,
        "BLOCK": block,
        "CHUNK_ROW": CHUNK_ROW,
    }


def prepare(*args: Any) -> Prepared:
    """The kernel with the arguments that `constants` takes. A launch updates the tensors of ``table``, and is given:

    table: int64, (tensors, RECORD): records.
    chunks: int64, (programs, CHUNK_ROW): which elements each program updates.
    grads: int64, (tensors,): addresses of the gradients, 0 for tensors that take no part.
    hyper: float64: the rule's hyperparameters.
    done: int32, one zero; it is zero again afterwards.
    grad_scale, found_inf: one fp32 number each, or None.
    coefficient: one fp64 number that gradients are multiplied by, or None.
    average_weight: of the parameter in its average, one fp64 number; None where there are no averages.
    n_tensors: the table's.
    """
    fixed = constants(*args)
    _, dtypes, followers, *_ = args
    return Prepared(step_kernel, fixed, **register_limit(3 if is_light(dtypes, followers, fixed["FORMAT"]) else 2))


def is_light(dtypes: tuple[int, ...], followers: tuple[int, int], weight_format: str) -> bool:
    """Whether a thread can keep all that an element has in few registers."""
    fits = all(dtype <= FP16.value for dtype in dtypes) and sum(dtype != NONE.value for dtype in dtypes) < 5
    return fits and weight_format == "plain" and all(dtype == NONE.value for dtype in followers)


def register_limit(programs: int) -> dict[str, int]:
    """The option of a launch that lets a multiprocessor run ``programs`` programs at a time, to hide how far memory is.

    Without it, ways through a kernel that are seldom taken ask for more registers.
    """
    return {} if torch.version.hip else {"maxnreg": 65_536 // (256 * programs) // 8 * 8}


def is_interpreted() -> bool:
    """True if TRITON_INTERPRET was set when the kernels were defined: they run on CPU tensors then."""
    return not isinstance(step_kernel, triton.JITFunction)


def chunk_size(blocks: int) -> int:
    """Elements of one program that takes ``blocks`` blocks; interpreted always few programs."""
    return block_size() * (4 if is_interpreted() else blocks)


def block_size() -> int:
    """Elements that a program updates at a time: two 16-byte accesses of fp32 a thread; interpreted few iterations."""
    return 16384 if is_interpreted() else 2048
