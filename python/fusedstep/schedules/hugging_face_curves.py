"""Hugging Face's schedules as `Schedule`: by the same names, for the device.

The same curves as the factors of `transformers`, put together from pieces; the last bits are their own, because a
cosine and a power of a C library do not have the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .factors import min_lr_rate_of, stable_steps_of
from .hugging_face import NEED_A_METRIC, SchedulerType
from .schedule import COSINE, RESTARTS, Piece, Schedule, check_lr, check_steps, constant, evaluate, fall, piece, rise


def _warmup(lr: float, num_warmup_steps: int) -> list[Piece]:
    return [rise(0, 0.0, lr, num_warmup_steps)] if num_warmup_steps > 0 else []


def _from(start: int, row: Piece) -> Piece:
    """The same curve, but not before ``start``."""
    begin, kind, high, low, offset, length, exponent = row
    late = max(begin, float(start))
    return late, kind, high, low, offset + (late - begin), length, exponent


def _held(rows: list[Piece], last: int) -> list[Piece]:
    """The value of update ``last`` from there on."""
    return [*(row for row in rows if row[0] < last), constant(last, evaluate(rows, last))]


def _constant(lr: float) -> list[Piece]:
    return [constant(0, lr)]


def _constant_with_warmup(lr: float, warmup: int) -> list[Piece]:
    return [*_warmup(lr, warmup), constant(warmup, lr)]


def _linear(lr: float, warmup: int, steps: int) -> list[Piece]:
    decay = [fall(warmup, lr, 0.0, steps - warmup)] if steps > warmup else []
    return [*_warmup(lr, warmup), *decay, constant(max(steps, warmup), 0.0)]


def _cosine(
    lr: float, warmup: int, steps: int, num_cycles: float = 0.5, *, low: float = 0.0, clamp: bool = False
) -> list[Piece]:
    length = max(1, steps - warmup)
    rows = [*_warmup(lr, warmup), piece(warmup, COSINE, high=lr, low=low, length=length, exponent=2.0 * num_cycles)]
    return _held(rows, steps) if clamp else rows


def _cosine_with_restarts(lr: float, warmup: int, steps: int, num_cycles: int = 1) -> list[Piece]:
    length = max(1, steps - warmup)
    waves = piece(warmup, RESTARTS, high=lr, length=length, exponent=num_cycles)
    return [*_warmup(lr, warmup), waves, constant(warmup + length, 0.0)]


def _polynomial(lr: float, warmup: int, steps: int, lr_end: float = 1e-7, power: float = 1.0) -> list[Piece]:
    if not (lr > lr_end):
        raise ValueError(f"lr_end ({lr_end}) must be smaller than initial lr ({lr})")
    if steps == warmup:
        raise ValueError(
            f"num_training_steps ({steps}) must not be num_warmup_steps ({warmup}): nothing is left to decay"
        )
    decay = [fall(warmup, lr, lr_end, steps - warmup, power)] if steps > warmup else []
    return [*_warmup(lr, warmup), *decay, constant(max(steps, warmup), lr_end)]


def _inverse_sqrt(lr: float, warmup: int, timescale: int | None = None) -> list[Piece]:
    scale = warmup or 10_000 if timescale is None else check_steps("timescale", timescale, 1)
    return [*_warmup(lr, warmup), piece(warmup, high=lr, offset=scale, length=scale, exponent=-1)]


def _cosine_with_min_lr(
    lr: float,
    warmup: int,
    steps: int,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    *,
    clamp: bool = False,
) -> list[Piece]:
    low = check_lr("min_lr", lr * min_lr_rate_of(lr, min_lr, min_lr_rate))
    return _cosine(lr, warmup, steps, num_cycles, low=low, clamp=clamp)


def _cosine_warmup_with_min_lr(
    lr: float,
    warmup: int,
    steps: int,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
    *,
    clamp: bool = False,
) -> list[Piece]:
    low = check_lr("min_lr", lr * min_lr_rate_of(lr, min_lr, min_lr_rate))
    length = max(1, steps - warmup)
    rows = [piece(warmup, COSINE, high=lr, low=low, offset=1, length=length, exponent=2.0 * num_cycles)]
    if warmup > 0 and warmup_lr_rate is None:
        rows.insert(0, piece(0, high=lr, offset=1, length=warmup, exponent=2))
    elif warmup > 0:
        rows.insert(0, rise(0, check_lr("warmup_lr_rate", warmup_lr_rate) * lr, lr, max(1, warmup - 1)))
    return _held(rows, max(0, steps - 1)) if clamp else rows


def _warmup_stable_decay(
    lr: float,
    warmup: int,
    steps: int | None,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
) -> list[Piece]:
    num_decay_steps = check_steps("num_decay_steps", num_decay_steps)
    stable = stable_steps_of(warmup, num_decay_steps, steps, num_stable_steps, warmup_type, decay_type)
    low = check_lr("min_lr_ratio", min_lr_ratio) * lr
    decay = warmup + stable
    up = {
        "linear": rise(0, low, lr, warmup),
        "cosine": piece(0, COSINE, high=low, low=lr, length=warmup, exponent=1),
        "1-sqrt": fall(0, low, lr, warmup, 0.5),
    }
    down = {
        "linear": fall(decay, lr, low, num_decay_steps),
        "cosine": piece(decay, COSINE, high=lr, low=low, length=num_decay_steps, exponent=2.0 * num_cycles),
        "1-sqrt": rise(decay, lr, low, num_decay_steps, 0.5),
    }
    rows = [up[warmup_type]] if warmup > 0 else []
    if stable > 0:
        rows.append(constant(warmup, lr))
    if num_decay_steps > 0 and decay + num_decay_steps > warmup:
        rows.append(_from(warmup, down[decay_type]))
    return [*rows, constant(max(warmup, decay + num_decay_steps), low)]


CURVES: dict[SchedulerType, Callable[..., list[Piece]]] = {
    SchedulerType.LINEAR: _linear,
    SchedulerType.COSINE: _cosine,
    SchedulerType.COSINE_WITH_RESTARTS: _cosine_with_restarts,
    SchedulerType.POLYNOMIAL: _polynomial,
    SchedulerType.CONSTANT: _constant,
    SchedulerType.CONSTANT_WITH_WARMUP: _constant_with_warmup,
    SchedulerType.INVERSE_SQRT: _inverse_sqrt,
    SchedulerType.COSINE_WITH_MIN_LR: _cosine_with_min_lr,
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: _cosine_warmup_with_min_lr,
    SchedulerType.WARMUP_STABLE_DECAY: _warmup_stable_decay,
}


def get_schedule(
    name: str | SchedulerType,
    lr: float,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> Schedule:
    """The curve of Hugging Face's scheduler of this name, as a function of the number of updates and for the device.

    Args:
        name: one of `SchedulerType`, of those that need no metric.
        lr: the learning rate that the curve is a share of, 0 or larger.
        num_warmup_steps, num_training_steps, scheduler_specific_kwargs: as for `get_scheduler`.

    Raises:
        ValueError: there is no such curve, or a number is missing or out of range.
        TypeError: the curve has no such argument.

    Example:
        >>> schedule = get_schedule("warmup_stable_decay", 3e-4, 100, 1000, {"num_decay_steps": 200})
    """
    name = SchedulerType(name)
    if name in NEED_A_METRIC:
        raise ValueError(f"{name} depends on a metric, not on the number of updates alone; use get_scheduler")
    lr = check_lr("learning rate", lr)
    specific = scheduler_specific_kwargs or {}
    if name == SchedulerType.CONSTANT:
        return Schedule(_constant(lr))
    if num_warmup_steps is None:
        raise ValueError(f"{name} requires `num_warmup_steps`, please provide that argument.")
    warmup = check_steps("num_warmup_steps", num_warmup_steps)
    if name == SchedulerType.CONSTANT_WITH_WARMUP:
        return Schedule(_constant_with_warmup(lr, warmup))
    if name == SchedulerType.INVERSE_SQRT:
        return Schedule(_inverse_sqrt(lr, warmup, **specific))
    if num_training_steps is None and name != SchedulerType.WARMUP_STABLE_DECAY:
        raise ValueError(f"{name} requires `num_training_steps`, please provide that argument.")
    steps = None if num_training_steps is None else check_steps("num_training_steps", num_training_steps)
    return Schedule(CURVES[name](lr, warmup, steps, **specific))
