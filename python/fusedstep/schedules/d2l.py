"""The schedules of the book "Dive into Deep Learning" (chapter "Learning Rate Scheduling"), by their names there.

All of them give learning rates, not factors, from the number of updates; where the book's classes count their own
calls, these are functions of the number alone, so that they can be asked in any order.
"""

from __future__ import annotations

from collections.abc import Sequence

from .schedule import COSINE, FACTOR, Piece, Schedule, check_lr, check_power, check_steps, constant, fall, piece, rise


class ConstantScheduler(Schedule):
    """The same learning rate in every update.

    Args:
        base_lr: 0 or larger.

    Raises:
        ValueError, TypeError: it is out of range.
    """

    def __init__(self, base_lr: float = 0.01) -> None:
        self.base_lr = check_lr("base_lr", base_lr)
        super().__init__([constant(0, self.base_lr)])


class SquareRootScheduler(Schedule):
    r"""Decay with the square root of the number of updates: :math:`\gamma (t + 1)^{-1/2}`.

    Args:
        lr: the learning rate of the first update, 0 or larger.

    Raises:
        ValueError, TypeError: it is out of range.
    """

    def __init__(self, lr: float = 0.1) -> None:
        self.lr = check_lr("lr", lr)
        super().__init__([piece(0, high=self.lr, offset=1, exponent=-1)])


class FactorScheduler(Schedule):
    r"""Multiply the learning rate by a factor in every update, down to a floor.

    Update :math:`t` has :math:`\max(\gamma_{min}, \gamma \alpha^{t + 1})`, which is what the book's class returns from
    its call number :math:`t + 1`: the first one is multiplied already.

    Args:
        factor: :math:`\alpha`, in (0, 1].
        stop_factor_lr: the floor :math:`\gamma_{min}`, 0 or larger.
        base_lr: :math:`\gamma`, 0 or larger.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(self, factor: float = 1, stop_factor_lr: float = 1e-7, base_lr: float = 0.1) -> None:
        self.factor = _check_factor(factor)
        self.stop_factor_lr = check_lr("stop_factor_lr", stop_factor_lr)
        self.base_lr = check_lr("base_lr", base_lr)
        super().__init__([piece(0, FACTOR, high=self.base_lr, low=self.stop_factor_lr, offset=1, exponent=self.factor)])


class MultiFactorScheduler(Schedule):
    r"""Multiply the learning rate by a factor after each milestone: :math:`\gamma_{t+1} = \alpha \gamma_t` if t is one.

    The update whose number is a milestone still has the old learning rate. (`torch.optim.lr_scheduler.MultiStepLR`
    changes it there, one update earlier.)

    Args:
        step: the milestones, increasing numbers of updates from 1 on.
        factor: :math:`\alpha`, in (0, 1].
        base_lr: the learning rate before the first milestone, 0 or larger.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(self, step: Sequence[int], factor: float = 1, base_lr: float = 0.01) -> None:
        if isinstance(step, str) or not hasattr(step, "__iter__"):
            raise TypeError(f"Invalid step: {step!r} is a {type(step).__name__}; it must be a list of integers")
        self.step = [check_steps(f"step at index {i}", milestone, 1) for i, milestone in enumerate(step)]
        if not self.step or any(b <= a for a, b in zip(self.step, self.step[1:], strict=False)):
            raise ValueError(f"Invalid step: {self.step} (they must be an increasing list of integers)")
        self.factor = _check_factor(factor)
        self.base_lr = check_lr("base_lr", base_lr)
        rows, lr = [constant(0, self.base_lr)], self.base_lr
        for milestone in self.step:
            lr *= self.factor
            rows.append(constant(milestone + 1, lr))
        super().__init__(rows)


class PolyScheduler(Schedule):
    r"""Warm up linearly, then decay as a polynomial to ``final_lr``, and stay there.

    With :math:`w` warm-up steps, from :math:`t = w` to :math:`t = T` the learning rate is
    :math:`\gamma_T + (\gamma - \gamma_T)\left(1 - \frac{t - w}{T - w}\right)^{p}`.

    Args:
        max_update: :math:`T`, the update at which ``final_lr`` is reached, larger than ``warmup_steps``.
        base_lr: :math:`\gamma`, 0 or larger.
        pwr: :math:`p`, larger than 0; 1 is linear decay.
        final_lr: :math:`\gamma_T`, 0 or larger.
        warmup_steps: 0 or more updates from ``warmup_begin_lr`` to ``base_lr``.
        warmup_begin_lr: the learning rate of the first of them, from 0 to ``base_lr``.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        max_update: int,
        base_lr: float = 0.01,
        pwr: float = 2,
        final_lr: float = 0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
    ) -> None:
        self.max_update, self.base_lr, self.final_lr, self.warmup_steps, self.warmup_begin_lr = _check_decay(
            max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr
        )
        self.pwr = check_power("pwr", pwr)
        decay = fall(self.warmup_steps, self.base_lr, self.final_lr, self.max_update - self.warmup_steps, self.pwr)
        super().__init__(_around(decay, self))


class LinearScheduler(Schedule):
    """Warm up linearly, then decay linearly to ``final_lr``, and stay there: `PolyScheduler` with ``pwr=1``.

    Args:
        max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr: as for `PolyScheduler`.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Example:
        >>> LinearScheduler(max_update=1000, base_lr=5e-5, warmup_steps=100)
    """

    def __init__(
        self,
        max_update: int,
        base_lr: float = 0.01,
        final_lr: float = 0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
    ) -> None:
        self.max_update, self.base_lr, self.final_lr, self.warmup_steps, self.warmup_begin_lr = _check_decay(
            max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr
        )
        decay = fall(self.warmup_steps, self.base_lr, self.final_lr, self.max_update - self.warmup_steps)
        super().__init__(_around(decay, self))


class CosineScheduler(Schedule):
    r"""Warm up linearly, then decay as half a cosine to ``final_lr``, and stay there.

    With :math:`w` warm-up steps, from :math:`t = w` to :math:`t = T` the learning rate is
    :math:`\gamma_T + \frac{\gamma - \gamma_T}{2}\left(1 + \cos\frac{\pi (t - w)}{T - w}\right)`.

    Args:
        max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr: as for `PolyScheduler`.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Example:
        >>> CosineScheduler(max_update=1000, base_lr=3e-4, final_lr=3e-5, warmup_steps=100)

    Paper: arXiv 1608.03983.
    """

    def __init__(
        self,
        max_update: int,
        base_lr: float = 0.01,
        final_lr: float = 0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
    ) -> None:
        self.max_update, self.base_lr, self.final_lr, self.warmup_steps, self.warmup_begin_lr = _check_decay(
            max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr
        )
        steps = self.max_update - self.warmup_steps
        decay = piece(self.warmup_steps, COSINE, high=self.base_lr, low=self.final_lr, length=steps, exponent=1)
        super().__init__(_around(decay, self))


def _around(decay: Piece, s: PolyScheduler | LinearScheduler | CosineScheduler) -> list[Piece]:
    """A decay between its warm-up and its end."""
    begin = [rise(0, s.warmup_begin_lr, s.base_lr, s.warmup_steps)] if s.warmup_steps > 0 else []
    return [*begin, decay, constant(s.max_update, s.final_lr)]


def _check_factor(factor: float) -> float:
    factor = check_power("factor", factor)
    if factor > 1.0:
        raise ValueError(f"Invalid factor: {factor} (it must be no more than 1, to make the learning rate smaller)")
    return factor


def _check_decay(
    max_update: int, base_lr: float, final_lr: float, warmup_steps: int, warmup_begin_lr: float
) -> tuple[int, float, float, int, float]:
    max_update = check_steps("max_update", max_update, 1)
    base_lr = check_lr("base_lr", base_lr)
    final_lr = check_lr("final_lr", final_lr)
    warmup_steps = check_steps("warmup_steps", warmup_steps)
    warmup_begin_lr = check_lr("warmup_begin_lr", warmup_begin_lr)
    if max_update <= warmup_steps:
        raise ValueError(f"Invalid max_update: {max_update} (it must be larger than warmup_steps, {warmup_steps})")
    if warmup_begin_lr > base_lr:
        raise ValueError(f"Invalid warmup_begin_lr: {warmup_begin_lr} (it must be no more than base_lr, {base_lr})")
    return max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr
