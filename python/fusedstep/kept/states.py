"""The states that a rule names, in the dtype or the codes that the options ask for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks, codecs, layout, shards
from .kind import Entry, Kind, copied, copied_like, mismatch, refuse_reduces
from .weights import HALVES, WIDENED, Weights

if TYPE_CHECKING:
    from ..rule import Rule

StateDtype = torch.dtype | str | None

MIN_QUANTIZED = 4096  # elements; states of smaller parameters stay in fp32, as in bitsandbytes
WHOLE_CODES = "blocks of the whole tensor"
NARROWABLE = (torch.float32, *HALVES)  # dtypes of parameters whose states may be narrower or wider than they


def scale_name(state: str) -> str:
    """The key of the scales of a quantized state."""
    return f"{state}_scale"


def is_quantized(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in codecs.CODES


class States(Kind):
    """The options state_dtype and wide_states, as `fusedstep.Options` describes them."""

    def __init__(self, weights: Weights, state_dtype: StateDtype, wide_states: Sequence[str | re.Pattern[str]]) -> None:
        super().__init__()
        if state_dtype not in (None, *codecs.QUANTIZERS, torch.float32, torch.bfloat16):
            names = " or ".join(map(repr, codecs.QUANTIZERS))
            raise ValueError(
                f"Invalid state_dtype: {state_dtype!r} (it must be None, torch.float32, torch.bfloat16, {names})"
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
        if self.state_dtype not in codecs.QUANTIZERS:
            return self.state_dtype
        named_wide = name is not None and any(pattern.search(name) for pattern in self.wide_states)
        if param.numel() < MIN_QUANTIZED or named_wide:
            return torch.float32
        part = own_part(param)
        dense = part if layout.is_dense(part) or layout.is_wrapper(part) else layout.dense_like(part)
        return codecs.quantizer_for(self.state_dtype, dense).name

    def keys(self, entry: Entry) -> Iterable[str]:
        rule, group, param = entry.rule, entry.group, entry.param
        return [key for key in rule.states_of(group) if rule.state_shape(key, group, entry.name, param) is not None]

    def check_param(self, entry: Entry, reduces: bool) -> None:
        if self.state_dtype is None:
            return
        if reduces:
            refuse_reduces(entry)
        known = shards.is_sharded(entry.param) or not layout.is_wrapper(entry.param)
        if not known and self.format_of(entry.param, entry.name) in codecs.QUANTIZERS:
            raise ValueError(
                f"state_dtype={self.state_dtype!r} does not support {type(entry.param).__name__} parameters "
                f"({entry.what})"
            )

    def check(self, entry: Entry, what: str) -> None:
        rule, param, state = entry.rule, entry.param, entry.state
        cls = type(rule).__name__
        for key in rule.states_of(entry.group):
            value = state.get(key)
            if is_quantized(value):
                if wrong := self._mismatch(key, entry, state):
                    name, found, expected = wrong
                    raise RuntimeError(f"{cls}: state '{name}' {found}, expected {expected} for {what}")
            elif isinstance(value, Tensor):
                shape = rule.state_shape(key, entry.group, entry.name, param)
                if shape is not None:
                    checks.check_state(cls, key, value, param, shape, entry.backend.dtypes, what)

    @staticmethod
    def _mismatch(key: str, entry: Entry, state: dict[str, Any]) -> tuple[str, str, str] | None:
        """A mismatch between a quantized state and its parameter: its key, what was found, what is expected."""
        param, scales = own_part(entry.param), scale_name(key)
        quantizer = codecs.quantizer_of(state[key], param)
        code = (quantizer or codecs.EIGHT_BITS).code(key not in entry.rule.non_negative)
        shape = param.shape if quantizer is None else state[key].shape
        if wrong := mismatch(key, state[key], param, (code,), shape):
            name, found, expected = wrong
            return name, found, f"{expected} (or 4 bits each, or a float dtype)"
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
        part = own_part(param)
        found = codecs.quantizer_of(value, part)
        wanted = target or (value.dtype if found is None else param.dtype)
        if wanted == (value.dtype if found is None else found.name):
            return
        signed = key not in entry.rule.non_negative
        scales = state.pop(scale_name(key), None)
        if found is not None:
            value = codecs.dequantize(value, scales, found, signed, part)
        quantizer = codecs.QUANTIZERS.get(wanted)
        if quantizer is None:
            state[key] = as_part(value, param).to(wanted)
        else:
            wide = own_part(value)
            if not layout.is_dense(wide) or quantizer.codes_layout(wide) is None:  # it was loaded in another layout
                wide = layout.laid_out_as(wide, layout.dense_like(part))
            state[key], state[scale_name(key)] = codecs.quantize(wide.float(), quantizer, signed)

    @staticmethod
    def _laid_out(entry: Entry, key: str, elementwise: bool) -> tuple[Tensor, Tensor | None]:
        """A state and its scales as the backend can take them beside the parameter's memory."""
        state, memory, scale = entry.state, own_part(entry.memory), None
        if is_quantized(state[key]):
            dense = memory if layout.is_dense(memory) else layout.dense_like(memory)
            signed = key not in entry.rule.non_negative
            codes, scale = laid_out_as(state[key], state[scale_name(key)], signed, dense)
            scale = state[scale_name(key)] = scale.contiguous()
            state[key] = codes if entry.usable(codes, codes) is not None else codes.clone()
            return state[key], scale
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
            if shards.is_sharded(param) and (
                is_quantized(loaded[name]) or has_scales_of_the_whole(name, loaded, param)
            ):
                loaded[name] = numbers_of_own_codes(name, key, entry, loaded)
            if is_quantized(loaded[name]) and (wrong := self._mismatch(name, entry, loaded)):
                odd, found, expected = wrong
                raise ValueError(f"loaded state dict: '{odd}' of parameter {key} {found}, expected {expected}")
            value = loaded.pop(name)
            shape = entry.rule.state_shape(name, entry.group, entry.name, param)
            if shape is not None:
                shape = value.shape if is_quantized(value) else shape
                checks.check_loaded(f"'{name}' of parameter {key}", value, param, shape, codecs.CODES)
            if shards.is_sharded(param) or shards.is_flattened(param):
                loaded.pop(scale_name(name), None)  # as `shown_as_numbers` has it
            if not is_quantized(value):
                taken[name] = copied_like(value, param)
                continue
            codes, scales = (t.to(param.device) for t in (value, loaded.pop(scale_name(name))))
            laid_out = laid_out_as(codes, scales, name not in entry.rule.non_negative, layout.dense_like(param))
            taken[name], taken[scale_name(name)] = (copied(t, param.device) for t in laid_out)
        return taken

    def report(self, loaded: list[Entry]) -> Iterator[str]:
        for entry in loaded:
            exact = entry.rule.exact_states(entry.group)
            for key in entry.rule.state_names:
                value = entry.state.get(key)
                if not isinstance(value, Tensor):
                    continue
                quantizer = codecs.quantizer_of(value, own_part(entry.param))
                here = value.dtype if quantizer is None else quantizer.name
                if quantizer is None and is_quantized(value):
                    here = WHOLE_CODES
                target = self.format_of(entry.param, entry.first_name, key in exact)
                wanted = target or (here if quantizer is None else entry.param.dtype)
                # A part is saved as numbers in any case; whole blocks of the tensor become what they were.
                quantizes = wanted in codecs.QUANTIZERS and here in (torch.float32, WHOLE_CODES)
                if here != wanted and not (quantizes and shards.keeps_rows(entry.param, codecs.BLOCK)):
                    yield f"{key} in {here} becomes {wanted}"


def _like(param: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def laid_out_as(codes: Tensor, scales: Tensor, signed: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """A quantized state as that of the dense ``like``: blocks run along the memory."""
    quantizer = codecs.quantizer_of(codes, like)
    codes = codes if layout.is_dense(codes) else codes.contiguous()
    if codecs.are_laid_out_as(codes, quantizer, like):
        return codes, scales
    values = layout.laid_out_as(codecs.dequantize(codes, scales, quantizer, signed, like), like)
    return codecs.quantize(values, codecs.quantizer_for(quantizer.name, like), signed)


# Quantized states of a DTensor are plain tensors for the part that a process has, whose blocks are its own. Nobody else
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


def has_scales_of_the_whole(name: str, loaded: dict[str, Any], param: Tensor) -> bool:
    scales = loaded.get(scale_name(name))
    return isinstance(scales, Tensor) and scales.shape == (codecs.blocks_of(param.numel()),) != (1,)


def numbers_of_own_codes(name: str, key: Any, entry: Entry, loaded: dict[str, Any]) -> Tensor:
    """A part's numbers from its codes of 8 bits in a whole tensor, as torch distributes them: perhaps as floats.

    Raises:
        ValueError: the codes are not of this tensor, or not distributed.
    """
    param, codes, scales = entry.param, loaded[name], loaded.get(scale_name(name))
    if not has_scales_of_the_whole(name, loaded, param) or not shards.is_sharded(codes) or codes.shape != param.shape:
        raise ValueError(
            f"loaded state dict: '{name}' of parameter {key} is in codes of a whole tensor, the parameter is a "
            "DTensor: give 8-bit states to set_optimizer_state_dict with StateDictOptions(full_state_dict=True); 4-bit "
            "ones only another optimizer of whole tensors can load"
        )
    part = own_part(param)
    like = layout.dense_like(part)
    dense = layout.laid_out_as(own_part(codes), like).to(param.device)
    flat = dense.as_strided((dense.numel(),), (1,)).to(torch.int32)
    blocks = shards.element_map_of(param, entry.what).elements(torch.arange(flat.numel())) // codecs.BLOCK
    signed = name not in entry.rule.non_negative
    ones = torch.ones(codecs.blocks_of(flat.numel()), device=flat.device)
    relative = codecs.dequantize_blocks(flat, ones, codecs.EIGHT_BITS, signed)
    values = relative * scales.to(flat.device)[blocks.to(flat.device)]
    return as_part(values.as_strided(like.shape, like.stride()), param)


def shown_as_numbers(rule: Rule, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a part as a state_dict has it: codes as fp32 numbers, beside a scale of 1.

    That keeps them apart from the codes of a whole tensor, which have many scales: DCP does not compare dtypes.
    """
    is_flattened = shards.is_flattened(param)
    if not (is_flattened or shards.is_sharded(param)):
        return state
    shown = dict(state)
    for key, value in state.items():
        if is_quantized(value):
            part, scales, signed = own_part(param), state[scale_name(key)], key not in rule.non_negative
            numbers = codecs.dequantize(value, scales, codecs.quantizer_of(value, part), signed, part)
            shown[key] = as_part(numbers, param)
            # A tensor that has dimensions would be gathered beside the pieces of others.
            shown[scale_name(key)] = torch.ones(() if is_flattened else 1, device=value.device)
        elif isinstance(value, Tensor) and value.dtype == WIDENED[1]:
            shown[key] = value.to(WIDENED[0])
    return _in_one_dtype(param, shown) if is_flattened else shown


def _in_one_dtype(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a piece as `FullyShardedDataParallel` can gather it: with one dtype, and that of fractions."""
    pieces = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == param.shape}
    dtypes = {value.dtype for value in pieces.values()}
    if dtypes == {param.dtype} or (len(dtypes) == 1 and dtypes.pop().is_floating_point):
        return state
    return {
        **state,
        **{key: value.to(torch.promote_types(param.dtype, torch.float32)) for key, value in pieces.items()},
    }
