"""Schedulers that are driven by a metric: on a plateau, and greedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from .schedule import separate_lr_tensors


def _read_lrs(optimizer: torch.optim.Optimizer) -> list[float | Tensor]:
    """The groups' learning rates; tensors are copied, because they are written in place."""
    lrs = (group["lr"] for group in optimizer.param_groups)
    return [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]


def _write_lr(group: dict[str, Any], lr: float | Tensor) -> None:
    """Set a group's learning rate, in place where it is a tensor: a captured CUDA graph reads it there."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(float(lr))
    else:
        group["lr"] = lr


class ReduceLROnPlateau(lr_scheduler.ReduceLROnPlateau):
    """`torch.optim.lr_scheduler.ReduceLROnPlateau`, whose state_dict restores the learning rates too.

    Args:
        optimizer, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr, eps: torch's.

    Raises:
        ValueError, TypeError: as in torch.

    Differs: groups that share one tensor as their learning rate are reduced once, not once for each of them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        if isinstance(optimizer, torch.optim.Optimizer):
            separate_lr_tensors(optimizer)
        super().__init__(optimizer, *args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, this class's or torch's, and set the groups' learning rates to those of it.

        Raises:
            ValueError: it was saved with another number of groups; nothing is changed then.
        """
        groups, lrs = len(self.optimizer.param_groups), state_dict.get("_last_lr", self._last_lr)
        if len(lrs) != groups:
            raise ValueError(f"loaded state dict: it has {len(lrs)} learning rates, but the optimizer {groups} groups")
        super().load_state_dict(state_dict)
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            _write_lr(group, lr)


class StreamingAverage:
    """The mean of the last ``window_size`` values."""

    def __init__(self, window_size: int) -> None:
        self.window_size = window_size
        self.values: list[float] = []
        self.sum = 0.0

    def streamavg(self, value: float) -> float:
        """Take a value in and return the mean."""
        self.values.append(value)
        self.sum += value
        if len(self.values) > self.window_size:
            self.sum -= self.values.pop(0)
        return self.sum / len(self.values)

    def state_dict(self) -> dict[str, Any]:
        """The window, its values and their running sum, whose rounding depends on what has left the window."""
        return {"window_size": self.window_size, "values": list(self.values), "sum": self.sum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; what it lacks is as in a new one."""
        self.window_size = state_dict.get("window_size", self.window_size)
        self.values = list(state_dict.get("values", ()))
        self.sum = state_dict.get("sum", 0.0)


class GreedyLR(lr_scheduler.LRScheduler):
    r"""Raise the learning rate while a metric keeps improving and lower it while it does not.

    After more than ``patience`` improvements in a row the learning rate is divided by ``factor``, after more than
    ``patience`` metrics in a row without one it is multiplied by it. After ``reset_start`` reductions with all groups
    at their minimum everything begins anew with the initial learning rates. Call ``step(metric)``.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        mode: "min" or "max", which of them is better.
        factor: less than 1.
        patience: number of metrics.
        threshold: by how much a metric must be better than the best so far.
        threshold_mode: "rel" or "abs".
        cooldown: metrics that are ignored after a reduction.
        warmup: metrics that are ignored after an increase.
        min_lr, max_lr: bounds; a number, also for groups that join later, or a list with one for each group.
        eps: a smaller change than this is not made.
        verbose: print every change.
        smooth: judge by the mean of the last ``window_size`` metrics.
        window_size: for ``smooth``.
        reset_start: number of reductions at the minimum.

    Raises:
        ValueError: ``factor``, ``mode`` or ``threshold_mode`` is not allowed, or bounds are not as many as groups.
        TypeError: ``optimizer`` is no optimizer.
        IndexError: (from ``step``) a group has joined for which a list has no bound; nothing is changed then.

    Example:
        >>> scheduler = GreedyLR(optimizer, patience=10, min_lr=1e-5)
        >>> scheduler.step(loss)

    Same numbers and state_dict as the class of this name in transformers. Differs: it is a torch ``LRScheduler``,
    groups may join and go, and a learning rate that is a tensor stays one. Paper: arXiv 2512.14527.
    """

    # What a state_dict holds; the mean is added if there is one.
    _STATE = (
        *("factor", "min_lrs", "max_lrs", "patience", "verbose", "cooldown", "warmup", "cooldown_counter"),
        *("warmup_counter", "mode", "threshold", "threshold_mode", "best", "num_bad_epochs", "num_good_epochs", "eps"),
        *("last_epoch", "smooth", "window_size", "reset_start", "reset_start_original", "_last_lr", "_init_lrs"),
    )

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        mode: str = "min",
        factor: float = 0.95,
        patience: int = 10,
        threshold: float = 1e-6,
        threshold_mode: str = "abs",
        cooldown: int = 0,
        warmup: int = 0,
        min_lr: float | list[float] = 1e-3,
        max_lr: float | list[float] = 1.0,
        eps: float = 1e-8,
        verbose: bool = False,
        smooth: bool = False,
        window_size: int = 50,
        reset_start: int = 500,
    ) -> None:
        # LRScheduler's constructor would make a first step, for which there is no metric yet.
        if factor >= 1.0:
            raise ValueError("Factor should be < 1.0.")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        self.min_lrs = self._one_for_each_group("min_lrs", min_lr, optimizer)
        self.max_lrs = self._one_for_each_group("max_lrs", max_lr, optimizer)
        # For groups that join later; None: there was a list.
        self._default_bounds = {
            name: None if isinstance(bound, (list, tuple)) else bound
            for name, bound in (("min_lrs", min_lr), ("max_lrs", max_lr))
        }
        if mode not in ("min", "max"):
            raise ValueError(f"mode {mode} is unknown!")
        if threshold_mode not in ("rel", "abs"):
            raise ValueError(f"threshold mode {threshold_mode} is unknown!")
        separate_lr_tensors(optimizer)
        self.optimizer = optimizer
        self.mode = mode
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cooldown = cooldown
        self.warmup = warmup
        self.eps = eps
        self.verbose = verbose
        self.smooth = smooth
        self.window_size = window_size
        self.reset_start_original = reset_start
        self.last_epoch = 0
        self._init_lrs = _read_lrs(optimizer)
        self._last_lr = _read_lrs(optimizer)
        self._begin()

    @staticmethod
    def _one_for_each_group(name: str, bound: float | list[float], optimizer: torch.optim.Optimizer) -> list[float]:
        count = len(optimizer.param_groups)
        if not isinstance(bound, (list, tuple)):
            return [bound] * count
        if len(bound) != count:
            raise ValueError(f"expected {count} {name}, got {len(bound)}")
        return list(bound)

    def _begin(self) -> None:
        self.best = float("inf") if self.mode == "min" else float("-inf")
        self.num_bad_epochs = 0
        self.num_good_epochs = 0
        self.cooldown_counter = 0
        self.warmup_counter = 0
        self.reset_start = self.reset_start_original
        self._streaming_avg = StreamingAverage(self.window_size) if self.smooth else None

    def step(self, metrics: float, epoch: int | None = None) -> None:
        """Take a metric in and change the learning rates if it is time.

        Args:
            metrics: a number or a one-element tensor.
            epoch: its number; None: one more than the last.
        """
        current = float(metrics)
        self._welcome_groups()
        if self.smooth and self._streaming_avg is not None:
            current = self._streaming_avg.streamavg(current)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if self.cooldown_counter > 0 or self.warmup_counter > 0:
            if self.cooldown_counter > 0:
                self.cooldown_counter -= 1
            else:
                self.warmup_counter -= 1
            self.num_bad_epochs = 0
            self.num_good_epochs = 0
        else:
            self._judge(current)
        self._last_lr = _read_lrs(self.optimizer)

    def _welcome_groups(self) -> None:
        """See that groups which have joined have bounds and a learning rate to begin anew with."""
        groups = len(self.optimizer.param_groups)
        for name, default in self._default_bounds.items():
            bounds = getattr(self, name)
            if len(bounds) < groups and default is None:
                raise IndexError(
                    f"there are {len(bounds)} {name} but {groups} parameter groups; give one number for all"
                )
        for name, default in self._default_bounds.items():
            getattr(self, name).extend([default] * (groups - len(getattr(self, name))))
        self._init_lrs += _read_lrs(self.optimizer)[len(self._init_lrs) :]

    def _judge(self, current: float) -> None:
        if self.is_better(current, self.best):
            self.best = current
            self.num_good_epochs += 1
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
            self.num_good_epochs = 0
        if self.num_good_epochs > self.patience:
            self._increase_lr()
            self.warmup_counter = self.warmup
            self.num_good_epochs = 0
        elif self.num_bad_epochs > self.patience:
            self._reduce_lr()
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0

    def is_better(self, current: float, best: float) -> bool:
        """Whether ``current`` is better than ``best`` by more than the threshold."""
        sign = -1.0 if self.mode == "min" else 1.0
        bound = best * (1.0 + sign * self.threshold) if self.threshold_mode == "rel" else best + sign * self.threshold
        return current < bound if self.mode == "min" else current > bound

    def _reduce_lr(self) -> None:
        at_minimum = True
        for index, (group, least) in enumerate(zip(self.optimizer.param_groups, self.min_lrs, strict=False)):
            old = float(group["lr"])
            new = max(old * self.factor, least)
            if old - new > self.eps:
                _write_lr(group, new)
                if self.verbose:
                    print(f"Epoch {self.last_epoch}: reducing learning rate of group {index} to {new:.4e}.")
            at_minimum = at_minimum and not group["lr"] > least
        if at_minimum:
            self.reset_start -= 1
            if self.reset_start <= 0:
                self._reset()

    def _increase_lr(self) -> None:
        for index, (group, most) in enumerate(zip(self.optimizer.param_groups, self.max_lrs, strict=False)):
            old = float(group["lr"])
            new = min(old / self.factor, most)
            if new - old > self.eps:
                _write_lr(group, new)
                if self.verbose:
                    print(f"Epoch {self.last_epoch}: increasing learning rate of group {index} to {new:.4e}.")
        self.reset_start = self.reset_start_original

    def _reset(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self._init_lrs, strict=False):
            _write_lr(group, lr)
        self._begin()
        if self.verbose:
            print("Scheduler reset to initial state.")

    def get_last_lr(self) -> list[float | Tensor]:
        """The groups' learning rates after the last step."""
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, the learning rates included."""
        state = {name: getattr(self, name) for name in self._STATE}
        if self.smooth and self._streaming_avg is not None:
            state["_streaming_avg"] = self._streaming_avg.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, and set the groups' learning rates to those of it; what it lacks stays as it is."""
        for name in self._STATE:
            if name in state_dict:
                setattr(self, name, state_dict[name])
        if "_streaming_avg" in state_dict:
            self._streaming_avg = StreamingAverage(self.window_size)
            self._streaming_avg.load_state_dict(state_dict["_streaming_avg"])
        if "_last_lr" in state_dict:
            for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=False):
                _write_lr(group, lr)
