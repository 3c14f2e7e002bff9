"""Plans of a step: which kernel call updates which parameters, after a look at everything; missing states are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, count, repeat
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from . import backends, checks, exchange, layout, lines, sharding, shards
from .backends.parts import backend_of_parts
from .backends.plan import Plan
from .kept import Entry
from .kept.states import is_quantized
from .record import Record

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

# A parameter, its backend (None: it can take no part in a step, and has no gradient) and its variant.
Chosen: TypeAlias = tuple[Entry, backends.Backend | None, Any]


def named(group: dict[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
    """The parameters of a group with their names, None where there is none."""
    params = group["params"]
    names = group.get("param_names") or ()
    return zip(chain(names, repeat(None)), params, strict=False)  # the user may have edited the list


def first_names(groups: list[dict[str, Any]]) -> dict[Tensor, str | None]:
    """The name of each parameter by which its states are stored: of one that is listed twice, the first."""
    names: dict[Tensor, str | None] = {}
    for group in groups:
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


def entries(optimizer: FusedOptimizer) -> list[list[Entry]]:
    """Every parameter of each group, with what is kept for it."""
    names = first_names(optimizer.param_groups)
    index = count()
    return [_entries_of(optimizer, group, index, names) for group in optimizer.param_groups]


def entries_of_last_group(optimizer: FusedOptimizer) -> list[Entry]:
    """The same of the group that was added last: none of its parameters is in another one."""
    *others, group = optimizer.param_groups
    index = count(sum(len(other["params"]) for other in others))
    return _entries_of(optimizer, group, index, first_names([group]))


def _entries_of(
    optimizer: FusedOptimizer, group: dict[str, Any], index: Iterator[int], names: dict[Tensor, str | None]
) -> list[Entry]:
    return [
        Entry(optimizer, group, next(index), name, names[param], param, optimizer.state.get(param, {}))
        for name, param in named(group)
    ]


@torch.no_grad()
def check_and_select(optimizer: FusedOptimizer, needs_norm: bool) -> list[list[Chosen]]:
    """Every parameter of each group, after all checks of it, its gradient and its states; nothing is created.

    ``needs_norm``: the step takes the norm of all gradients together.
    """
    optimizer.stepper.learning_rates.move_schedules(optimizer.param_groups)
    chosen: list[list[Chosen]] = []
    any_reduces = False
    for group, members in zip(optimizer.param_groups, entries(optimizer), strict=True):
        row = []
        by_norm = needs_norm or optimizer.clips_by_norm(group)
        for entry in members:
            param, what = entry.param, entry.what
            try:
                backend, variant = _checked(entry, what)
            except (RuntimeError, TypeError, ValueError):
                if param.grad is not None:
                    raise
                backend = variant = None
            if param.grad is not None:
                checks.check_grad(type(optimizer), group, param, param.grad, what)
                any_reduces = any_reduces or optimizer.rule_of(variant)[1]
                if by_norm:
                    checks.check_norm_is_known(type(optimizer), param, what)
            row.append((entry, backend, variant))
        chosen.append(row)
        for variant in {variant for _, backend, variant in row if backend is not None}:
            optimizer.stepper.hyper_of(optimizer, group, variant)
    norm_of_each = any(map(optimizer.clips_by_norm, optimizer.param_groups))
    sharding.check(optimizer, needs_norm, norm_of_each, any_reduces)
    return chosen


def _checked(entry: Entry, what: str) -> tuple[backends.Backend, Any]:
    """The backend and the variant of a parameter, after all checks of it and its states if a step can update it."""
    optimizer, group, param = entry.rule, entry.group, entry.param
    variant = optimizer.variant_of(group, entry.name, param)
    reduces = optimizer.rule_of(variant)[1]
    backend = optimizer.stepper.select(optimizer, param, reduces)
    if reduces and lines.crosses(optimizer, group, entry.name, param):
        backend = backend_of_parts(backend, param)
    if param.grad is None and not started(optimizer, param):
        return backend, variant
    cls = type(optimizer)
    if param.grad is not None:
        checks.check_real(cls, reduces, param, what)
    memory = layout.local(param.detach())
    checks.check_param(cls, reduces, param, memory, what)
    checks.check_memory(cls.__name__, what, param)
    if memory._is_zerotensor():
        raise ValueError(f"{what}: torch keeps no memory for its zeros; pass a .clone() of it")
    for kind in optimizer.stepper.kept:
        kind.check_param(entry, reduces)
    _check_kept(entry._replace(backend=backend), what)
    return backend, variant


def _check_kept(entry: Entry, what: str) -> None:
    """Raise RuntimeError if what is kept for a parameter cannot go with it."""
    cls = type(entry.rule).__name__
    reduces = entry.rule.rule_of(entry.rule.variant_of(entry.group, entry.name, entry.param))[1]
    of_lines = entry.rule.state_names if reduces and shards.is_sharded(entry.param) else ()
    for key, value in entry.state.items():
        if isinstance(value, Tensor):
            if value.layout != torch.strided:
                raise RuntimeError(f"{cls}: state '{key}' has layout {value.layout}, it must be dense like {what}")
            checks.check_memory(cls, f"state '{key}' of {what},", value)
            kept = None
            if key in of_lines:
                kept = entry.rule.kept_dims(key, entry.group, entry.name, entry.param)
            if value.dim() and not is_quantized(value) and (kept or value.shape == entry.param.shape):
                # Else it is a count, or a scale.
                exchange.refuse_other_parts(cls, f"state '{key}'", value, entry.param, what, kept)
    for kind in entry.rule.stepper.kept:
        kind.check(entry, what)


@torch.no_grad()
def check_loaded_group(optimizer: FusedOptimizer, group: dict[str, Any]) -> None:
    """Raise what the next step would raise of a group's options and states, whatever has a gradient then."""
    variants = set()
    for index, (name, param) in enumerate(named(group)):
        variant = optimizer.variant_of(group, name, param)
        variants.add(variant)
        if param in optimizer.state:
            backend = optimizer.stepper.select(optimizer, param, optimizer.rule_of(variant)[1])
            entry = Entry(optimizer, group, index, name, name, param, optimizer.state[param], backend)
            _check_kept(entry, entry.what)
    for variant in variants:
        hyper = optimizer.stepper.hyper_of(optimizer, group, variant)
        if not any(isinstance(value, Tensor) and value.device.type != "cpu" for value in hyper):
            optimizer.prepare(optimizer.Hyper(*map(float, hyper)), 1)
    checks.check_flag("maximize", group["maximize"])
    optimizer.check_call(None)


def started(optimizer: FusedOptimizer, param: Tensor) -> bool:
    """Whether something is kept for a parameter."""
    return param in optimizer.state or param in optimizer.stepper.kept.step.beside


def undo_of(optimizer: FusedOptimizer) -> Callable[[], None]:
    """What brings back all that is kept for parameters, as it is now, after plans were built."""
    states = {param: dict(state) for param, state in optimizer.state.items() if isinstance(state, dict)}
    before = set(optimizer.state)
    inner = [value for kind in optimizer.stepper.kept for value in vars(kind).values() if isinstance(value, dict)]
    beside = [(value, dict(value)) for value in inner]

    def undo() -> None:
        for param in optimizer.state.keys() - before:
            del optimizer.state[param]
        for param, state in states.items():
            optimizer.state[param].clear()
            optimizer.state[param].update(state)
        for value, kept in beside:
            value.clear()
            value.update(kept)

    return undo


def build(optimizer: FusedOptimizer, chosen: list[list[Chosen]]) -> list[Plan]:
    """Create missing states, and plan one kernel call per group, backend and device."""
    _forget_replaced(optimizer)
    planned: list[tuple[tuple[Any, ...], exchange.Over, bool, list[Record]]] = []
    bystanders: list[Record] = []
    for group_index, (group, row) in enumerate(zip(optimizer.param_groups, chosen, strict=True)):
        states = optimizer.states_of(group)
        buckets: dict[Any, list[Record]] = {}
        seen: Counter[Tensor] = Counter()
        listed = Counter(entry.param for entry, *_ in row)
        for entry, backend, variant in row:
            param = entry.param
            record = Record(entry.index, entry.name, param)
            if backend is None:
                bystanders.append(record)
                continue
            # A parameter that is listed twice is updated twice, one call after the other; the last one may write
            # to its gradient.
            seen[param] += 1
            is_last = seen[param] == listed[param]
            over = exchange.over(param)
            bucket = (backend, variant, param.device, backend.bucket(param), over, seen[param], is_last)
            if param.grad is not None or started(optimizer, param):
                record = record._replace(**fields(entry, backend, optimizer.rule_of(variant)[1]))
            buckets.setdefault(bucket, []).append(record)
        for (backend, variant, *_, over, _, is_last), records in buckets.items():
            planned.append(((backend, group_index, group, variant, states), over, is_last, records))
    if planned:
        planned[0][-1].extend(bystanders)  # any plan notices a gradient that comes later
    options, common = optimizer.stepper.gradients.options, optimizer.stepper.kept.step_fields()
    plans = []
    for (backend, *shared), over, is_last, records in planned:
        plan = backend.plan(type(optimizer), *shared, records)
        plan.over = over
        plan.grads_change = optimizer.stepper.gradients.writes
        plan.zero_grads = is_last and options.zero_grads
        plan.write_grads = is_last and options.write_grads
        vars(plan).update(common)
        plan.graphs = optimizer.stepper.graphs
        plans.append(plan)
    return plans


def _forget_replaced(optimizer: FusedOptimizer) -> None:
    """Drop what is kept for parameters that are in no group any more; ``state`` is the user's, as in torch."""
    params = {param for group in optimizer.param_groups for param in group["params"]}
    for kind in optimizer.stepper.kept:
        for param in kind.beside.keys() - params:
            del kind.beside[param]
    for accumulator in optimizer.stepper.accumulators:
        accumulator.forget_replaced()


def fields(entry: Entry, backend: backends.Backend, reduces: bool) -> dict[str, Any]:
    """What the record of a parameter has that has a gradient or has had one; missing states are made."""
    optimizer, param = entry.rule, entry.param
    # Where nothing is kept, `optimizer.state` stays as it is.
    state = optimizer.state[param] if optimizer.stepper.kept.any_keys(entry) else optimizer.state.get(param, {})
    memory = backend.memory(param, reduces)
    found = optimizer.stepper.kept.fields(entry._replace(state=state, backend=backend, memory=memory))
    matrices = optimizer.matrices(entry.group, entry.name, param, shards.part_shape(param)) if reduces else None
    return {"param": memory, "matrices": matrices, **found}


def make_states(entry: Entry) -> None:
    """Make the missing states of a parameter as its first step would."""
    optimizer, param = entry.rule, entry.param
    reduces = optimizer.rule_of(optimizer.variant_of(entry.group, entry.name, param))[1]
    copied = param in optimizer.stepper.kept.copy.beside
    fields(entry, optimizer.stepper.select(optimizer, param, reduces), reduces)
    if not copied:  # it would not see the weights that are loaded before the first step
        optimizer.stepper.kept.copy.beside.pop(param, None)
