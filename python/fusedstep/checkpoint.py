"""What `state_dict()` shows, and how one is loaded: this class's, or the torch class's of the same name."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import StateDict

from . import averages, checks, dcp, layout, precision
from .counts import as_counts, count_of, new_counter
from .planning import check_loaded_group, named

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


def written(optimizer: FusedOptimizer, state_dict: StateDict) -> StateDict:
    """The state_dict that torch's base class has made, as the torch class of the optimizer's name would write it."""
    if optimizer._precision.rounding == "stochastic":
        state_dict[dcp.SEED] = optimizer._precision.rounding_seed
    dcp.write_numbers(optimizer, state_dict["param_groups"])
    _write_counts(optimizer, state_dict)
    if optimizer.step_form == "absent":
        # A parameter whose every step was skipped has buffers but has not started.
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for key, param in zip(ids, params, strict=True):
            counter = optimizer._counters.get(param)
            if key in state_dict["state"] and counter is not None and counter.item() == 0:
                buffers = {*optimizer.state_names, *map(precision.scale_name, optimizer.state_names)}
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
    before, count = dict(vars(optimizer)), optimizer._learning_rates.count
    try:
        yield
    except BaseException:
        vars(optimizer).clear()
        vars(optimizer).update(before)
        if count is not None:
            optimizer._learning_rates.count = count
        raise


@contextlib.contextmanager
def loading(optimizer: FusedOptimizer) -> Iterator[dict[Tensor, dict[str, Any]]]:
    """Around a call of torch's base class that loads a state_dict, which finds no states in it; those become ours.

    In the end the given dictionary has them by parameter, and the next step has been found possible with them.
    """
    followed = optimizer._learning_rates.followed(optimizer.param_groups)
    loaded: dict[Tensor, dict[str, Any]] = {}
    rest: dict[Any, Any] = {}
    options = optimizer._precision

    def take_state(_: Any, given: StateDict) -> StateDict:
        _check_form(given)
        ids = [group["params"] for group in given["param_groups"]]
        params = [group["params"] for group in optimizer.param_groups]
        if [len(group) for group in ids] != [len(group) for group in params]:
            return given  # torch reports the mismatch right after this
        nonlocal options
        options = options.with_seed_of(given)
        places = ((group, *place) for group in optimizer.param_groups for place in named(group))
        by_id = dict(zip(chain.from_iterable(ids), places, strict=True))
        states = {}
        for key, value in given["state"].items():
            if key not in by_id:
                rest[key] = value
                continue
            if not isinstance(value, dict):
                raise ValueError(f"loaded state dict: the state of parameter {key} is {value!r}, expected a dict")
            # A flattened checkpoint that lacks a value has an empty dict in its place.
            if state := {name: part for name, part in value.items() if not (isinstance(part, dict) and not part)}:
                loaded[by_id[key][-1]] = _adopted(optimizer, key, *by_id[key], state)
                states[key] = state
        optimizer._followers.report(states[key] for key in by_id if key in states)
        return {**given, "state": {}}

    def give_state(_: Any) -> None:
        optimizer.state.update(loaded)
        optimizer.state.update(rest)
        optimizer._counters, optimizer._earlier, optimizer._template = {}, {}, {}
        optimizer._precision = options
        for group in optimizer.param_groups:
            group.pop(dcp.SEED, None)
        optimizer._learning_rates.read_numbers(optimizer.param_groups, followed, optimizer._most_steps)

    # Last before torch's own work and first after it, so that hooks of the user see what torch would show them.
    with (
        optimizer.register_load_state_dict_pre_hook(take_state),
        optimizer.register_load_state_dict_post_hook(give_state, prepend=True),
    ):
        yield loaded
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


def _adopted(
    optimizer: FusedOptimizer,
    key: Any,
    group: dict[str, Any],
    param_name: str | None,
    param: Tensor,
    state: dict[str, Any],
) -> dict[str, Any]:
    """A parameter's loaded state: our own copies, on its device."""
    adopted = {}
    if precision.foreign(state):
        state = precision.adopted(key, param, state, optimizer.state_names, optimizer.non_negative)
    for name, value in state.items():
        label = f"'{name}' of parameter {key}"
        if name == "step":
            adopted[name] = new_counter(checks.loaded_count(label, value), param.device)
            continue
        shape = None
        if name in optimizer.state_names:
            shape = optimizer.state_shape(name, group, param_name, param)
        elif name == averages.KEY:
            shape = param.shape
        if shape is not None:
            codes = () if name == averages.KEY else precision.CODES
            checks.check_loaded(label, value, param, shape, codes)
        if isinstance(value, Tensor):
            value = value.detach()
            value = value.to_dense() if value.is_sparse else value
        if name == averages.KEY:
            if isinstance(value, Tensor) and optimizer._followers.ema_decay is not None:
                adopted[name] = optimizer._followers.adopt(param, value)
            continue
        if isinstance(value, Tensor):
            if shape == param.shape and not layout.is_wrapper(value) and not layout.is_wrapper(param):
                value = layout.dense_like(param, value.dtype).copy_(value)
            else:
                value = value.to(param.device, copy=True)
        adopted[name] = value
    if optimizer.step_form == "absent" and dcp.is_blank(adopted, optimizer.state_names):
        for name in (*optimizer.state_names, *map(precision.scale_name, optimizer.state_names)):
            adopted.pop(name, None)
    return adopted
