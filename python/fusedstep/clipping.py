"""`clip_grad_norm_`, for gradients whose optimizer is not one of ours."""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from . import checks, layout, shards
from .backends.native import extension_reasons
from .backends.norm import sums
from .exchange import ODD, Exchange, over, refuse_other_parts
from .gradients import raise_nonfinite


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients of parameters in place so that the norm of all of them together is at most ``max_norm``.

    Takes the place of ``torch.nn.utils.clip_grad_norm_``: on the CPU one pass reads all gradients for their norm, and
    one scales them, which is left out if they are within the limit. Gradients on other devices, sparse ones, other
    orders of the norm and ``foreach=False`` are torch's own function's.

    The norm of DTensors is that of the whole gradients, also beside plain ones and on several meshes: every process
    must call it with the same parameters, whether they have gradients there or not.

    An optimizer of this package does not need it: its option ``max_grad_norm`` clips within the step.

    Args:
        parameters: a tensor or tensors, whose gradients are clipped where there are any.
        max_norm: the limit, in the units of a gradient.
        norm_type: order of the norm; 2 and infinity have a fast way.
        error_if_nonfinite: raise if the norm is not finite.
        foreach: as in torch.

    Returns:
        The norm before clipping.

    Raises:
        RuntimeError: the norm is not finite, with ``error_if_nonfinite``, or a gradient is not shared out to processes
            as its parameter is; nothing is changed then.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=3,
            )
    grads = [param.grad for param in parameters if param.grad is not None]
    order = float(norm_type)
    if order in (2.0, math.inf) and any(map(shards.is_sharded, parameters)):
        return _clip_parts(parameters, float(max_norm), order, error_if_nonfinite)
    found = None
    if grads and foreach is not False and order in (2.0, math.inf) and not extension_reasons():
        from . import _C

        threads = torch.get_num_threads()
        if not any(map(layout.is_wrapper, grads)):
            found = _C.cpu_sums(grads, 1.0, threads)
    if found is None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    sum_of_squares, max_abs = found
    norm = max_abs if order == math.inf else math.sqrt(sum_of_squares)
    if error_if_nonfinite and not math.isfinite(norm):
        raise_nonfinite(order)
    coefficient = float(max_norm) / (norm + 1e-6)
    if not coefficient >= 1.0:  # NaN too
        _C.cpu_scale(grads, coefficient, threads)
    return torch.tensor(norm, dtype=functools.reduce(torch.promote_types, {grad.dtype for grad in grads}))


def _clip_parts(parameters: list[Tensor], max_norm: float, order: float, error_if_nonfinite: bool) -> Tensor:
    """The same where processes have parts of the gradients; the host waits for the device only if it may raise."""
    sharers, by_max_abs = Exchange(parameters), order == math.inf
    parts: list[tuple[Tensor, Tensor]] = []  # a gradient, and its part
    numbers = sharers.numbers()
    for index, param in enumerate(parameters):
        if param.grad is not None:
            refuse_other_parts(
                "clip_grad_norm_", "the gradient", param.grad, param, checks.describe(index, None, param)
            )
            part = layout.local(param.grad)
            parts.append((param.grad, part))
            sharers.add(numbers, over(param), *sums([part], None, part.device), by_max_abs)
    sharers.share(numbers, by_max_abs)
    if by_max_abs:
        norm = torch.where(numbers[ODD] > 0, math.nan, numbers[:ODD].amax())
    else:
        norm = numbers[:ODD].sum().sqrt()
    if error_if_nonfinite and not math.isfinite(norm.item()):
        raise_nonfinite(order)
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad, part in parts:
        part.mul_(coefficient.to(part.device, torch.promote_types(part.dtype, torch.float32)))
        if part is not grad:
            torch.autograd.graph.increment_version(grad)
    if not parts:
        return norm.float()
    return norm.to(functools.reduce(torch.promote_types, {grad.dtype for grad, _ in parts}))
