"""Options that every optimizer takes beside those of its rule."""

from __future__ import annotations

from typing import TypedDict


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
