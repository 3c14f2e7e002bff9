"""Options that every optimizer takes beside those of its rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import torch


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, beside those of its rule.

    Every elementwise optimizer takes every option on every backend; those that reduce (Adafactor) take ``backend``.
    They hold for all groups. 16-bit parameters are bf16 and fp16; others are not concerned by ``master_weights``,
    ``kahan`` and ``rounding``, of which at most one may be chosen.

    Args:
        backend: "auto" (default), "cuda", "triton", "cpu" or "reference".
        state_dtype: what states are stored in. None (default): the parameter's dtype, as torch, or what was loaded;
            fp32 beside master weights.
            ``torch.float32`` or ``torch.bfloat16``. "8bit": one byte for each number and one fp32 scale (the largest
            magnitude) for each block of 256 along the memory, as ``exp_avg`` and ``exp_avg_scale``; int8 with square
            root spacing, uint8 with fourth root spacing for states that are never negative. States of fp64 and complex
            parameters keep their dtype.
        wide_states: regular expressions. With "8bit", the states of parameters that one of them is found in the name of
            stay in fp32, as do those of parameters with fewer than 4,096 elements. Default ``("emb", "wte", "wpe")``:
            embeddings by their usual names. A parameter has a name if the optimizer was given named parameters.
        master_weights: True keeps an fp32 copy of each 16-bit parameter, ``master_weight`` (4 bytes); "split" keeps the
            lower half of the fp32 number whose upper half the bf16 parameter is, ``weight_remainder`` (2 bytes). Either
            way training is that of fp32 weights, and the parameter is the fp32 weight rounded to nearest (ties: to even
            for a copy, away from zero for a split).
        kahan: keep what rounding a 16-bit parameter has lost, ``compensation``, in its dtype (2 bytes), and add it back
            before the next update.
        rounding: "nearest" (default), or "stochastic": a 16-bit parameter is rounded up with the probability of what
            rounding down would cut off, with random numbers that depend on the seed, the parameter's index, the
            element's place in memory and the parameter's step alone (Philox4x32-10).
        rounding_seed: of stochastic rounding, 0 (default) or larger. It is a part of the state_dict, and a loaded one
            counts. Not drawn from torch's generator, so that the copies of a model in a data-parallel run stay equal.
    """

    backend: str | None
    state_dtype: torch.dtype | Literal["8bit"] | None
    wide_states: Sequence[str]
    master_weights: bool | Literal["split"]
    kahan: bool
    rounding: Literal["nearest", "stochastic"]
    rounding_seed: int
