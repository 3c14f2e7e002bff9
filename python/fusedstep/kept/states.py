"""The states that a rule names, in the dtype or 8-bit code that the options ask for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks, codecs, layout, shards
from .kind import Entry, Kind, copied, copied_like, mismatch, refuse_reduces
from .weights import HALVES, Weights

StateDtype = torch.dtype | Literal["8bit"] | None

MIN_8BIT = 4096  # elements; states of smaller parameters stay in fp32, as in bitsandbytes
CODES = (torch.int8, torch.uint8)  # of 8-bit states, with and without a sign
NARROWABLE = (torch.float32, *HALVES)  # dtypes of parameters whose states may be narrower or wider than they


def scale_name(state: str) -> str:
    """The key of the scales of an 8-bit state."""
    return f"{state}_scale"


def is_coded(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in CODES


class States(Kind):
    """The options state_dtype and wide_states, as `fusedstep.Options` describes them."""

    def __init__(self, weights: Weights, state_dtype: StateDtype, wide_states: Sequence[str | re.Pattern[str]]) -> None:
        super().__init__()
        if state_dtype not in (None, "8bit", torch.float32, torch.bfloat16):
            raise ValueError(
                f"Invalid state_dtype: {state_dtype!r} (it must be None, torch.float32, torch.bfloat16 or '8bit')"
            )
        if isinstance(wide_states, str):
            raise ValueError(f"Invalid wide_states: {wide_states!r} (it must be a sequence of regular expressions)")
        try:
            patterns = tuple(re.compile(pattern) for pattern in wide_states)
            for pattern in patterns:
                pattern.search("")  # one of bytes would fail at the first name
        except (TypeError, re.error) as error:
            raise ValueError(
                f"Invalid wide_states: {wide_states!r} (it must be a sequence of regular expressions: {error})"
            ) from None
        self.weights = weights
        self.state_dtype = state_dtype
        self.wide_states = patterns

    def format_of(self, param: Tensor, name: str | None, exact: bool = False) -> StateDtype:
        """The format of a parameter's states, or of one that must be ``exact``; None: whatever they have."""
        if param.dtype not in NARROWABLE:
            return None
        if self.state_dtype is None:
            return torch.float32 if self.weights.format_of(param).is_exact else None
        if exact:
            return torch.float32
        if self.state_dtype != "8bit":
            return self.state_dtype
        named_wide = name is not None and any(pattern.search(name) for pattern in self.wide_states)
        return torch.float32 if param.numel() < MIN_8BIT or named_wide else "8bit"

    def keys(self, entry: Entry) -> Iterable[str]:
        rule, group, param = entry.rule, entry.group, entry.param
        return [key for key in rule.states_of(group) if rule.state_shape(key, group, entry.name, param) is not None]

    def check_param(self, entry: Entry, reduces: bool) -> None:
        if self.state_dtype is None:
            return
        if reduces:
            refuse_reduces(entry)
        known = shards.is_sharded(entry.param) or not layout.is_wrapper(entry.param)
        if not known and self.format_of(entry.param, entry.name) == "8bit":
            raise ValueError(
                f"state_dtype='8bit' does not support {type(entry.param).__name__} parameters ({entry.what})"
            )

    def check(self, entry: Entry, what: str) -> None:
        rule, param, state = entry.rule, entry.param, entry.state
        cls = type(rule).__name__
        for key in rule.states_of(entry.group):
            value = state.get(key)
            if is_coded(value):
                if wrong := self._mismatch(key, entry, state):
                    name, found, expected = wrong
                    raise RuntimeError(f"{cls}: state '{name}' {found}, expected {expected} for {what}")
            elif isinstance(value, Tensor):
                shape = rule.state_shape(key, entry.group, entry.name, param)
                if shape is not None:
                    checks.check_state(cls, key, value, param, shape, entry.backend.dtypes, what)

    @staticmethod
    def _mismatch(key: str, entry: Entry, state: dict[str, Any]) -> tuple[str, str, str] | None:
        """What of an 8-bit state cannot be the parameter's: its key, what was found, what is expected."""
        param, scales = own_part(entry.param), scale_name(key)
        code = torch.uint8 if key in entry.rule.non_negative else torch.int8
        if wrong := mismatch(key, state[key], param, (code,), param.shape):
            name, found, expected = wrong
            return name, found, f"{expected} (or a float dtype)"
        blocks = codecs.blocks_of(param.numel())
        if scales not in state:
            return scales, "is missing", f"torch.float32, shape ({blocks},)"
        return mismatch(scales, state[scales], param, (torch.float32,), (blocks,))

    def make(self, entry: Entry) -> None:
        exact = entry.rule.exact_states(entry.group)
        for key in self.keys(entry):
            self._convert(entry, key, key in exact)

    def fields(self, entry: Entry) -> dict[str, Any]:
        rule, param = entry.rule, entry.param
        exact = rule.exact_states(entry.group)
        states: list[Tensor | None] = []
        scales: list[Tensor | None] = []
        for key in rule.states_of(entry.group):
            shape = rule.state_shape(key, entry.group, entry.name, param)
            if shape is None:
                states.append(None)
                scales.append(None)
                continue
            self._convert(entry, key, key in exact)
            state, scale = self._laid_out(entry, key, shape == param.shape)
            states.append(state)
            scales.append(scale)
        fields = {"states": tuple(states)}
        return fields if all(scale is None for scale in scales) else {**fields, "scales": tuple(scales)}

    def _convert(self, entry: Entry, key: str, exact: bool) -> None:
        """Bring a state into these options' format, whatever format it was in; a missing one is made."""
        state, param = entry.state, entry.param
        for name in (key, scale_name(key)):
            value = state.get(name)
            if isinstance(value, Tensor) and value.device != param.device:
                state[name] = value.to(param.device)
        target = self.format_of(param, entry.first_name, exact)
        value = state.get(key)
        if not isinstance(value, Tensor):  # the parent class may have a number where it has not started
            like = param if target in (None, param.dtype) else _like(param, torch.float32)
            value = state[key] = entry.rule.init_state(key, entry.group, entry.name, like)
        wanted = target or (param.dtype if value.dtype in CODES else value.dtype)
        signed = key not in entry.rule.non_negative
        if value.dtype == ((torch.int8 if signed else torch.uint8) if wanted == "8bit" else wanted):
            return
        scales = state.pop(scale_name(key), None)
        if value.dtype in CODES:
            value = codecs.decode(value, scales)
        if wanted != "8bit":
            state[key] = as_part(value, param).to(wanted)
        else:
            value, param = own_part(value), own_part(param)
            wide = value if layout.is_dense(value) else layout.laid_out_as(value, layout.dense_like(param))
            state[key], state[scale_name(key)] = codecs.encode(wide.float(), signed)

    @staticmethod
    def _laid_out(entry: Entry, key: str, elementwise: bool) -> tuple[Tensor, Tensor | None]:
        """A state and its scales as the backend can take them beside the parameter's memory."""
        state, memory, scale = entry.state, own_part(entry.memory), None
        if state[key].dtype in CODES:
            dense = memory if layout.is_dense(memory) else layout.dense_like(memory)
            state[key], scale = laid_out_as(state[key], state[scale_name(key)], dense)
            scale = state[scale_name(key)] = scale.contiguous()
        usable = entry.usable(state[key])
        if usable is None:
            usable = layout.laid_out_as(state[key], entry.memory if elementwise else state[key].contiguous())
            state[key] = usable
        return usable, scale

    def load(self, key: Any, entry: Entry, loaded: dict[str, Any]) -> dict[str, Any]:
        param, taken = entry.param, {}
        for name in entry.rule.state_names:
            if name not in loaded:
                continue
            if is_coded(loaded[name]) and shards.is_sharded(param):
                raise ValueError(
                    f"loaded state dict: '{name}' of parameter {key} is in 8 bits for a whole tensor, the parameter is "
                    "a DTensor: load it into an optimizer of whole tensors with state_dtype=torch.float32, make a "
                    "step, and save that"
                )
            if is_coded(loaded[name]) and (wrong := self._mismatch(name, entry, loaded)):
                odd, found, expected = wrong
                raise ValueError(f"loaded state dict: '{odd}' of parameter {key} {found}, expected {expected}")
            value = loaded.pop(name)
            shape = entry.rule.state_shape(name, entry.group, entry.name, param)
            if shape is not None:
                checks.check_loaded(f"'{name}' of parameter {key}", value, param, shape, CODES)
            if shards.is_sharded(param):
                loaded.pop(scale_name(name), None)  # as `shown_as_numbers` has it
            if is_coded(value):
                codes, scales = (t.to(param.device) for t in (value, loaded.pop(scale_name(name))))
                value, scales = laid_out_as(codes, scales, layout.dense_like(param))
                taken[scale_name(name)] = copied(scales, param.device)
            taken[name] = copied_like(value, param)
        return taken

    def report(self, loaded: list[Entry]) -> Iterator[str]:
        for entry in loaded:
            exact = entry.rule.exact_states(entry.group)
            for key in entry.rule.state_names:
                value = entry.state.get(key)
                if not isinstance(value, Tensor):
                    continue
                here = "8bit" if is_coded(value) else value.dtype
                target = self.format_of(entry.param, entry.first_name, key in exact)
                wanted = target or (entry.param.dtype if here == "8bit" else here)
                # A part is saved as numbers in any case; whole blocks of the tensor become what they were.
                as_saved = wanted == "8bit" and here == torch.float32 and shards.keeps_rows(entry.param, codecs.BLOCK)
                if here != wanted and not as_saved:
                    yield f"{key} in {here} becomes {wanted}"


def _like(param: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def laid_out_as(codes: Tensor, scales: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """An 8-bit state with the strides of the dense ``like``: blocks run along the memory."""
    codes = codes if layout.is_dense(codes) else codes.contiguous()
    if layout.same_layout(codes, like):
        return codes, scales
    values = layout.laid_out_as(codecs.decode(codes, scales), like)
    return codecs.encode(values, codes.dtype == torch.int8)


# 8-bit states of a DTensor are plain tensors for the part that a process has, whose blocks are its own. Nobody else
# knows of which part they are: what leaves the optimizer are numbers, in DTensors.


def own_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process has; any other tensor as it is."""
    return layout.local(tensor.detach()) if shards.is_sharded(tensor) else tensor


def as_part(value: Tensor, param: Tensor) -> Tensor:
    """The values of a part as a DTensor like ``param``, if that is one."""
    if not shards.is_sharded(param) or shards.is_sharded(value):
        return value
    made = _like(param, value.dtype)
    layout.local(made).copy_(value)
    return made


def shown_as_numbers(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a DTensor as a state_dict has it: codes as fp32 numbers, beside a scale of 1.

    That keeps them apart from the codes of a whole tensor, which have many scales: DCP does not compare dtypes.
    """
    if not shards.is_sharded(param):
        return state
    shown = dict(state)
    for key, value in state.items():
        if is_coded(value):
            shown[key] = as_part(codecs.decode(value, state[scale_name(key)]), param)
            shown[scale_name(key)] = torch.ones(1, dtype=torch.float32, device=value.device)
    return shown
