"""Options that every optimizer takes beside those of its rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import torch


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, beside those of its rule.

    Every optimizer takes every option on every backend; but rules with sums over rows, columns or whole tensors store
    weights and states as they are, and take none of ``state_dtype``, ``master_weights``, ``kahan`` and ``rounding``.
    Options hold for all groups, and another value in a group is an error. 16-bit parameters are bf16 and fp16; others
    are not concerned by ``master_weights``, ``kahan`` and ``rounding``, of which at most one may be chosen.

    Args:
        backend: "auto" (default), "cuda", "triton", "cpu" or "reference".
        state_dtype: what states are stored in. None (default): the parameter's dtype, as torch, or what was loaded;
            fp32 beside master weights. ``torch.float32`` or ``torch.bfloat16``. "8bit" and "4bit": a code of that many
            bits for each number and one fp32 scale (the largest magnitude) for each block of 256 along the memory, as
            ``exp_avg`` and ``exp_avg_scale``. Codes have square root spacing, or fourth root spacing for states that
            are never negative; an infinity or a NaN makes its whole block NaN. Codes of 8 bits are int8, or uint8
            without a sign, in the parameter's shape. Codes of 4 bits (Li et al., arXiv 2309.01507, use other spacings)
            lie two in a uint8, the first in its lower half, in a tensor that has half of the dimension that is
            innermost in memory; where that is odd, in a flat one of (numel + 1) // 2 for a contiguous parameter,
            and in 8 bits for any other. ``torch.optim`` cannot read such states, though it loads them. States of fp64
            and complex parameters keep their dtype, and states whose difference a rule takes the root of (a centered
            variance) are in fp32 at least.
        wide_states: regular expressions, as strings or compiled. With "8bit" and "4bit", the states of parameters that
            one of them is found in the name of stay in fp32, as do those with fewer than 4,096 elements. Default
            ``("emb", "wte", "wpe")``: embeddings by their usual names. A parameter has a name if the optimizer was
            given named parameters.
        master_weights: True keeps an fp32 copy of each 16-bit parameter, ``master_weight`` (4 bytes); "split" keeps the
            lower half of the fp32 number whose upper half the bf16 parameter is, ``weight_remainder`` (2 bytes). Either
            way training is that of fp32 weights, and the parameter is the fp32 weight rounded to nearest (ties: to even
            for a copy, away from zero for a split). Whatever else than a step writes a parameter that has a copy must
            write the copy too.
        kahan: keep what rounding a 16-bit parameter has lost, ``compensation``, in its dtype (2 bytes), and add it back
            before the next update, also to a weight that something else has written meanwhile.
        rounding: "nearest" (default), or "stochastic": a 16-bit parameter is rounded up with the probability of what
            rounding down would cut off, with random numbers that depend on the seed, the parameter's index, the
            element's place in memory and the parameter's step alone (Philox4x32-10). The place is that in the memory of
            the whole tensor: a DTensor is rounded as in one process.
        rounding_seed: of stochastic rounding, 0 (default) or larger. It is a part of the state_dict, and a loaded one
            counts. Not drawn from torch's generator, so that the copies of a model in a data-parallel run stay equal.
        max_grad_norm: the norm of all gradients together, of all groups, is brought down to this (0 or larger, in the
            units of a gradient), as ``torch.nn.utils.clip_grad_norm_`` does before a step; ``.grad`` is not written.
            None: gradients are not clipped. ``optimizer.grad_norm`` is the norm that was found.
        norm_type: 2 (default) or infinity, for the largest absolute value.
        error_if_nonfinite: raise RuntimeError if the norm is not finite, before anything is written. This waits for
            the device.
        skip_nonfinite: skip the step if the norm is not finite: no parameter, state or counter changes.
        write_grads: leave in ``.grad`` the gradient that the rule has used, unscaled and clipped.
        zero_grads: leave zeros in ``.grad``, set in the pass that read it. In a skipped step too, or a non-finite
            gradient would stay for ever; but ``torch.amp.GradScaler`` skips a step by not calling it, so that
            ``zero_grad`` must be called under it (`fusedstep.GradScaler` calls it in any case).
        ema_decay: in [0, 1): keep an average of each parameter, ``ema = ema_decay * ema + (1 - ema_decay) * param``
            after each of its steps, which begins as the parameter before the first one. It is the state "ema" of the
            parameter, in fp32 or wider; ``with optimizer.swap_ema():`` puts the averages in the parameters' place.
            With ``master_weights`` it follows the fp32 weight, otherwise the parameter as it is stored.
        weights_copy: torch.bfloat16 or torch.float16: each step writes the parameter in that dtype too, rounded to
            nearest even, into ``optimizer.copies[param]``; with ``master_weights`` the fp32 weight.

    Raises:
        ValueError, TypeError: an option is out of range or contradicts another one.
    """

    backend: str | None
    state_dtype: torch.dtype | Literal["8bit", "4bit"] | None
    wide_states: Sequence[str]
    master_weights: bool | Literal["split"]
    kahan: bool
    rounding: Literal["nearest", "stochastic"]
    rounding_seed: int
    max_grad_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    skip_nonfinite: bool
    write_grads: bool
    zero_grads: bool
    ema_decay: float | None
    weights_copy: torch.dtype | None


DEFAULTS: dict[str, Any] = {
    "backend": None,
    "state_dtype": None,
    "wide_states": ("emb", "wte", "wpe"),
    "master_weights": False,
    "kahan": False,
    "rounding": "nearest",
    "rounding_seed": 0,
    "max_grad_norm": None,
    "norm_type": 2.0,
    "error_if_nonfinite": False,
    "skip_nonfinite": False,
    "write_grads": False,
    "zero_grads": False,
    "ema_decay": None,
    "weights_copy": None,
}
