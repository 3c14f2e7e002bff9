"""Schedules as functions of the number of updates: what they are made of, warm-up, and the torch scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..numerics import cos_pi, power

# Kinds of pieces. With u updates since the piece began and x = (u + offset) / length, the learning rate is
POWER = 0.0  # low + (high - low) x^(exponent / 2)
COSINE = 1.0  # low + (high - low) (1 + cos(pi exponent x)) / 2
RESTARTS = 2.0  # the same with the fractional part of exponent x
FACTOR = 3.0  # max(low, high exponent^(u + offset))

Piece = tuple[float, float, float, float, float, float, float]


def piece(
    start: float,
    kind: float = POWER,
    *,
    high: float,
    low: float = 0.0,
    offset: float = 0.0,
    length: float = 1.0,
    exponent: float = 0.0,
) -> Piece:
    """A piece of a schedule: plain numbers, which are also the rows of the table that the kernels read."""
    return tuple(map(float, (start, kind, high, low, offset, length, exponent)))


def constant(start: float, lr: float) -> Piece:
    """``lr`` from update ``start`` on."""
    return piece(start, high=lr)


def rise(start: float, begin: float, end: float, steps: float, power: float = 1.0) -> Piece:
    """From ``begin`` to ``end`` within ``steps`` updates, as x^power."""
    return piece(start, high=end, low=begin, length=steps, exponent=2 * power)


def fall(start: float, begin: float, end: float, steps: float, power: float = 1.0) -> Piece:
    """From ``begin`` to ``end`` within ``steps`` updates, as (1 - x)^power."""
    return piece(start, high=begin, low=end, offset=-steps, length=-steps, exponent=2 * power)


def half_power(x: float, exponent: float) -> float:
    """x^(exponent / 2), by IEEE operations alone where ``exponent`` is an integer."""
    if not exponent.is_integer():
        return math.pow(x, exponent / 2)
    count = int(abs(exponent))
    result = power(x, count // 2)
    if count % 2 == 1:
        result = result * math.sqrt(x)
    return 1.0 / result if exponent < 0 else result


def evaluate(pieces: Sequence[Piece], num_update: float) -> float:
    """The learning rate of update ``num_update``: the last piece that began at or before it decides."""
    current = pieces[0]
    for candidate in pieces:
        if candidate[0] <= num_update:
            current = candidate
    start, kind, high, low, offset, length, exponent = current
    since = num_update - start + offset
    if kind == FACTOR:
        return max(low, high * power(exponent, int(since)))
    if kind == POWER:
        return low + (high - low) * half_power(since / length, exponent)
    turns = exponent * (since / length)
    if kind == RESTARTS:
        turns = turns - math.floor(turns)
    return low + (high - low) * (0.5 * (1.0 + cos_pi(turns)))


def _later(pieces: Sequence[Piece], updates: int) -> list[Piece]:
    return [(row[0] + updates, *row[1:]) for row in pieces]


class Schedule:
    """A learning rate as a function of the number of updates so far, 0 before the first.

    A schedule is a plain function, ``schedule(t)``; a torch scheduler, ``ScheduleLR(optimizer, schedule)``; and the
    ``lr`` of an optimizer of this package, which then evaluates it on its own device. All three give the same bits.
    It is a list of pieces, each of one kind of curve, so that it can be handed to a kernel as a table of numbers.

    Args:
        pieces: rows of `piece`, the first from update 0 on.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)

    def __call__(self, num_update: float) -> float:
        if num_update < 0:
            raise ValueError(f"Invalid num_update: {num_update} (it must be 0 or larger)")
        return evaluate(self.pieces, num_update)

    def starting_at(self, num_update: int) -> Schedule:
        """This schedule begun at a later update, and its first learning rate until there.

        A group that joins a training follows a schedule from the optimizer's steps so far on; its own warm-up begins
        when it joins with ``{"params": params, "lr": schedule.starting_at(optimizer.schedule_step)}``.

        Raises:
            ValueError, TypeError: ``num_update`` is not 0 or a larger integer, or a function of the user is in it.
        """
        begin = check_steps("num_update", num_update)
        return Schedule([constant(0, self(0)), *_later(self.pieces, begin)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.pieces == other.pieces

    def __hash__(self) -> int:
        return hash(self.pieces)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name != "pieces")
        options = options or f"pieces={self.pieces!r}"
        return f"{type(self).__name__}({options})"


def check_lr(name: str, value: Any) -> float:
    """``value`` as a float; raises unless it is a number that a learning rate can be."""
    if not isinstance(value, Real):
        raise TypeError(f"Invalid {name}: {value!r} is a {type(value).__name__}; it must be a number, 0 or larger")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"Invalid {name}: {value} (it must be 0 or larger, and finite)")
    return float(value)


def check_steps(name: str, value: Any, least: int = 0) -> int:
    """``value`` as an int; raises unless it is a whole number of at least ``least``."""
    if not isinstance(value, Real):
        raise TypeError(f"Invalid {name}: {value!r} is a {type(value).__name__}; it must be an integer")
    if not (math.isfinite(value) and value == int(value) and value >= least):
        raise ValueError(f"Invalid {name}: {value} (it must be an integer, {least} or larger)")
    return int(value)


def check_power(name: str, value: Any) -> float:
    """``value`` as a float; raises unless it is a number larger than 0."""
    if not isinstance(value, Real):
        raise TypeError(f"Invalid {name}: {value!r} is a {type(value).__name__}; it must be a number, larger than 0")
    if not 0.0 < value < math.inf:
        raise ValueError(f"Invalid {name}: {value} (it must be larger than 0, and finite)")
    return float(value)


class WarmUp(Schedule):
    """Raise the learning rate from 0 to the beginning of another schedule, and follow that from there.

    With :math:`w` warm-up steps and :math:`\\gamma` the learning rate to reach, update :math:`t` has
    :math:`\\gamma (t / w)^{power}` if :math:`t < w`, else ``schedule(t - w)``. This is the warm-up of Hugging Face's
    TensorFlow classes, in float64.

    Args:
        schedule: another `Schedule`; or any function of the number of updates, or a number for a constant.
        warmup_steps: 0 or more.
        power: of the rise, larger than 0.
        initial_learning_rate: the learning rate to reach; None: ``schedule(0)``.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Example:
        >>> WarmUp(PolyScheduler(max_update=900, base_lr=5e-5, pwr=1), warmup_steps=100)
    """

    def __init__(
        self,
        schedule: Schedule | Callable[[int], float] | float,
        warmup_steps: int,
        power: float = 1.0,
        initial_learning_rate: float | None = None,
    ) -> None:
        if isinstance(schedule, Real):
            lr = check_lr("learning rate", schedule)
            schedule = Schedule([constant(0, lr)])
        elif not callable(schedule):
            raise TypeError(f"Invalid schedule: {schedule!r} is neither a schedule, nor a function, nor a number")
        self.schedule = schedule
        self.warmup_steps = check_steps("warmup_steps", warmup_steps)
        self.power = check_power("power", power)
        if initial_learning_rate is None:
            initial_learning_rate = schedule(0)
        self.initial_learning_rate = check_lr("initial_learning_rate", initial_learning_rate)
        # Any other function has no pieces: only the warm-up is known.
        own = [rise(0, 0.0, self.initial_learning_rate, self.warmup_steps, self.power)] if warmup_steps > 0 else []
        rest = schedule.pieces if isinstance(schedule, Schedule) else ()
        super().__init__([*own, *_later(rest, self.warmup_steps)])

    @property
    def innermost(self) -> Schedule | Callable[[int], float]:
        """What is inside of all warm-ups."""
        return self.schedule.innermost if isinstance(self.schedule, WarmUp) else self.schedule

    def __call__(self, num_update: float) -> float:
        if num_update < self.warmup_steps:
            return super().__call__(num_update)
        return self.schedule(num_update - self.warmup_steps)

    def starting_at(self, num_update: int) -> Schedule:
        if not isinstance(self.innermost, Schedule):
            raise ValueError(f"{self!r} cannot start later, because {self.innermost!r} is a function")
        return super().starting_at(num_update)

    def __eq__(self, other: object) -> bool:
        inside = other.innermost if isinstance(other, WarmUp) else other
        return super().__eq__(other) and (isinstance(self.innermost, Schedule) or self.innermost == inside)

    __hash__ = Schedule.__hash__


def separate_lr_tensors(optimizer: Any) -> None:
    """Give every group, and the constructor's options, a learning-rate tensor of their own.

    Schedulers write into a tensor, so that a tensor which several groups share would be written once for each; and what
    the next scheduler, or a group that joins, takes for the constructor's would be what the last one wrote.
    """
    seen: set[int] = set()
    if isinstance(optimizer.defaults.get("lr"), Tensor):
        optimizer.defaults["lr"] = optimizer.defaults["lr"].clone()
    for group in optimizer.param_groups:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if id(lr) in seen:
                group["lr"] = lr.clone()
            seen.add(id(lr))


class FactorLR(LambdaLR):
    """torch's `LambdaLR` with one function for all parameter groups, those that join later too.

    torch's own raises there, after it has changed the others.
    """

    def get_lr(self) -> list[Any]:
        self.match_groups()
        return super().get_lr()

    def match_groups(self) -> None:
        """Have a function and a learning rate to begin with for each group that there is now."""
        groups = self.optimizer.param_groups
        if len(self.base_lrs) != len(groups):
            for group in groups:
                lr = group["lr"]
                group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
            self.base_lrs = [group["initial_lr"] for group in groups]
            self.base_lrs = [lr.clone() if isinstance(lr, Tensor) else lr for lr in self.base_lrs]
        self.lr_lambdas = self.lr_lambdas[:1] * len(groups)


class ScheduleLR(LRScheduler):
    """The torch scheduler that sets the learning rate to a function of the number of updates.

    It sets the learning rate itself. To scale the groups' own, different learning rates instead, hand
    `torch.optim.lr_scheduler.LambdaLR` a schedule whose ``base_lr`` is 1.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        schedule: a `Schedule` or another function from the number of updates to the learning rate, also of groups that
            join later; or a list with one for each parameter group.
        last_epoch: the number of updates done so far, minus 1, when resuming without a state_dict.

    Raises:
        ValueError, TypeError: ``schedule`` is no function, or there are not as many as groups (also from ``step``,
            before it changes anything).

    Example:
        >>> scheduler = ScheduleLR(optimizer, CosineScheduler(max_update=1000, base_lr=3e-4, warmup_steps=100))
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        self.schedules = list(schedule) if isinstance(schedule, (list, tuple)) else schedule
        self.optimizer = optimizer
        for candidate in self._schedule_of_each_group():
            if not callable(candidate):
                raise TypeError(f"schedule should be a function, but got {type(candidate).__name__}")
        separate_lr_tensors(optimizer)
        super().__init__(optimizer, last_epoch)

    def _schedule_of_each_group(self) -> list[Callable[[int], float]]:
        count = len(self.optimizer.param_groups)
        if not isinstance(self.schedules, list):
            return [self.schedules] * count
        if len(self.schedules) != count:
            raise ValueError(f"Expected {count} schedules, one for each parameter group, but got {len(self.schedules)}")
        return self.schedules

    def get_lr(self) -> list[float]:
        return [schedule(self.last_epoch) for schedule in self._schedule_of_each_group()]

    def state_dict(self) -> dict[str, Any]:
        """The state without the schedules, which are code as the functions of a LambdaLR are."""
        return {name: value for name, value in super().state_dict().items() if name != "schedules"}
