"""The precision options: in which form weights and states are stored, and how one form becomes another.

Nothing here computes a step; `codecs` has the formats themselves.
"""

from __future__ import annotations

import enum
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import codecs, layout

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

StateDtype = torch.dtype | Literal["8bit"] | None

MIN_8BIT = 4096  # elements; states of smaller parameters stay in fp32, as in bitsandbytes
WIDE_STATES = ("emb", "wte", "wpe")
CODES = (torch.int8, torch.uint8)  # of 8-bit states, with and without a sign
HALVES = (torch.bfloat16, torch.float16)
NARROWABLE = (torch.float32, *HALVES)  # dtypes of parameters whose states may be narrower or wider than they


class Form(enum.IntEnum):
    """How a weight is stored; the numbers are csrc/codecs.h's."""

    PLAIN = 0
    MASTER = 1  # beside an fp32 copy, which is what a step updates
    SPLIT = 2  # as the upper half of an fp32 number
    KAHAN = 3  # beside what rounding has lost
    STOCHASTIC = 4  # rounded up or down at random


EXACT_FORMS = (Form.MASTER, Form.SPLIT)  # that keep an fp32 weight
COMPANIONS = {Form.MASTER: "master_weight", Form.SPLIT: "weight_remainder", Form.KAHAN: "compensation"}


def scale_name(state: str) -> str:
    """The key of the scales of an 8-bit state."""
    return f"{state}_scale"


class Storage(NamedTuple):
    """How one parameter and its states are stored, where that is more than their dtypes tell."""

    form: Form
    companion: Tensor | None
    scales: tuple[Tensor | None, ...]  # of each state; None: not in 8 bits
    seed: int


@dataclass(frozen=True)
class Precision:
    """The options of an optimizer; see `Options` for what they mean."""

    state_dtype: StateDtype = None
    master_weights: bool | Literal["split"] = False
    rounding: Literal["nearest", "stochastic"] = "nearest"
    kahan: bool = False
    wide_states: tuple[str, ...] = WIDE_STATES
    rounding_seed: int = 0

    @classmethod
    def checked(
        cls, state_dtype: Any, master_weights: Any, rounding: Any, kahan: Any, wide_states: Any, rounding_seed: Any
    ) -> Precision:
        """The options, if each is known and none contradicts another."""
        if state_dtype not in (None, "8bit", torch.float32, torch.bfloat16):
            raise ValueError(
                f"Invalid state_dtype: {state_dtype!r} (it must be None, torch.float32, torch.bfloat16 or '8bit')"
            )
        if not (isinstance(master_weights, bool) or master_weights == "split"):
            raise ValueError(f"Invalid master_weights: {master_weights!r} (it must be False, True or 'split')")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"Invalid rounding: {rounding!r} (it must be 'nearest' or 'stochastic')")
        if not isinstance(kahan, bool):
            raise ValueError(f"Invalid kahan: {kahan!r} (it must be True or False)")
        if not isinstance(rounding_seed, int) or isinstance(rounding_seed, bool) or not 0 <= rounding_seed < 2**63:
            raise ValueError(
                f"Invalid rounding_seed: {rounding_seed!r} (it must be a whole number from 0 to 2**63 - 1)"
            )
        if isinstance(wide_states, str):
            raise ValueError(f"Invalid wide_states: {wide_states!r} (it must be a sequence of regular expressions)")
        try:
            wide_states = tuple(re.compile(pattern).pattern for pattern in wide_states)
        except (TypeError, re.error) as error:
            raise ValueError(
                f"Invalid wide_states: {wide_states!r} (it must be a sequence of regular expressions: {error})"
            ) from None
        chosen = [
            *([f"master_weights={master_weights!r}"] if master_weights else []),
            *(["kahan=True"] if kahan else []),
            *(["rounding='stochastic'"] if rounding == "stochastic" else []),
        ]
        if len(chosen) > 1:
            raise ValueError(
                f"{' and '.join(chosen)} contradict each other: each is another answer to what rounding a 16-bit "
                "weight loses; choose one"
            )
        return cls(state_dtype, master_weights, rounding, kahan, wide_states, rounding_seed)

    @property
    def plain(self) -> bool:
        """Whether everything is stored as torch stores it."""
        return self.state_dtype is None and self._form is Form.PLAIN

    @property
    def _form(self) -> Form:
        if self.master_weights:
            return Form.SPLIT if self.master_weights == "split" else Form.MASTER
        if self.kahan:
            return Form.KAHAN
        return Form.STOCHASTIC if self.rounding == "stochastic" else Form.PLAIN

    def form_of(self, param: Tensor) -> Form:
        """The form of a parameter: only 16-bit ones lose enough for anything but the plain one."""
        return self._form if param.dtype in HALVES else Form.PLAIN

    def counts(self, param: Tensor) -> bool:
        """Whether a parameter's step must be saved: its random numbers depend on it."""
        return self.form_of(param) is Form.STOCHASTIC

    def keeps(self, param: Tensor) -> bool:
        """Whether something is kept for a parameter even where its rule has no state."""
        return self.form_of(param) is not Form.PLAIN

    def format_of(self, param: Tensor, name: str | None) -> StateDtype:
        """The format of a parameter's states; None: whatever they have."""
        if param.dtype not in NARROWABLE:
            return None
        if self.state_dtype is None:
            return torch.float32 if self.form_of(param) in EXACT_FORMS else None
        if self.state_dtype != "8bit":
            return self.state_dtype
        named_wide = name is not None and any(re.search(pattern, name) for pattern in self.wide_states)
        return torch.float32 if param.numel() < MIN_8BIT or named_wide else "8bit"

    def check_param(self, optimizer: str, reduces: bool, param: Tensor, name: str | None, what: str) -> None:
        """Raise ValueError if a parameter cannot be stored as the options say; ``what`` describes it."""
        if self.plain:
            return
        if reduces:
            raise ValueError(
                f"{optimizer} takes no state_dtype, master_weights, rounding or kahan where its rule sums over rows, "
                f"columns or whole tensors ({what}): such kernels store weights and states as they are"
            )
        if self.form_of(param) is Form.SPLIT and param.dtype != torch.bfloat16:
            raise ValueError(
                f"master_weights='split' needs bfloat16 parameters, whose bits are the upper half of fp32 ({what}); "
                "use master_weights=True"
            )
        if self.format_of(param, name) == "8bit" and layout.is_wrapper(param):
            raise ValueError(f"state_dtype='8bit' does not support {type(param).__name__} parameters ({what})")

    def with_seed_of(self, state_dict: dict[str, Any]) -> Precision:
        """These options with the seed of a loaded state, so that training goes on with the same random numbers."""
        seed = state_dict.get("rounding_seed", self.rounding_seed)
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"loaded state dict: 'rounding_seed' is {seed!r}, expected a whole number below 2**63")
        return replace(self, rounding_seed=seed)

    def settle(
        self,
        state: dict[str, Any],
        states: Iterable[str],
        param: Tensor,
        name: str | None,
        new_state: Callable[[str, Tensor], Tensor],
        non_negative: tuple[str, ...],
    ) -> None:
        """Bring a parameter's state into these options' form, whatever form it was in; missing states are made.

        Args:
            state: what is kept for the parameter; changed in place.
            states: the names of the rule's states that there must be.
            new_state: makes the state of that name, like a tensor.
            non_negative: names of the states that an 8-bit code stores without a sign.
        """
        self._settle_weight(state, param)
        target = self.format_of(param, name)
        for key in states:
            value = state.get(key)
            if not isinstance(value, Tensor):  # the parent class may have a number where it has not started
                like = param if target in (None, param.dtype) else _like(param, torch.float32)
                value = state[key] = new_state(key, like)
            wanted = target or (param.dtype if value.dtype in CODES else value.dtype)
            is_signed = key not in non_negative
            code = torch.int8 if is_signed else torch.uint8
            if value.dtype == (code if wanted == "8bit" else wanted):
                if wanted == "8bit":
                    state[scale_name(key)] = state[scale_name(key)].to(value.device)
                continue
            scales = state.pop(scale_name(key), None)
            if value.dtype in CODES:
                value = codecs.decode(value, scales.to(value.device))
            if wanted != "8bit":
                state[key] = value.to(wanted)
            else:
                wide = value if layout.is_dense(value) else layout.laid_out_as(value, layout.dense_like(param))
                state[key], state[scale_name(key)] = codecs.encode(wide.float(), is_signed)

    def _settle_weight(self, state: dict[str, Any], param: Tensor) -> None:
        form = self.form_of(param)
        found = next((f for f, key in COMPANIONS.items() if key in state), Form.PLAIN)
        if found is form or (found is Form.PLAIN and form is Form.STOCHASTIC):
            return
        memory = layout.local(param.detach())
        weight = memory.float()
        if found is not Form.PLAIN:
            weight = exact_weight(found, memory, layout.local(state.pop(COMPANIONS[found])).to(memory.device))
        if form in COMPANIONS:
            state[COMPANIONS[form]] = _companion(form, param, memory, weight)

    def followed_weight(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """What averages and copies follow: the fp32 weight where the options keep one, else the stored one."""
        form = self.form_of(param)
        if form not in EXACT_FORMS or COMPANIONS[form] not in state:
            return param.detach()
        if form is Form.MASTER:
            return state[COMPANIONS[form]]
        weight = _like(param, torch.float32)
        memory, companion = layout.local(param.detach()), layout.local(state[COMPANIONS[form]])
        layout.local(weight).copy_(exact_weight(form, memory, companion.to(memory.device)))
        return weight

    def storage(
        self,
        state: dict[str, Any],
        states: Iterable[str],
        param: Tensor,
        tensor: Tensor,
        memory_of: Callable[[Tensor, Tensor], Tensor | None],
    ) -> Storage | None:
        """How a settled parameter is stored; None: its dtypes tell all.

        Args:
            tensor: the memory that a step updates, whose layout everything takes.
            memory_of: a tensor's memory as the backend can take it beside another, or None if its layout differs.
        """
        form = self.form_of(param)
        scales = []
        for key in states:
            coded = state[key].dtype in CODES
            if coded and memory_of(state[key], tensor) is None:
                state[key], state[scale_name(key)] = laid_out_as(state[key], state[scale_name(key)], tensor)
            scales.append(state[scale_name(key)] if coded else None)
        companion = None
        if form in COMPANIONS:
            kept = state[COMPANIONS[form]]
            kept = state[COMPANIONS[form]] = kept if kept.device == param.device else kept.to(param.device)
            companion = memory_of(kept, tensor)
            if companion is None:
                companion = state[COMPANIONS[form]] = layout.laid_out_as(kept, tensor)
        if form is Form.PLAIN and not any(scale is not None for scale in scales):
            return None
        return Storage(form, companion, tuple(scales), self.rounding_seed)


PLAIN = Precision()


def is_coded(state: dict[str, Any], key: str) -> bool:
    """Whether the state of that name is in 8 bits, and complete."""
    codes, scales = state[key], state.get(scale_name(key))
    return (
        codes.dtype in CODES
        and isinstance(scales, Tensor)
        and scales.dtype == torch.float32
        and scales.shape == (codecs.blocks_of(codes.numel()),)
    )


def foreign(state: dict[str, Any]) -> bool:
    """Whether a parameter's state is in a form that only these options make."""
    return any(key in state for key in COMPANIONS.values()) or any(
        isinstance(value, Tensor) and value.dtype in CODES for value in state.values()
    )


def exact_weight(form: Form, param: Tensor, companion: Tensor) -> Tensor:
    """The fp32 weight that a 16-bit parameter and its companion stand for."""
    if form is Form.MASTER:
        return companion.float()
    if form is Form.SPLIT:
        return codecs.join(param, companion)
    return param.float() + companion.float()


def _companion(form: Form, param: Tensor, memory: Tensor, weight: Tensor) -> Tensor:
    """What is kept beside a parameter that stands for ``weight``, in its layout."""
    if form is Form.MASTER:
        kept = weight
    elif form is Form.SPLIT:
        kept = codecs.remainder_of(weight, memory)
    else:
        kept = torch.where(memory.isfinite(), weight - memory.float(), 0.0).to(memory.dtype)
    companion = _like(param, kept.dtype)
    layout.local(companion).copy_(kept)
    return companion


def _like(param: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def laid_out_as(codes: Tensor, scales: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """An 8-bit state with the strides of the dense ``like``: blocks run along the memory."""
    codes = codes if layout.is_dense(codes) else codes.contiguous()
    if layout.same_layout(codes, like):
        return codes, scales
    values = layout.laid_out_as(codecs.decode(codes, scales.to(codes.device)), like)
    return codecs.encode(values, codes.dtype == torch.int8)


# What loads.


def check_loaded(key: Any, param: Tensor, state: dict[str, Any], non_negative: tuple[str, ...]) -> None:
    """Raise ValueError if what a loaded state keeps beside plain states does not fit; ``key`` is the parameter's."""

    def reject(name: str, found: str, expected: str) -> None:
        raise ValueError(f"loaded state dict: '{name}' of parameter {key} {found}, expected {expected}")

    def describe(value: Any) -> str:
        return f"is {value.dtype}, shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is {value!r}"

    kept = {"master_weight": torch.float32, "weight_remainder": torch.int16, "compensation": param.dtype}
    companions = [name for name in kept if name in state]
    if len(companions) > 1:
        reject(companions[1], f"stands beside '{companions[0]}'", "one of them")
    for name in companions:
        value = state[name]
        fits = isinstance(value, Tensor) and value.dtype == kept[name] and value.shape == param.shape
        if not fits:
            reject(name, describe(value), f"{kept[name]}, shape {tuple(param.shape)}")
        if name == "weight_remainder" and param.dtype != torch.bfloat16:
            reject(name, f"belongs to a {param.dtype} weight", "a torch.bfloat16 weight")
    blocks = codecs.blocks_of(param.numel())
    for name, value in state.items():
        scale = state.get(scale_name(name))
        if isinstance(value, Tensor) and value.dtype in CODES:
            code = torch.uint8 if name in non_negative else torch.int8
            if value.dtype != code:
                reject(name, describe(value), f"{code} (or a float dtype)")
            if scale is None:
                reject(scale_name(name), "is missing", f"torch.float32, shape ({blocks},)")
        if scale is not None and not (
            isinstance(scale, Tensor) and scale.dtype == torch.float32 and scale.shape == (blocks,)
        ):
            reject(scale_name(name), describe(scale), f"torch.float32, shape ({blocks},)")


def adopted(key: Any, param: Tensor, state: dict[str, Any], non_negative: tuple[str, ...]) -> dict[str, Any]:
    """A loaded state, checked, with 8-bit states in the layout of their parameter."""
    check_loaded(key, param, state, non_negative)
    adopted = dict(state)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype in CODES and value.shape == param.shape:
            like = layout.dense_like(param)
            adopted[name], adopted[scale_name(name)] = laid_out_as(
                value.to(param.device), state[scale_name(name)], like
            )
    return adopted


def warn_of_conversions(
    optimizer: FusedOptimizer, loaded: dict[Tensor, dict[str, Any]], names: dict[Tensor, str | None]
) -> None:
    """One warning of all that the next step will convert of a loaded state; none if there is nothing."""
    options = optimizer._precision
    found: dict[str, None] = {}
    for param, state in loaded.items():
        form = options.form_of(param)
        for other, key in COMPANIONS.items():
            if key in state and other is not form:
                found[f"{key} becomes {COMPANIONS.get(form) or 'nothing (the weights go on as they are)'}"] = None
        target = options.format_of(param, names.get(param))
        for key in optimizer.state_names:
            value = state.get(key)
            if not isinstance(value, Tensor):
                continue
            here = "8bit" if value.dtype in CODES else value.dtype
            wanted = target or (param.dtype if here == "8bit" else here)
            if here != wanted:
                found[f"{key} in {here} becomes {wanted}"] = None
    if found:
        warnings.warn(
            f"{type(optimizer).__name__}: the loaded state was saved with other precision options and is converted: "
            + "; ".join(found),
            stacklevel=3,
        )
