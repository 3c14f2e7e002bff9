"""Plans of a step: which kernel call updates which parameters, after a look at everything; missing states are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from . import backends, checks, layout, precision, sharding
from .backends.plan import Plan, Slot
from .counts import count_of, new_counter

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

# Index, name, parameter, backend (None: it can take no part in a step, and has no gradient) and variant.
Place: TypeAlias = tuple[int, str | None, Tensor, backends.Backend | None, Any]


def named(group: dict[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
    """The parameters of a group with their names, None where there is none."""
    params = group["params"]
    names = group.get("param_names") or ()
    return zip(chain(names, repeat(None)), params, strict=False)  # the user may have edited the list


def first_names(optimizer: FusedOptimizer) -> dict[Tensor, str | None]:
    """The name of each parameter by which its states are stored: of one that is listed twice, the first."""
    names: dict[Tensor, str | None] = {}
    for group in optimizer.param_groups:
        for name, param in named(group):
            names.setdefault(param, name)
    return names


def snapshot(options: Any) -> Any:
    """A copy of options to compare with later, and of the containers in them, which the user may edit in place."""
    if isinstance(options, Mapping):
        return {key: snapshot(value) for key, value in options.items()}
    if type(options) in (list, tuple):
        return type(options)(map(snapshot, options))
    return options


@torch.no_grad()
def look_up(optimizer: FusedOptimizer, needs_norm: bool) -> list[list[Place]]:
    """Every parameter of each group, after all checks of it, its gradient and its states; nothing is created.

    ``needs_norm``: the step takes the norm of all gradients together.
    """
    optimizer._learning_rates.settle(optimizer.param_groups)
    chosen: list[list[Place]] = []
    any_reduces = False
    index = 0
    for group in optimizer.param_groups:
        row = []
        by_norm = needs_norm or optimizer.clips_by_norm(group)
        for name, param in named(group):
            what = checks.describe(index, name, param)
            try:
                backend, variant = _checked(optimizer, group, name, param, what)
            except (RuntimeError, TypeError, ValueError):
                if param.grad is not None:
                    raise
                backend = variant = None
            if param.grad is not None:
                checks.check_grad(type(optimizer), group, param, param.grad, what)
                any_reduces = any_reduces or optimizer.rule_of(variant)[1]
                if by_norm:
                    checks.check_norm_is_local(type(optimizer), param, what)
            row.append((index, name, param, backend, variant))
            index += 1
        for variant in {variant for *_, backend, variant in row if backend is not None}:
            optimizer._hyper_of(group, variant)
        chosen.append(row)
    norm_of_each = any(map(optimizer.clips_by_norm, optimizer.param_groups))
    sharding.check(optimizer, needs_norm, norm_of_each, any_reduces)
    return chosen


def _checked(
    optimizer: FusedOptimizer, group: dict[str, Any], name: str | None, param: Tensor, what: str
) -> tuple[backends.Backend, Any]:
    """The backend and the variant of a parameter, after all checks of it and its states if a step can update it."""
    variant = optimizer.variant_of(group, name, param)
    cls, reduces = type(optimizer).__name__, optimizer.rule_of(variant)[1]
    backend = optimizer._select(param, reduces)
    if param.grad is None and not started(optimizer, param):
        return backend, variant
    if param.grad is not None:
        checks.check_real(type(optimizer), reduces, param, what)
    memory = layout.local(param.detach())
    checks.check_param(type(optimizer), reduces, param, memory, what)
    checks.check_memory(cls, what, param)
    if memory._is_zerotensor():
        raise ValueError(f"{what}: torch keeps no memory for its zeros; pass a .clone() of it")
    optimizer._precision.check_param(cls, reduces, param, name, what)
    _check_kept(optimizer, group, name, param, backend, what)
    return backend, variant


def _check_kept(
    optimizer: FusedOptimizer,
    group: dict[str, Any],
    name: str | None,
    param: Tensor,
    backend: backends.Backend,
    what: str,
) -> None:
    """Raise RuntimeError if what is kept for a parameter cannot go with it."""
    cls, kept, states = type(optimizer).__name__, optimizer.state.get(param, {}), optimizer.states_of(group)
    for key, value in kept.items():
        if isinstance(value, Tensor):
            if value.layout != torch.strided:
                raise RuntimeError(f"{cls}: state '{key}' has layout {value.layout}, it must be dense like {what}")
            checks.check_memory(cls, f"state '{key}' of {what},", value)
    if optimizer._followers.any:
        optimizer._followers.check(cls, param, kept, what)
    if precision.foreign(kept):
        precision.check_kept(cls, param, kept, states, optimizer.non_negative, what)
    for state in states:
        value, shape = kept.get(state), optimizer.state_shape(state, group, name, param)
        plain = isinstance(value, Tensor) and value.dtype not in precision.CODES
        if plain and shape is not None:
            checks.check_state(cls, state, value, param, shape, backend.dtypes, what)


@torch.no_grad()
def check_loaded_group(optimizer: FusedOptimizer, group: dict[str, Any]) -> None:
    """Raise what the next step would raise of a group's options and states, whatever has a gradient then."""
    variants = set()
    for index, (name, param) in enumerate(named(group)):
        variant = optimizer.variant_of(group, name, param)
        variants.add(variant)
        if param in optimizer.state:
            backend = optimizer._select(param, optimizer.rule_of(variant)[1])
            _check_kept(optimizer, group, name, param, backend, checks.describe(index, name, param))
    for variant in variants:
        hyper = optimizer._hyper_of(group, variant)
        if not any(isinstance(value, Tensor) and value.device.type != "cpu" for value in hyper):
            optimizer.prepare(optimizer.Hyper(*map(float, hyper)), 1)
    checks.check_flag("maximize", group["maximize"])
    optimizer._check_call(None)


def started(optimizer: FusedOptimizer, param: Tensor) -> bool:
    """Whether something is kept for a parameter."""
    return param in optimizer.state or param in optimizer._counters


def undo_of(optimizer: FusedOptimizer) -> Callable[[], None]:
    """What brings back all that is kept for parameters, as it is now, after plans were built."""
    states = {param: dict(state) for param, state in optimizer.state.items() if isinstance(state, dict)}
    before, counters, copies = set(optimizer.state), dict(optimizer._counters), dict(optimizer._followers.copies)

    def undo() -> None:
        for param in optimizer.state.keys() - before:
            del optimizer.state[param]
        for kept, state in [
            *((kept, optimizer.state[param]) for param, kept in states.items()),
            (counters, optimizer._counters),
            (copies, optimizer._followers.copies),
        ]:
            state.clear()
            state.update(kept)

    return undo


def build(optimizer: FusedOptimizer, chosen: list[list[Place]]) -> list[Plan]:
    """Create missing states, and plan one kernel call per group, backend and device."""
    _forget_replaced(optimizer)
    planned: list[tuple[tuple[Any, ...], bool, list[Slot]]] = []
    bystanders: list[Slot] = []
    names = first_names(optimizer)
    for group_index, (group, row) in enumerate(zip(optimizer.param_groups, chosen, strict=True)):
        states = optimizer.states_of(group)
        buckets: dict[Any, list[Slot]] = {}
        seen: Counter[Tensor] = Counter()
        listed = Counter(param for _, _, param, *_ in row)
        for index, name, param, backend, variant in row:
            if backend is None:
                bystanders.append(Slot(index, name, param, None, None, ()))
                continue
            # A parameter that is listed twice is updated twice, one call after the other; the last one may write
            # to its gradient.
            seen[param] += 1
            is_last = seen[param] == listed[param]
            bucket = (backend, variant, param.device, backend.bucket(param), seen[param], is_last)
            if param.grad is None and not started(optimizer, param):
                slot = Slot(index, name, param, None, None, ())
            else:
                reduces = optimizer.rule_of(variant)[1]
                slot = _slot(optimizer, index, name, param, group, states, backend, reduces, names[param])
            buckets.setdefault(bucket, []).append(slot)
        for (backend, variant, *_, is_last), slots in buckets.items():
            planned.append(((backend, group_index, group, variant, states), is_last, slots))
    if planned:
        planned[0][-1].extend(bystanders)  # any plan notices a gradient that comes later
    options = optimizer._gradients.options
    plans = []
    for (backend, *place), is_last, slots in planned:
        plan = backend.plan(type(optimizer), *place, slots)
        plan.grads_change = optimizer._gradients.writes
        plan.zero_grads = is_last and options.zero_grads
        plan.write_grads = is_last and options.write_grads
        plan.average_weight = optimizer._followers.average_weight
        plan.graphs = optimizer._graphs
        plans.append(plan)
    return plans


def _forget_replaced(optimizer: FusedOptimizer) -> None:
    """Drop what is kept for parameters that are in no group any more; ``state`` is the user's, as in torch."""
    params = {param for group in optimizer.param_groups for param in group["params"]}
    for kept in (optimizer._counters, optimizer._followers.copies):
        for param in kept.keys() - params:
            del kept[param]
    for accumulator in optimizer._accumulators:
        accumulator.forget_replaced()


def _slot(
    optimizer: FusedOptimizer,
    index: int,
    name: str | None,
    param: Tensor,
    group: dict[str, Any],
    states: tuple[str, ...],
    backend: backends.Backend,
    reduces: bool,
    first_name: str | None,
) -> Slot:
    """The slot of a parameter that has a gradient or has had one; missing states are made."""
    tensor = backend.memory(param, reduces)
    keeps = optimizer._precision.keeps(param) or optimizer._followers.ema_decay is not None
    if states or optimizer.step_form != "absent" or keeps:
        state = optimizer.state[param]
    else:
        state = {}
    step = step_counter(optimizer, group, param, tensor, state, states)
    storage = None
    if settle(optimizer, param, first_name, group):
        storage = optimizer._precision.storage(state, states, param, tensor, backend.state_memory)
    tensors = []
    for key in states:
        shape = optimizer.state_shape(key, group, name, param)
        if shape is None:
            tensors.append(None)
            continue
        value = state.get(key)
        if not isinstance(value, Tensor):  # the parent class may have a number where it has not started
            value = state[key] = optimizer.init_state(key, group, name, param)
        elif value.device != param.device:
            value = state[key] = value.to(param.device)
        usable = backend.state_memory(value, tensor)
        if usable is None:
            value = state[key] = layout.laid_out_as(value, tensor if shape == param.shape else value.contiguous())
            usable = value
        tensors.append(usable)
    followers = ()
    if optimizer._followers.any:
        followers = optimizer._followers.of(param, tensor, state, backend, partial(weight_of, optimizer, param))
    matrices = optimizer.matrices(group, name, param) if reduces else None
    return Slot(index, name, param, tensor, step, tuple(tensors), None, matrices, *followers, storage=storage)


def make_states(
    optimizer: FusedOptimizer,
    index: int,
    name: str | None,
    param: Tensor,
    group: dict[str, Any],
    first_name: str | None,
) -> None:
    """Make the missing states of a parameter as its first step would."""
    reduces = optimizer.rule_of(optimizer.variant_of(group, name, param))[1]
    copied = param in optimizer._followers.copies
    states = optimizer.states_of(group)
    _slot(optimizer, index, name, param, group, states, optimizer._select(param, reduces), reduces, first_name)
    if not copied:  # it would not see the weights that are loaded before the first step
        optimizer._followers.copies.pop(param, None)


def settle(
    optimizer: FusedOptimizer, param: Tensor, name: str | None, group: dict[str, Any], weight_too: bool = True
) -> bool:
    """Bring a parameter's state into the form that the precision options ask for; False: it needs none.

    ``weight_too``: also what is kept beside the weight itself.
    """
    if optimizer._precision.plain and not precision.foreign(optimizer.state.get(param, {})):
        return False
    state = optimizer.state[param]

    def new_state(key: str, like: Tensor) -> Tensor:
        return optimizer.init_state(key, group, name, like)

    states = [key for key in optimizer.states_of(group) if optimizer.state_shape(key, group, name, param) is not None]
    for key in (*states, *map(precision.scale_name, states), *precision.COMPANIONS.values()):
        value = state.get(key)
        if isinstance(value, Tensor) and value.device != param.device:
            state[key] = value.to(param.device)
    if weight_too:
        optimizer._precision.settle_weight(state, param)
    exact = optimizer.exact_states(group)
    optimizer._precision.settle(state, states, param, name, new_state, optimizer.non_negative, exact)
    return True


def weight_of(optimizer: FusedOptimizer, param: Tensor) -> Tensor:
    """A parameter's weight as averages and copies follow it."""
    return optimizer._precision.followed_weight(param, optimizer.state.get(param, {}))


def step_counter(
    optimizer: FusedOptimizer,
    group: dict[str, Any],
    param: Tensor,
    tensor: Tensor,
    state: dict[str, Any],
    states: tuple[str, ...],
) -> Tensor:
    """The counter of the updates of ``param`` so far, on its device, by which a kernel goes."""
    if optimizer.step_form != "absent":
        holder, key = state, "step"
        count = state.get("step", 0.0)
    else:
        saved = optimizer._precision.counts(param)
        holder, key = (state, "step") if saved else (optimizer._counters, param)
        count = state.pop("step", optimizer._counters.get(param))  # of other options too
        missing = all(state.get(name) is None for name in states)
        if count is None:
            count = 0.0 if missing else 1.0
        elif states and missing and optimizer.begins_anew(group):
            # Without a buffer, because momentum was 0 so far or the state was cleared, the kernel's next step is a
            # first one; the steps that were done still count elsewhere.
            optimizer._earlier[param] = optimizer._earlier.get(param, 0) + count_of(count)
            count = 0.0
    if not (
        isinstance(count, Tensor)
        and count.dtype == torch.float32
        and count.device == tensor.device
        and count.dim() == 0
        and not layout.is_lazy(count)
    ):
        if isinstance(count, Tensor) and count.dtype == torch.float32:
            count = count.detach().reshape(()).to(tensor.device, copy=True)
        else:
            count = new_counter(float(count), tensor.device)
    holder[key] = count
    return count
