"""What torch.distributed.checkpoint (DCP) needs to see of an optimizer, which is more than `state_dict` alone shows.

It asks ``if optimizer.state`` before it saves or loads. If the answer is no, it makes a step with zero gradients and a
learning rate of 0, so that there are states: a template to load into, whose keys are all that it loads. That step would
be counted, would move schedules and run hooks. Here the question itself makes the states, with no step done, and the
next step that plans anew drops again what nobody has written into: a question leaves no trace in the training.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, layout, planning
from .kept import SEED, Entry
from .kept.states import scale_name
from .schedules import on_device

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

ASKS = "torch.distributed.checkpoint.state_dict"  # the module that does
# In the groups of a state_dict: DCP saves nothing that is in neither a group nor a state.
GROUP_KEYS = (SEED, on_device.COUNT, on_device.STEPS)

Made = dict[str, tuple[Any, int | None]]  # what was made under a key of a state, and its version


class States(defaultdict):
    """``optimizer.state``, which sees DCP's question. Copies and pickles of it are plain dictionaries."""

    owner: weakref.ref[FusedOptimizer] | None = None

    def __bool__(self) -> bool:
        if sys._getframe(1).f_globals.get("__name__") == ASKS and self.owner is not None:
            optimizer = self.owner()
            if optimizer is not None and optimizer.state is self:
                make_template(optimizer)
                return True  # also where the rule has no states
        return len(self) > 0

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict,), None, None, iter(self.items())

    def copy(self) -> defaultdict:
        return defaultdict(dict, self)

    __copy__ = copy


def own(optimizer: FusedOptimizer) -> None:
    """Make ``optimizer.state`` a `States` if it is another dictionary, torch's or the user's."""
    state = optimizer.state
    if not (isinstance(state, States) and state.owner is not None and state.owner() is optimizer):
        optimizer.state = States(dict, state)
        optimizer.state.owner = weakref.ref(optimizer)


@torch.no_grad()
def make_template(optimizer: FusedOptimizer) -> None:
    """Make the states that the first step of each parameter would make, for those that have done none."""
    for entry in chain.from_iterable(planning.entries(optimizer)):
        # A parameter that is listed twice has states the second time.
        entry = entry._replace(state=optimizer.state.get(entry.param, {}))
        asked = entry.param.requires_grad or entry.param in optimizer.state
        if asked and _lacks_states(entry):
            _make_states(entry)
    rows: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
    write_numbers(optimizer, rows)
    for group, row in zip(optimizer.param_groups, rows, strict=True):
        group.update((key, row[key]) for key in GROUP_KEYS if key in row)


def write_numbers(optimizer: FusedOptimizer, rows: list[dict[str, Any]]) -> None:
    """Put into the groups of a state_dict what the optimizer has beside its groups and states."""
    for row in rows:
        for key in GROUP_KEYS:
            row.pop(key, None)
        optimizer.stepper.kept.write_seed(row)
    optimizer.stepper.learning_rates.write_numbers(optimizer.param_groups, rows, optimizer.most_steps)


def forget_template(optimizer: FusedOptimizer) -> None:
    """Drop what `make_template` made, unless somebody has written into it: weights may have been loaded since."""
    for param, made in optimizer.stepper.template.items():
        state = optimizer.state.get(param)
        if state is None or not all(_is_as_made(state.get(key), *what) for key, what in made.items()):
            continue
        for key in made:
            del state[key]
        if not state:
            del optimizer.state[param]
    optimizer.stepper.template.clear()
    for group in optimizer.param_groups:
        for key in GROUP_KEYS:
            group.pop(key, None)


def is_blank(state: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether the rule's states are a template's that no step has written into: all of them are -0.0."""
    found = [state.get(scale_name(name), state[name]) for name in names if isinstance(state.get(name), Tensor)]
    return bool(found) and all(map(_is_negative_zero, found))


def _lacks_states(entry: Entry) -> bool:
    """Whether a step would make states for a parameter that has done none."""
    optimizer, param, state = entry.rule, entry.param, entry.state
    if param in optimizer.stepper.template and state.keys() >= optimizer.stepper.template[param].keys():
        return False
    count = state.get("step", optimizer.stepper.kept.step.beside.get(param))
    if optimizer.step_form == "absent" and count is not None and float(count) == 0:
        return True  # every step was skipped, and `state_dict` shows no buffers
    if state.keys() >= set(optimizer.stepper.kept.keys(entry)):
        return False
    if count is None:
        return not any(isinstance(state.get(key), Tensor) for key in optimizer.state_names)
    return float(count) == 0


def _make_states(entry: Entry) -> None:
    optimizer, param = entry.rule, entry.param
    absent, states = optimizer.step_form == "absent", optimizer.states_of(entry.group)
    counters = optimizer.stepper.kept.step.beside
    if absent and counters.pop(param, None) is not None:
        for key in (*states, *map(scale_name, states)):
            optimizer.state.get(param, {}).pop(key, None)
    before = set(optimizer.state.get(param, ()))
    planning.make_states(entry)
    state = optimizer.state.get(param, {})
    if absent:
        # Without a count a buffer means that there was a step. Zeros of this sign, which no step writes into a whole
        # buffer, say that there was none; to torch's classes they are zeros.
        counters.pop(param, None)
        for key in states:
            _fill(state.get(scale_name(key), state[key]), -0.0)
    made = {key: (value, _version(value)) for key, value in state.items() if key not in before}
    if made:
        optimizer.stepper.template[param] = made


def _fill(tensor: Tensor, value: float) -> None:
    layout.as_real(layout.local(tensor)).fill_(value)


def _is_negative_zero(tensor: Tensor) -> bool:
    memory = layout.as_real(layout.local(tensor))
    if memory.numel() == 0 or memory.dtype not in checks.ARITHMETIC_DTYPES:
        return False
    return bool(((memory == 0) & torch.signbit(memory)).all())


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _is_as_made(value: Any, made: Any, version: int | None) -> bool:
    return value is made and _version(value) == version
