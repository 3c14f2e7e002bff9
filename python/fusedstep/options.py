"""Options that every optimizer takes beside those of its rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, beside those of its rule.

    Args:
        backend: "auto" (default), "cuda", "triton", "cpu" or "reference".
        max_grad_norm: the norm of all gradients together, of all groups, is brought down to this (0 or larger, in the
            units of a gradient), as ``torch.nn.utils.clip_grad_norm_`` does before a step; ``.grad`` is not written.
            None: gradients are not clipped. ``optimizer.grad_norm`` is the norm that was found.
        norm_type: 2 (default) or infinity, for the largest absolute value.
        error_if_nonfinite: raise RuntimeError if the norm is not finite, before anything is written. This waits for
            the device.
        skip_nonfinite: skip the step if the norm is not finite: no parameter, state or counter changes.
        write_grads: leave in ``.grad`` the gradient that the rule has used, unscaled and clipped.
        zero_grads: leave zeros in ``.grad``, set in the pass that read it. In a skipped step too, or a non-finite
            gradient would stay for ever.
        ema_decay: in [0, 1): keep an average of each parameter, ``ema = ema_decay * ema + (1 - ema_decay) * param``
            after each of its steps, which begins as the parameter before the first one. It is the state "ema" of the
            parameter, in fp32 or wider; ``with optimizer.swap_ema():`` puts the averages in the parameters' place.
        weights_copy: torch.bfloat16 or torch.float16: each step writes the parameter in that dtype too, rounded to
            nearest even, into ``optimizer.copies[param]``.

    Raises:
        ValueError, TypeError: an option is out of range or contradicts another one.
    """

    backend: str | None
    max_grad_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    skip_nonfinite: bool
    write_grads: bool
    zero_grads: bool
    ema_decay: float | None
    weights_copy: torch.dtype | None
