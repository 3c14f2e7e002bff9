"""What an optimizer keeps beside its parameters. Each kind has a file of its own, behind the interface `Kind`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..caller import level_of_the_user
from .copy import WeightsCopy
from .ema import Ema
from .kind import Entry, Kind, copied
from .states import States
from .step import StepCount
from .weights import Weights, is_seed

__all__ = ["SEED", "Entry", "Kept", "Kind"]

SEED = "rounding_seed"  # the key in a state_dict


class Kept:
    """All kinds, in the order in which a parameter's things are made."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.weights = Weights(*map(options.get, ("master_weights", "kahan", "rounding", "rounding_seed")))
        self.states = States(self.weights, options["state_dtype"], options["wide_states"])
        self.step = StepCount(self.weights)
        self.ema = Ema(self.weights, options["ema_decay"])
        self.copy = WeightsCopy(self.weights, options["weights_copy"])
        self.kinds: tuple[Kind, ...] = (self.step, self.weights, self.states, self.ema, self.copy)

    def __iter__(self) -> Iterator[Kind]:
        return iter(self.kinds)

    def keys(self, entry: Entry) -> list[str]:
        """Under which keys of its state a parameter has, or will have, something."""
        return [key for kind in self for key in kind.keys(entry)]

    def any_keys(self, entry: Entry) -> bool:
        """Whether there are such keys."""
        return any(kind.keys(entry) for kind in self.kinds)

    def fields(self, entry: Entry) -> dict[str, Any]:
        """What a parameter's `Record` has beside the parameter; missing things are made."""
        fields: dict[str, Any] = {}
        for kind in self.kinds:
            fields |= kind.fields(entry)
        return fields

    def step_fields(self) -> dict[str, Any]:
        """What each `Step` has of what is kept."""
        return {name: value for kind in self for name, value in kind.step_fields().items()}

    def load(self, key: Any, entry: Entry) -> dict[str, Any]:
        """A loaded state, ``entry.state``, as it is to be kept; whatever is of no kind stays as it is.

        Raises:
            ValueError: it cannot be the parameter's, which the state_dict calls ``key``.
        """
        rest = dict(entry.state)
        taken: dict[str, Any] = {}
        for kind in self:
            taken |= kind.load(key, entry, rest)
        taken |= {name: copied(value, entry.param.device) for name, value in rest.items()}
        return {name: taken[name] for name in entry.state if name in taken}

    def report(self, loaded: list[Entry]) -> None:
        """Warn of what becomes of loaded states with these options."""
        found = dict.fromkeys(text for kind in self for text in kind.report(loaded))
        if found:
            warnings.warn(
                f"{type(loaded[0].rule).__name__}: the loaded state was saved with other precision options and is "
                f"converted: {'; '.join(found)}",
                stacklevel=level_of_the_user(),
            )

    # The seed of stochastic rounding is no parameter's own.

    def write_seed(self, row: dict[str, Any]) -> None:
        """Put the seed where it is needed to go on with the same random numbers into a part of a state_dict."""
        if self.weights.format.is_random:
            row[SEED] = self.weights.seed

    def seed_of(self, state_dict: dict[str, Any]) -> int:
        """The seed of a loaded state, or these options'.

        The groups have it too: distributed checkpoints have nothing beside groups and states.

        Raises:
            ValueError: it is no seed.
        """
        found = self.weights.seed
        for part in (*reversed(state_dict["param_groups"]), state_dict):
            found = part.get(SEED, found)
            if not is_seed(found):
                raise ValueError(f"loaded state dict: '{SEED}' is {found!r}, expected a whole number below 2**63")
        return found

    def followed(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """A parameter's weight as averages and copies follow it."""
        return self.weights.followed(param, state)
