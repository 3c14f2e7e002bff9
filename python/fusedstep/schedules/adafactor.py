"""The scheduler that shows the learning rates which Adafactor computes for itself."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def _always(value: float, _step: int) -> float:
    return value


class AdafactorSchedule(LambdaLR):
    """The learning rates of an Adafactor that makes its own, for training loops that ask a scheduler for them.

    Args:
        optimizer: one with Hugging Face's ``_get_lr(group, state)``, such as ``transformers.Adafactor``.
        initial_lr: what to show before the first gradient.

    Follows the class of that name in transformers. Differs: it can be pickled.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float = 0.0) -> None:
        for group in optimizer.param_groups:
            group["initial_lr"] = initial_lr
        super().__init__(optimizer, partial(_always, initial_lr))
        for group in optimizer.param_groups:
            del group["initial_lr"]

    def get_lr(self) -> list[Any]:
        """The learning rate of each group's first parameter in its last step.

        It is the previous one for a group where that parameter has no gradient, ``initial_lr`` if no group has one.
        """
        initial_lr = self.base_lrs[0]
        firsts = [(group, group["params"][0]) for group in self.optimizer.param_groups]
        if all(first.grad is None for _, first in firsts):
            return [initial_lr] * len(firsts)
        rates = []
        for group, first in firsts:
            if first.grad is not None and self.optimizer.state.get(first):
                rates.append(self.optimizer._get_lr(group, self.optimizer.state[first]))
            else:
                rates.append(initial_lr if group["lr"] is None else group["lr"])
        return rates


def get_adafactor_schedule(optimizer: Optimizer, initial_lr: float = 0.0) -> AdafactorSchedule:
    """`AdafactorSchedule`.

    Args:
        optimizer, initial_lr: its arguments.
    """
    return AdafactorSchedule(optimizer, initial_lr)
