"""What follows the weights from step to step: their exponential moving average, and copies in a narrower dtype."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, layout

if TYPE_CHECKING:
    from .backends import Backend
    from .optimizer import FusedOptimizer

KEY = "ema"  # of the average in a parameter's state
COPY_DTYPES = (torch.bfloat16, torch.float16)


class Followers:
    """Options of an optimizer about what follows its weights, as `fusedstep.Options` describes them."""

    def __init__(self, ema_decay: float | None = None, weights_copy: torch.dtype | None = None) -> None:
        if ema_decay is not None:
            checks.check_fraction("ema_decay", ema_decay, one_allowed=False)
        if weights_copy is not None and weights_copy not in COPY_DTYPES:
            raise ValueError(
                f"Invalid weights_copy: {weights_copy!r} (it must be {' or '.join(map(str, COPY_DTYPES))})"
            )
        self.ema_decay = None if ema_decay is None else float(ema_decay)
        self.weights_copy = weights_copy
        self.copies: dict[Tensor, Tensor] = {}
        self.swapped = False

    def __getstate__(self) -> dict[str, Any]:
        self.refuse_swapped("copying or pickling the optimizer")
        return {"ema_decay": self.ema_decay, "weights_copy": self.weights_copy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def refuse_swapped(self, what: str) -> None:
        """Raise RuntimeError if the parameters are the averages, which ``what`` would take for the weights."""
        if self.swapped:
            raise RuntimeError(
                f"{what} inside swap_ema(): the parameters are the averages there; leave the block first"
            )

    @property
    def average_weight(self) -> float:
        """The weight of the new parameter in the average."""
        return 0.0 if self.ema_decay is None else 1.0 - self.ema_decay

    @property
    def any(self) -> bool:
        return self.ema_decay is not None or self.weights_copy is not None

    def check(self, optimizer: str, param: Tensor, state: dict[str, Any], what: str) -> None:
        """Raise RuntimeError unless what ``state`` has, and ``param`` itself, can be followed."""
        if self.weights_copy is not None and param.is_complex():
            raise RuntimeError(
                f"{optimizer}: weights_copy={self.weights_copy} cannot copy a complex parameter ({what})"
            )
        average = state.get(KEY)
        if self.ema_decay is not None and isinstance(average, Tensor):
            checks.check_state(optimizer, KEY, average, param, param.shape, None, what)

    def fields(
        self, param: Tensor, tensor: Tensor, state: dict[str, Any], backend: Backend, weight: Callable[[], Tensor]
    ) -> dict[str, Tensor | None]:
        """The average and the copy in ``param``'s `Record`, laid out like ``tensor``; made of ``weight`` if missing."""
        average = copy = None
        if self.ema_decay is not None:
            average = self._usable(state.get(KEY), average_dtype(param), param, tensor, backend, weight)
            state[KEY], average = average
        if self.weights_copy is not None:
            copy = self._usable(self.copies.get(param), self.weights_copy, param, tensor, backend, weight)
            self.copies[param], copy = copy
        return {"average": average, "copy": copy}

    @staticmethod
    def _usable(
        value: Any, dtype: torch.dtype, param: Tensor, tensor: Tensor, backend: Backend, weight: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``value``, or else the weight, in that dtype; and its memory as a kernel can take it."""
        if not isinstance(value, Tensor):
            value = weight().to(dtype, copy=True, memory_format=torch.preserve_format)
        elif value.dtype != dtype or value.device != param.device:
            value = value.to(param.device, dtype)
        usable = backend.state_memory(value, tensor)
        if usable is None:
            value = usable = layout.laid_out_as(value, tensor)
        return value, usable

    def copies_of(
        self, memory: Iterable[tuple[Tensor, Tensor]], weight_of: Callable[[Tensor], Tensor]
    ) -> dict[Tensor, Tensor]:
        """A copy of every parameter, given with the memory that a step updates; made where there is none yet."""
        if self.weights_copy is None:
            raise RuntimeError("there are no copies of the weights; give the optimizer weights_copy=torch.bfloat16")
        copies = {}
        for param, tensor in memory:
            copy = self.copies.get(param)
            if copy is None or copy.device != param.device:
                if layout.is_wrapper(param) or not layout.is_dense(tensor):
                    copy = weight_of(param).to(self.weights_copy, copy=True, memory_format=torch.preserve_format)
                else:
                    copy = layout.laid_out_as(weight_of(param), tensor, self.weights_copy)
                self.copies[param] = copy
            copies[param] = copy
        return copies

    @torch.no_grad()
    def renew_copies(self, weight_of: Callable[[Tensor], Tensor]) -> None:
        """Copy the parameters as they are now; their averages while these are in their place."""
        for param, copy in self.copies.items():
            copy.copy_(param if self.swapped else weight_of(param))

    def adopt(self, param: Tensor, value: Tensor) -> Tensor:
        """A loaded average as it is kept."""
        if layout.is_wrapper(value) or layout.is_wrapper(param):
            return value.detach().to(param.device, average_dtype(param), copy=True)
        return layout.dense_like(param, average_dtype(param)).copy_(value.detach())

    def report(self, states: Iterable[dict[str, Any]]) -> None:
        """Warn if loaded ``states`` were made with another choice about averages than this one."""
        started = [state for state in states if isinstance(state, dict) and float(state.get("step", 1)) > 0]
        if self.ema_decay is None and any(isinstance(state.get(KEY), Tensor) for state in started):
            warnings.warn(
                "the loaded state has averages of the weights ('ema'), which are dropped because this optimizer was "
                "made without ema_decay",
                stacklevel=2,
            )
        if self.ema_decay is not None and not all(isinstance(state.get(KEY), Tensor) for state in started):
            warnings.warn(
                "the loaded state has parameters without an average of the weights ('ema'): theirs begins as the "
                "parameter before its next step",
                stacklevel=2,
            )


def average_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the average of a parameter: at least fp32."""
    return torch.promote_types(param.dtype, torch.float32)


def follow(weight: Tensor, average: Tensor | None, copy: Tensor | None, share: float) -> None:
    """Update what follows a ``weight``: the reference for the kernels. ``share``: of the weight in its average."""
    if average is not None:
        average.add_(share * (weight.to(average.dtype) - average))
    if copy is not None:
        copy.copy_(weight)


@contextlib.contextmanager
def swapped(optimizer: FusedOptimizer) -> Iterator[None]:
    """Exchange the parameters with their averages, and back."""
    followers = optimizer._followers
    if followers.ema_decay is None:
        raise RuntimeError("there are no averages of the weights; give the optimizer ema_decay")
    if followers.swapped:
        raise RuntimeError("the weights are already exchanged with their averages")
    # A parameter that is listed twice would change places twice.
    params = dict.fromkeys(param for group in optimizer.param_groups for param in group["params"])
    pairs = [(param, optimizer.state[param][KEY]) for param in params if KEY in optimizer.state.get(param, ())]
    for index, param in enumerate(params):
        what = checks.describe(index, None, param)
        followers.check(type(optimizer).__name__, param, optimizer.state.get(param, {}), what)
    exchanged: list[tuple[Tensor, Tensor, Tensor | None]] = []
    followers.swapped = True
    try:
        with torch.no_grad():
            for param, average in pairs:
                weights = param.clone()
                # What a narrower parameter cannot hold would be lost on the way back.
                kept = None if param.dtype == average.dtype else average.clone()
                param.copy_(average)
                average.copy_(weights)
                exchanged.append((param, average, kept))
            optimizer.renew_copies()
        yield
    finally:
        with torch.no_grad():
            for param, average, kept in reversed(exchanged):  # parameters may share memory
                averages = param.clone() if kept is None else kept
                param.copy_(average)
                average.copy_(averages)
        followers.swapped = False
        optimizer.renew_copies()
