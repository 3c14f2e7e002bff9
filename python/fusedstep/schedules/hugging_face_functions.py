"""Hugging Face's learning-rate schedulers, a function each: signatures, errors and numbers of `transformers`.

The schedulers multiply each group's own learning rate by a factor. The factors are computed as in `transformers` 5,
which the tests compare to the bit. Of this package are the keyword-only ``clamp``, which holds the value of the last
training step from there on, where the original goes on along its curve (a cosine rises again); and a learning-rate
tensor for each group where several share one, so that none is written twice in a step. The formulas are in `factors`,
the schedulers' names in `hugging_face`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from . import factors
from .by_metric import GreedyLR, ReduceLROnPlateau
from .schedule import FactorLR, separate_lr_tensors


def _lambda_lr(optimizer: Optimizer, factor: Callable[[int], float], last_epoch: int) -> LambdaLR:
    separate_lr_tensors(optimizer)
    return FactorLR(optimizer, factor, last_epoch)


def _default_lr(optimizer: Optimizer) -> float:
    """The constructor's learning rate, as a number: a tensor would be the one that the scheduler writes into."""
    return float(optimizer.defaults["lr"])


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> LambdaLR:
    """A constant learning rate.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        last_epoch: index of the last epoch, when resuming without a state_dict.
    """
    return _lambda_lr(optimizer, factors.constant, last_epoch)


def get_constant_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    """A constant learning rate after a linear rise from 0.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        num_warmup_steps: of the rise.
        last_epoch: index of the last epoch, when resuming without a state_dict.
    """
    return _lambda_lr(optimizer, partial(factors.constant_with_warmup, num_warmup_steps=num_warmup_steps), last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """A linear rise from 0, then a linear decay to 0.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        num_warmup_steps: of the rise.
        num_training_steps: of everything.
        last_epoch: index of the last epoch, when resuming without a state_dict.
    """
    factor = partial(factors.linear, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps)
    return _lambda_lr(optimizer, factor, last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    *,
    clamp: bool = False,
) -> LambdaLR:
    """A linear rise from 0, then a cosine down to 0, which rises again after the last step.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        num_warmup_steps: of the rise.
        num_training_steps: of everything.
        num_cycles: waves of the cosine; 0.5 goes down once.
        last_epoch: index of the last epoch, when resuming without a state_dict.
        clamp: stay at the value of step ``num_training_steps`` from there on.
    """
    factor = partial(
        factors.cosine,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=num_cycles,
        clamp=clamp,
    )
    return _lambda_lr(optimizer, factor, last_epoch)


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: int = 1, last_epoch: int = -1
) -> LambdaLR:
    """A linear rise from 0, then several cosines down to 0, each from the full learning rate; 0 after the last step.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        num_warmup_steps: of the rise.
        num_training_steps: of everything.
        num_cycles: how many times the learning rate goes down.
        last_epoch: index of the last epoch, when resuming without a state_dict.
    """
    factor = partial(
        factors.cosine_with_restarts,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=num_cycles,
    )
    return _lambda_lr(optimizer, factor, last_epoch)


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """A linear rise from 0, then a polynomial decay to ``lr_end``, where it stays.

    Args:
        optimizer: any `torch.optim.Optimizer`; ``lr_end`` is reached by groups with its constructor's learning rate.
        num_warmup_steps: of the rise.
        num_training_steps: of everything.
        lr_end: less than the learning rate.
        power: of the decay.
        last_epoch: index of the last epoch, when resuming without a state_dict.

    Raises:
        ValueError: ``lr_end`` is too large.
    """
    lr_init = _default_lr(optimizer)
    if not (lr_init > lr_end):
        raise ValueError(f"lr_end ({lr_end}) must be smaller than initial lr ({lr_init})")
    factor = partial(
        factors.polynomial,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        lr_end=lr_end,
        power=power,
        lr_init=lr_init,
    )
    return _lambda_lr(optimizer, factor, last_epoch)


def get_inverse_sqrt_schedule(
    optimizer: Optimizer, num_warmup_steps: int, timescale: int | None = None, last_epoch: int = -1
) -> LambdaLR:
    """A linear rise from 0, then a decay with the square root of the steps.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        num_warmup_steps: of the rise.
        timescale: steps after which the decay is by the square root of 2; None: ``num_warmup_steps``, or 10,000 if
            that is 0.
        last_epoch: index of the last epoch, when resuming without a state_dict.
    """
    if timescale is None:
        timescale = num_warmup_steps or 10_000
    factor = partial(factors.inverse_sqrt, num_warmup_steps=num_warmup_steps, timescale=timescale)
    return _lambda_lr(optimizer, factor, last_epoch)


def get_cosine_with_min_lr_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    *,
    clamp: bool = False,
) -> LambdaLR:
    """A linear rise from 0, then a cosine down to a minimum, which rises again after the last step.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        num_warmup_steps: of the rise.
        num_training_steps: of everything.
        num_cycles: waves of the cosine; 0.5 goes down once.
        last_epoch: index of the last epoch, when resuming without a state_dict.
        min_lr: the minimum, of groups with the constructor's learning rate.
        min_lr_rate: the minimum as a share of the learning rate, instead of ``min_lr``.
        clamp: stay at the value of step ``num_training_steps`` from there on.

    Raises:
        ValueError: both or none of ``min_lr`` and ``min_lr_rate`` are given.
    """
    factor = partial(
        factors.cosine,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=num_cycles,
        min_lr_rate=factors.min_lr_rate_of(_default_lr(optimizer), min_lr, min_lr_rate),
        clamp=clamp,
    )
    return _lambda_lr(optimizer, factor, last_epoch)


def get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
    *,
    clamp: bool = False,
) -> LambdaLR:
    """A linear rise that does not begin at 0, then a cosine down to a minimum, one step ahead of the other schedules.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        num_warmup_steps: of the rise.
        num_training_steps: of everything.
        num_cycles: waves of the cosine; 0.5 goes down once.
        last_epoch: index of the last epoch, when resuming without a state_dict.
        min_lr: the minimum, of groups with the constructor's learning rate.
        min_lr_rate: the minimum as a share of the learning rate, instead of ``min_lr``.
        warmup_lr_rate: where the rise begins, as a share of the learning rate; None: at ``1 / num_warmup_steps``.
        clamp: stay at the value of step ``num_training_steps - 1``, the lowest, from there on.

    Raises:
        ValueError: both or none of ``min_lr`` and ``min_lr_rate`` are given.
    """
    factor = partial(
        factors.cosine_with_warmup_lr_rate,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=num_cycles,
        min_lr_rate=factors.min_lr_rate_of(_default_lr(optimizer), min_lr, min_lr_rate),
        warmup_lr_rate=warmup_lr_rate,
        clamp=clamp,
    )
    return _lambda_lr(optimizer, factor, last_epoch)


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_decay_steps: int,
    num_training_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    """A warm-up, a stable phase and a decay, from and to a share of the learning rate.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        num_warmup_steps, num_decay_steps: of the first and the last phase.
        num_training_steps: of everything; or else
        num_stable_steps: of the phase between them.
        warmup_type, decay_type: "linear", "cosine" or "1-sqrt".
        min_lr_ratio: the share.
        num_cycles: waves of a cosine decay; 0.5 goes down once.
        last_epoch: index of the last epoch, when resuming without a state_dict.

    Raises:
        ValueError: no number tells how long the stable phase is, or a type is unknown.
    """
    factor = partial(
        factors.warmup_stable_decay,
        num_warmup_steps=num_warmup_steps,
        num_stable_steps=factors.stable_steps_of(
            num_warmup_steps, num_decay_steps, num_training_steps, num_stable_steps, warmup_type, decay_type
        ),
        num_decay_steps=num_decay_steps,
        warmup_type=warmup_type,
        decay_type=decay_type,
        min_lr_ratio=min_lr_ratio,
        num_cycles=num_cycles,
    )
    return _lambda_lr(optimizer, factor, last_epoch)


def get_reduce_on_plateau_schedule(optimizer: Optimizer, **kwargs: Any) -> ReduceLROnPlateau:
    """A learning rate that is reduced when a metric stops improving; ``kwargs`` are those of `ReduceLROnPlateau`."""
    return ReduceLROnPlateau(optimizer, **kwargs)


def get_greedy_schedule(optimizer: Optimizer, **kwargs: Any) -> GreedyLR:
    """A learning rate that rises and falls with a metric; ``kwargs`` are those of `GreedyLR`."""
    return GreedyLR(optimizer, **kwargs)
