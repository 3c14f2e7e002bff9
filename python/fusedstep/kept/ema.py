"""The exponential moving average of each parameter over the steps."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks, gathered, layout
from ..caller import level_of_the_user
from .kind import Entry, Kind
from .weights import Weights

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer

KEY = "ema"  # in a parameter's state


class Ema(Kind):
    """The option ema_decay, as `fusedstep.Options` describes it."""

    def __init__(self, weights: Weights, ema_decay: float | None) -> None:
        super().__init__()
        if ema_decay is not None:
            checks.check_fraction("ema_decay", ema_decay, one_allowed=False)
        self.weights = weights
        self.decay = None if ema_decay is None else float(ema_decay)
        self.swapped = False

    def __getstate__(self) -> dict[str, Any]:
        self.refuse_swapped("copying or pickling the optimizer")
        return self.__dict__

    def refuse_swapped(self, what: str) -> None:
        """Raise RuntimeError if the parameters are the averages, which ``what`` would take for the weights."""
        if self.swapped:
            raise RuntimeError(
                f"{what} inside swap_ema(): the parameters are the averages there; leave the block first"
            )

    def keys(self, entry: Entry) -> Iterable[str]:
        return () if self.decay is None else (KEY,)

    def check(self, entry: Entry, what: str) -> None:
        average = entry.state.get(KEY)
        if self.decay is not None and isinstance(average, Tensor):
            cls = type(entry.rule).__name__
            checks.check_state(cls, KEY, average, entry.param, entry.param.shape, None, what)

    def fields(self, entry: Entry) -> dict[str, Any]:
        if self.decay is None:
            return {}
        entry.state[KEY], average = follower(entry, self.weights, entry.state.get(KEY), average_dtype(entry.param))
        return {"average": average}

    def step_fields(self) -> dict[str, Any]:
        return {"average_weight": 0.0 if self.decay is None else 1.0 - self.decay}

    def load(self, key: Any, entry: Entry, loaded: dict[str, Any]) -> dict[str, Any]:
        if KEY not in loaded:
            return {}
        value, param = loaded.pop(KEY), entry.param
        checks.check_loaded(f"'{KEY}' of parameter {key}", value, param, param.shape)
        if self.decay is None or not isinstance(value, Tensor):
            return {}
        value = value.detach()
        value = value.to_dense() if value.is_sparse else value
        if layout.is_wrapper(value) or layout.is_wrapper(param):
            return {KEY: value.to(param.device, average_dtype(param), copy=True)}
        return {KEY: layout.dense_like(param, average_dtype(param)).copy_(value)}

    def report(self, loaded: list[Entry]) -> Iterable[str]:
        started = [entry.state for entry in loaded if float(entry.state.get("step", 1)) > 0]
        if self.decay is None and any(isinstance(state.get(KEY), Tensor) for state in started):
            warnings.warn(
                "the loaded state has averages of the weights ('ema'), which are dropped because this optimizer was "
                "made without ema_decay",
                stacklevel=level_of_the_user(),
            )
        if self.decay is not None and not all(isinstance(state.get(KEY), Tensor) for state in started):
            warnings.warn(
                "the loaded state has parameters without an average of the weights ('ema'): theirs begins as the "
                "parameter before its next step",
                stacklevel=level_of_the_user(),
            )
        return ()


def average_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the average of a parameter: at least fp32."""
    return torch.promote_types(param.dtype, torch.float32)


def follower(entry: Entry, weights: Weights, value: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``value``, or else the weight, in that dtype; and its memory as a kernel can take it."""
    param = entry.param
    if not isinstance(value, Tensor):
        weight = weights.followed(param, entry.state)
        value = weight.to(dtype, copy=True, memory_format=torch.preserve_format)
    elif value.dtype != dtype or value.device != param.device:
        value = value.to(param.device, dtype)
    usable = entry.usable(value)
    if usable is None:
        value = usable = layout.laid_out_as(value, entry.memory)
    return value, usable


def follow(weight: Tensor, average: Tensor | None, copy: Tensor | None, share: float) -> None:
    """Update the average and the copy of a ``weight``: the reference for the kernels.

    ``share``: of the weight in its average.
    """
    if average is not None:
        average.add_(share * (weight.to(average.dtype) - average))
    if copy is not None:
        copy.copy_(weight)


@contextlib.contextmanager
def swapped(optimizer: FusedOptimizer, ema: Ema, followers: Iterable[Kind]) -> Iterator[None]:
    """Exchange the parameters with their averages, and back.

    ``followers``: the kinds that must be possible for every parameter.
    """
    if ema.decay is None:
        raise RuntimeError("there are no averages of the weights; give the optimizer ema_decay")
    if ema.swapped:
        raise RuntimeError("the weights are already exchanged with their averages")
    # A parameter that is listed twice would change places twice.
    params = dict.fromkeys(param for group in optimizer.param_groups for param in group["params"])
    pairs = [(param, optimizer.state[param][KEY]) for param in params if KEY in optimizer.state.get(param, ())]
    for index, param in enumerate(params):
        entry = Entry(optimizer, {}, index, None, None, param, optimizer.state.get(param, {}))
        for kind in followers:
            kind.check(entry, entry.what)
    exchanged: list[tuple[Tensor, Tensor, Tensor | None]] = []
    ema.swapped = True
    try:
        with torch.no_grad():
            for param, average in pairs:
                weights = param.clone()
                # What a narrower parameter cannot hold would be lost on the way back.
                kept = None if param.dtype == average.dtype else average.clone()
                param.copy_(average)
                average.copy_(weights)
                exchanged.append((param, average, kept))
            gathered.drop(params)
            optimizer.renew_copies()
        yield
    finally:
        with torch.no_grad():
            for param, average, kept in reversed(exchanged):  # parameters may share memory
                averages = param.clone() if kept is None else kept
                param.copy_(average)
                average.copy_(averages)
            gathered.drop(params)
        ema.swapped = False
        optimizer.renew_copies()
