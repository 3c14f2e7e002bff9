"""Hugging Face's learning-rate factors, as functions of the step: the numbers of `transformers` 5, to the bit.

All are functions of the module, not closures, so that schedulers made of them can be pickled. Below them is what an
option given in one of several ways means for them. No optimizer and no scheduler belongs here.
"""

from __future__ import annotations

import math
import warnings

WSD_SHAPES = ("linear", "cosine", "1-sqrt")


def constant(_step: int) -> int:
    return 1


def rise(step: int, num_warmup_steps: int) -> float:
    return float(step) / float(max(1, num_warmup_steps))


def progress_of(step: int, num_warmup_steps: int, num_training_steps: int) -> float:
    return float(step - num_warmup_steps) / float(max(1, num_training_steps - num_warmup_steps))


def constant_with_warmup(step: int, *, num_warmup_steps: int) -> float:
    return float(step) / float(max(1.0, num_warmup_steps)) if step < num_warmup_steps else 1.0


def linear(step: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
    if step < num_warmup_steps:
        return rise(step, num_warmup_steps)
    return max(0.0, float(num_training_steps - step) / float(max(1, num_training_steps - num_warmup_steps)))


def cosine(
    step: int,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float,
    min_lr_rate: float = 0.0,
    clamp: bool = False,
) -> float:
    if clamp:
        step = min(step, num_training_steps)
    if step < num_warmup_steps:
        return rise(step, num_warmup_steps)
    progress = progress_of(step, num_warmup_steps, num_training_steps)
    factor = 0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * progress))
    return max(0, factor * (1 - min_lr_rate) + min_lr_rate)


def cosine_with_restarts(step: int, *, num_warmup_steps: int, num_training_steps: int, num_cycles: int) -> float:
    if step < num_warmup_steps:
        return rise(step, num_warmup_steps)
    progress = progress_of(step, num_warmup_steps, num_training_steps)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((float(num_cycles) * progress) % 1.0))))


def polynomial(
    step: int, *, num_warmup_steps: int, num_training_steps: int, lr_end: float, power: float, lr_init: float
) -> float:
    if step < num_warmup_steps:
        return rise(step, num_warmup_steps)
    if step > num_training_steps:
        return lr_end / lr_init  # LambdaLR multiplies by lr_init
    remaining = 1 - (step - num_warmup_steps) / (num_training_steps - num_warmup_steps)
    return ((lr_init - lr_end) * remaining**power + lr_end) / lr_init


def inverse_sqrt(step: int, *, num_warmup_steps: int, timescale: int) -> float:
    if step < num_warmup_steps:
        return rise(step, num_warmup_steps)
    return 1.0 / math.sqrt((step + (timescale - num_warmup_steps)) / timescale)


def cosine_with_warmup_lr_rate(
    step: float,
    *,
    num_warmup_steps: float,
    num_training_steps: float,
    num_cycles: float,
    min_lr_rate: float = 0.0,
    warmup_lr_rate: float | None = None,
    clamp: bool = False,
) -> float:
    step, num_warmup_steps, num_training_steps = float(step), float(num_warmup_steps), float(num_training_steps)
    if clamp:
        step = min(step, num_training_steps - 1.0)  # this one is a step ahead of the others
    if step < num_warmup_steps:
        if warmup_lr_rate is None:
            return (step + 1.0) / max(1.0, num_warmup_steps)
        warmup_lr_rate = float(warmup_lr_rate)
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * step / max(1, num_warmup_steps - 1)
    progress = (step - num_warmup_steps + 1.0) / max(1.0, num_training_steps - num_warmup_steps)
    factor = 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))
    return max(0, factor * (1 - min_lr_rate) + min_lr_rate)


def warmup_stable_decay(
    step: int,
    *,
    num_warmup_steps: int,
    num_stable_steps: int,
    num_decay_steps: int,
    warmup_type: str,
    decay_type: str,
    min_lr_ratio: float,
    num_cycles: float,
) -> float:
    if step < num_warmup_steps:
        progress = rise(step, num_warmup_steps)
        if warmup_type == "cosine":
            progress = 0.5 * (1.0 - math.cos(math.pi * progress))
        elif warmup_type == "1-sqrt":
            progress = 1.0 - math.sqrt(1.0 - progress)
        return max(0.0, progress * (1.0 - min_lr_ratio) + min_lr_ratio)
    since_warmup = step - num_warmup_steps
    if since_warmup < num_stable_steps:
        return 1.0
    if since_warmup >= num_stable_steps + num_decay_steps:
        return min_lr_ratio
    progress = float(since_warmup - num_stable_steps) / float(max(1, num_decay_steps))
    if decay_type == "linear":
        factor = 1.0 - progress
    elif decay_type == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * progress))
    else:
        factor = 1.0 - math.sqrt(progress)
    return max(0.0, factor * (1.0 - min_lr_ratio) + min_lr_ratio)


def min_lr_rate_of(lr: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    """The minimum as a share of ``lr``, given as one or as the other."""
    if min_lr is not None and min_lr_rate is not None:
        raise ValueError("Only one of min_lr or min_lr_rate should be set")
    if min_lr is not None:
        return min_lr / lr
    if min_lr_rate is None:
        raise ValueError("One of min_lr or min_lr_rate should be set through the `lr_scheduler_kwargs`")
    return min_lr_rate


def stable_steps_of(
    num_warmup_steps: int,
    num_decay_steps: int,
    num_training_steps: int | None,
    num_stable_steps: int | None,
    warmup_type: str,
    decay_type: str,
) -> int:
    """The length of the stable phase, after a look at the options of a warm-up, a stable phase and a decay."""
    if num_training_steps is None and num_stable_steps is None:
        raise ValueError("Either num_training_steps or num_stable_steps must be specified.")
    if num_training_steps is not None and num_stable_steps is not None:
        warnings.warn(
            "Both num_training_steps and num_stable_steps are specified. num_stable_steps will be used.", stacklevel=3
        )
    for phase, shape in (("warmup", warmup_type), ("decay", decay_type)):
        if shape not in WSD_SHAPES:
            raise ValueError(f"Unknown {phase} type: {shape}, expected 'linear', 'cosine' or '1-sqrt'")
    if num_stable_steps is None:
        return num_training_steps - num_warmup_steps - num_decay_steps
    return num_stable_steps
