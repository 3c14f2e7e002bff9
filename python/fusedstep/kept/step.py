"""The number of each parameter's updates so far."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import checks, layout
from ..counts import count_of, new_counter
from .kind import Entry, Kind
from .weights import Weights


class StepCount(Kind):
    """Counters, as `fusedstep.counts` has them: in the state, or beside it where the parent class shows none."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights
        self.earlier: dict[Tensor, int] = {}  # steps before the one that `begins_anew`

    def is_saved(self, entry: Entry) -> bool:
        return entry.rule.step_form != "absent" or self.weights.needs_count(entry.param)

    def keys(self, entry: Entry) -> Iterable[str]:
        return ("step",) if self.is_saved(entry) else ()

    def make(self, entry: Entry) -> None:
        self.fields(entry._replace(memory=entry.param))

    def fields(self, entry: Entry) -> dict[str, Any]:
        """The counter by which a kernel goes, on the parameter's device."""
        rule, state, param = entry.rule, entry.state, entry.param
        if rule.step_form != "absent":
            count = state.get("step", 0.0)
        else:
            states = rule.states_of(entry.group)
            count = state.pop("step", self.beside.get(param))  # of other options too
            missing = all(state.get(name) is None for name in states)
            if count is None:
                count = 0.0 if missing else 1.0
            elif states and missing and rule.begins_anew(entry.group):
                # Without a buffer, because momentum was 0 so far or the state was cleared, the kernel's next step is a
                # first one; the steps that were done still count elsewhere.
                self.earlier[param] = self.earlier.get(param, 0) + count_of(count)
                count = 0.0
        counter = _as_counter(count, entry.memory.device)
        if self.is_saved(entry):
            state["step"] = counter
        else:
            self.beside[param] = counter
        return {"step": counter}

    def load(self, key: Any, entry: Entry, loaded: dict[str, Any]) -> dict[str, Any]:
        if "step" not in loaded:
            return {}
        count = checks.loaded_count(f"'step' of parameter {key}", loaded.pop("step"))
        return {"step": new_counter(count, entry.param.device)}

    def most(self, states: dict[Tensor, Any]) -> int:
        """The largest number of steps of a parameter."""
        saved = ((param, state) for param, state in states.items() if isinstance(state, dict))
        steps = chain(((param, state["step"]) for param, state in saved if "step" in state), self.beside.items())
        return max((count_of(counter) + self.earlier.get(param, 0) for param, counter in steps), default=0)


def _as_counter(count: float | Tensor, device: torch.device) -> Tensor:
    """``count`` if it is a counter on that device, else a new one."""
    is_counter = isinstance(count, Tensor) and count.dtype == torch.float32
    if is_counter and count.device == device and count.dim() == 0 and not layout.is_lazy(count):
        return count
    if is_counter:
        return count.detach().reshape(()).to(device, copy=True)
    return new_counter(float(count), device)
