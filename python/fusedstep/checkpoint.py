"""What `state_dict()` shows, and how one is loaded: this class's, or the torch class's of the same name."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import StateDict

from . import dcp
from .counts import as_counts, count_of
from .kept import SEED, Entry
from .kept.states import scale_name, shown_as_numbers
from .planning import check_loaded_group, entries

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


def written(optimizer: FusedOptimizer, state_dict: StateDict) -> StateDict:
    """The state_dict that torch's base class has made, as the torch class of the optimizer's name would write it."""
    optimizer.stepper.kept.write_seed(state_dict)
    dcp.write_numbers(optimizer, state_dict["param_groups"])
    _write_counts(optimizer, state_dict)
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    pairs = list(zip(ids, params, strict=True))
    for key, param in pairs:
        if key in state_dict["state"]:
            state_dict["state"][key] = shown_as_numbers(optimizer, param, state_dict["state"][key])
    if optimizer.step_form == "absent":
        # A parameter whose every step was skipped has buffers but has not started.
        for key, param in pairs:
            counter = optimizer.stepper.kept.step.beside.get(param)
            if key in state_dict["state"] and counter is not None and counter.item() == 0:
                buffers = {*optimizer.state_names, *map(scale_name, optimizer.state_names)}
                kept = {name: value for name, value in state_dict["state"][key].items() if name not in buffers}
                if kept:
                    state_dict["state"][key] = kept
                else:
                    del state_dict["state"][key]
    return state_dict


def _write_counts(optimizer: FusedOptimizer, state_dict: StateDict) -> None:
    """Put the numbers of steps, in the form that the parent class has, in the place of the counters."""
    states = state_dict["state"] = dict(state_dict["state"])
    keys = [key for key, state in states.items() if isinstance(state, dict) and isinstance(state.get("step"), Tensor)]
    counters = [states[key]["step"] for key in keys]
    found = map(count_of, counters) if optimizer.step_form == "int" else as_counts(counters)
    for key, counter, count in zip(keys, counters, found, strict=True):
        if count is not counter:
            states[key] = {**states[key], "step": count}


@contextlib.contextmanager
def undone_on_error(optimizer: FusedOptimizer) -> Iterator[None]:
    """Around the loading of a state: whatever raises, the optimizer is as it was.

    Loading makes new groups and states and leaves the old ones as they are, but for a schedule's count.
    """
    before, count = dict(vars(optimizer)), optimizer.stepper.learning_rates.count
    inner = [(part, dict(vars(part))) for part in (optimizer.stepper, *optimizer.stepper.kept)]
    try:
        yield
    except BaseException:
        vars(optimizer).clear()
        vars(optimizer).update(before)
        for part, values in inner:
            vars(part).update(values)
        if count is not None:
            optimizer.stepper.learning_rates.count = count
        raise


@contextlib.contextmanager
def loading(optimizer: FusedOptimizer) -> Iterator[list[Entry]]:
    """Around a call of torch's base class that loads a state_dict, which finds no states in it; those become ours.

    In the end the given list has each parameter with its state as it was given, and the next step has been found
    possible with what became of it.
    """
    followed = optimizer.stepper.learning_rates.followed(optimizer.param_groups)
    kept = optimizer.stepper.kept
    given_states: list[Entry] = []
    loaded: dict[Tensor, dict[str, Any]] = {}
    rest: dict[Any, Any] = {}
    seed = kept.weights.seed

    def take_state(_: Any, given: StateDict) -> StateDict:
        _check_form(given)
        ids = [group["params"] for group in given["param_groups"]]
        params = [group["params"] for group in optimizer.param_groups]
        if [len(group) for group in ids] != [len(group) for group in params]:
            return given  # torch reports the mismatch right after this
        nonlocal seed
        seed = kept.seed_of(given)
        by_id = dict(zip(chain.from_iterable(ids), chain.from_iterable(entries(optimizer)), strict=True))
        for key, value in given["state"].items():
            if key not in by_id:
                rest[key] = value
                continue
            if not isinstance(value, dict):
                raise ValueError(f"loaded state dict: the state of parameter {key} is {value!r}, expected a dict")
            # A flattened checkpoint that lacks a value has an empty dict in its place.
            if state := {name: part for name, part in value.items() if not (isinstance(part, dict) and not part)}:
                entry = by_id[key]._replace(state=state)
                loaded[entry.param] = _load_one(key, entry)
                given_states.append(entry)
        return {**given, "state": {}}

    def give_state(_: Any) -> None:
        optimizer.state.update(loaded)
        optimizer.state.update(rest)
        optimizer.stepper.template = {}
        kept.step.beside, kept.step.earlier, kept.weights.seed = {}, {}, seed
        for group in optimizer.param_groups:
            group.pop(SEED, None)
        optimizer.stepper.learning_rates.read_numbers(optimizer.param_groups, followed, optimizer.most_steps)

    # Last before torch's own work and first after it, so that hooks of the user see what torch would show them.
    with (
        optimizer.register_load_state_dict_pre_hook(take_state),
        optimizer.register_load_state_dict_post_hook(give_state, prepend=True),
    ):
        yield given_states
    for index, group in enumerate(optimizer.param_groups):
        try:
            check_loaded_group(optimizer, group)
        except Exception as error:
            raise ValueError(f"loaded state dict: parameter group {index}: {error or type(error).__name__}") from error


def _check_form(given: StateDict) -> None:
    """Raise ValueError unless ``given`` is made as a state_dict is; torch would fail half-way."""
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(given.get(key), kind):
            raise ValueError(f"loaded state dict: '{key}' is {given.get(key)!r}, expected a {kind.__name__.lower()}")
    for index, group in enumerate(given["param_groups"]):
        what = f"loaded state dict: parameter group {index}"
        if not isinstance(group, dict):
            raise ValueError(f"{what} is {group!r}, expected a dict")
        for key in ("params", "lr"):
            if key not in group:
                raise ValueError(f"{what} has no '{key}'")
        for key, kind in (("params", Hashable), ("param_names", str)):
            values = group.get(key, [])
            if not isinstance(values, (list, tuple)) or not all(isinstance(value, kind) for value in values):
                raise ValueError(f"{what}: '{key}' is {values!r}, expected a list of {_NOUNS[key]}")


_NOUNS = {"params": "the keys of states", "param_names": "names"}


def _load_one(key: Any, entry: Entry) -> dict[str, Any]:
    """A parameter's loaded state: our own copies, on its device."""
    optimizer = entry.rule
    loaded_state = optimizer.stepper.kept.load(key, entry)
    if optimizer.step_form == "absent" and dcp.is_blank(loaded_state, optimizer.state_names):
        for name in (*optimizer.state_names, *map(scale_name, optimizer.state_names)):
            loaded_state.pop(name, None)
    return loaded_state
