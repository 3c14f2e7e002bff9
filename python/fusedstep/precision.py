"""The precision options: in which form weights and states are stored, and how one form becomes another.

Nothing here computes a step; `codecs` has the formats themselves.
"""

from __future__ import annotations

import enum
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

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
COMPANION_DTYPES = {"master_weight": (torch.float32,), "weight_remainder": (torch.int16,), "compensation": HALVES}


def scale_name(state: str) -> str:
    """The key of the scales of an 8-bit state."""
    return f"{state}_scale"


@dataclass(frozen=True)
class Precision:
    """The options of an optimizer; see `Options` for what they mean."""

    state_dtype: StateDtype = None
    master_weights: bool | Literal["split"] = False
    rounding: Literal["nearest", "stochastic"] = "nearest"
    kahan: bool = False
    wide_states: tuple[str | re.Pattern[str], ...] = WIDE_STATES
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
            patterns = tuple(re.compile(pattern) for pattern in wide_states)
            for pattern in patterns:
                pattern.search("")  # one of bytes would fail at the first name
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
        return cls(state_dtype, master_weights, rounding, kahan, patterns, rounding_seed)

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

    def format_of(self, param: Tensor, name: str | None, exact: bool = False) -> StateDtype:
        """The format of a parameter's states, or of one that must be ``exact``; None: whatever they have."""
        if param.dtype not in NARROWABLE:
            return None
        if self.state_dtype is None:
            return torch.float32 if self.form_of(param) in EXACT_FORMS else None
        if exact:
            return torch.float32
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
        """These options with the seed of a loaded state, so that training goes on with the same random numbers.

        The groups have it too: distributed checkpoints have nothing beside groups and states.
        """
        found = self.rounding_seed
        for place in (*reversed(state_dict["param_groups"]), state_dict):
            found = place.get("rounding_seed", found)
            if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 2**63:
                raise ValueError(
                    f"loaded state dict: 'rounding_seed' is {found!r}, expected a whole number below 2**63"
                )
        return replace(self, rounding_seed=found)

    def settle(
        self,
        state: dict[str, Any],
        states: Iterable[str],
        param: Tensor,
        name: str | None,
        new_state: Callable[[str, Tensor], Tensor],
        non_negative: tuple[str, ...],
        exact: tuple[str, ...],
    ) -> None:
        """Bring a parameter's states into these options' format, whatever they were in; missing ones are made.

        Args:
            state: what is kept for the parameter; changed in place.
            states: the names of the rule's states that there must be.
            new_state: makes the state of that name, like a tensor.
            non_negative: names of the states that an 8-bit code stores without a sign.
            exact: names of those that are not stored in fewer bits than fp32.
        """
        for key in states:
            target = self.format_of(param, name, key in exact)
            value = state.get(key)
            if not isinstance(value, Tensor):  # the parent class may have a number where it has not started
                like = param if target in (None, param.dtype) else _like(param, torch.float32)
                value = state[key] = new_state(key, like)
            wanted = target or (param.dtype if value.dtype in CODES else value.dtype)
            is_signed = key not in non_negative
            code = torch.int8 if is_signed else torch.uint8
            if value.dtype == (code if wanted == "8bit" else wanted):
                continue
            scales = state.pop(scale_name(key), None)
            if value.dtype in CODES:
                value = codecs.decode(value, scales)
            if wanted != "8bit":
                state[key] = value.to(wanted)
            else:
                wide = value if layout.is_dense(value) else layout.laid_out_as(value, layout.dense_like(param))
                state[key], state[scale_name(key)] = codecs.encode(wide.float(), is_signed)

    def settle_weight(self, state: dict[str, Any], param: Tensor) -> None:
        """Bring what is kept beside a parameter into these options' form, whatever form it was in."""
        form, found = self.form_of(param), found_form(state, param)
        if found is form and form in COMPANIONS:
            return
        kept = {}
        if form in COMPANIONS:
            memory = layout.local(param.detach())
            plain = found is Form.PLAIN
            weight = memory.float() if plain else exact_weight(found, memory, _companion(found, state, param))
            kept[COMPANIONS[form]] = _new_companion(form, param, memory, weight)
        for key in COMPANIONS.values():
            state.pop(key, None)
        state.update(kept)

    def followed_weight(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """What averages and copies follow: the fp32 weight where the options keep one, else the stored one."""
        found = found_form(state, param)  # other options', until the next step
        if self.form_of(param) not in EXACT_FORMS or found is Form.PLAIN:
            return param.detach()
        if found is Form.MASTER:
            return state[COMPANIONS[found]]
        weight = _like(param, torch.float32)
        layout.local(weight).copy_(exact_weight(found, layout.local(param.detach()), _companion(found, state, param)))
        return weight

    def fields(
        self,
        state: dict[str, Any],
        states: Iterable[str],
        param: Tensor,
        tensor: Tensor,
        memory_of: Callable[[Tensor, Tensor], Tensor | None],
    ) -> dict[str, Any]:
        """What a settled parameter's `Record` has where its dtypes do not tell how it is stored; empty: they do.

        Args:
            tensor: the memory that a step updates, whose layout everything takes.
            memory_of: a tensor's memory as the backend can take it beside another, or None if its layout differs.
        """
        form = self.form_of(param)
        scales = []
        for key in states:
            coded = state[key].dtype in CODES
            if coded:
                dense = tensor if layout.is_dense(tensor) else layout.dense_like(tensor)
                state[key], found = laid_out_as(state[key], state[scale_name(key)], dense)
                state[scale_name(key)] = found.contiguous()
            scales.append(state[scale_name(key)] if coded else None)
        companion = None
        if form in COMPANIONS:
            kept = state[COMPANIONS[form]]
            companion = memory_of(kept, tensor)
            if companion is None:
                companion = state[COMPANIONS[form]] = layout.laid_out_as(kept, tensor)
        if form is Form.PLAIN and not any(scale is not None for scale in scales):
            return {}
        return {"form": form, "companion": companion, "scales": tuple(scales), "seed": self.rounding_seed}


PLAIN = Precision()


def foreign(state: dict[str, Any]) -> bool:
    """Whether a parameter's state is in a form that only these options make."""
    return any(key in state for key in COMPANIONS.values()) or any(
        isinstance(value, Tensor) and value.dtype in CODES for value in state.values()
    )


def found_form(state: dict[str, Any], param: Tensor) -> Form:
    """The form of a parameter by what its state has; what belongs to a weight of another dtype does not count."""
    for form, key in COMPANIONS.items():
        if key in state and (
            form is Form.MASTER or (param.dtype == (torch.bfloat16 if form is Form.SPLIT else state[key].dtype))
        ):
            return form
    return Form.PLAIN


def exact_weight(form: Form, param: Tensor, companion: Tensor) -> Tensor:
    """The fp32 weight that a 16-bit parameter and its companion stand for."""
    if form is Form.MASTER:
        return companion.float()
    if form is Form.SPLIT:
        return codecs.join(param, companion)
    return param.float() + companion.float()


def _companion(form: Form, state: dict[str, Any], param: Tensor) -> Tensor:
    """The memory of what is kept beside a parameter, on its device."""
    return layout.local(state[COMPANIONS[form]]).to(param.device)


def _new_companion(form: Form, param: Tensor, memory: Tensor, weight: Tensor) -> Tensor:
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
    values = layout.laid_out_as(codecs.decode(codes, scales), like)
    return codecs.encode(values, codes.dtype == torch.int8)


# What was loaded, or edited by the user.


def misfit(
    param: Tensor, state: dict[str, Any], states: Iterable[str], non_negative: tuple[str, ...]
) -> tuple[str, str, str] | None:
    """What of a companion, or of 8-bit states, cannot be a parameter's: its key, what was found, what is expected."""

    def differs(value: Any, dtypes: tuple[torch.dtype, ...], shape: torch.Size | tuple[int]) -> tuple[str, str] | None:
        if not isinstance(value, Tensor):
            return f"is {value!r}", f"{' or '.join(map(str, dtypes))}, shape {tuple(shape)}"
        odd = [str(value.layout)] * (value.layout != torch.strided)
        odd += [str(value.device)] * (value.is_meta and not param.is_meta)
        if not odd and value.dtype in dtypes and value.shape == shape:
            return None
        found = ", ".join([f"is {value.dtype}, shape {tuple(value.shape)}", *odd])
        return found, f"{' or '.join(map(str, dtypes))}, shape {tuple(shape)}"

    companions = [key for key in COMPANIONS.values() if key in state]
    if len(companions) > 1:
        return companions[1], f"stands beside '{companions[0]}'", "one of them"
    blocks = codecs.blocks_of(param.numel())
    for key in companions:
        if wrong := differs(state[key], COMPANION_DTYPES[key], param.shape):
            return key, *wrong
    for key in states:
        value, scales = state.get(key), scale_name(key)
        if not (isinstance(value, Tensor) and value.dtype in CODES):
            continue
        if wrong := differs(value, (torch.uint8 if key in non_negative else torch.int8,), param.shape):
            return key, wrong[0], f"{wrong[1]} (or a float dtype)"
        if scales not in state:
            return scales, "is missing", f"torch.float32, shape ({blocks},)"
        if wrong := differs(state[scales], (torch.float32,), (blocks,)):
            return scales, *wrong
    return None


def check_kept(
    optimizer: str,
    param: Tensor,
    state: dict[str, Any],
    states: Iterable[str],
    non_negative: tuple[str, ...],
    what: str,
) -> None:
    """Raise RuntimeError if what ``state`` has beside plain numbers cannot go with ``param``, which ``what`` names."""
    if wrong := misfit(param, state, states, non_negative):
        name, found, expected = wrong
        raise RuntimeError(f"{optimizer}: state '{name}' {found}, expected {expected} for {what}")


def check_loaded(
    key: Any, param: Tensor, state: dict[str, Any], states: Iterable[str], non_negative: tuple[str, ...]
) -> None:
    """Raise ValueError if what a loaded state keeps beside plain states does not fit; ``key`` is the parameter's."""
    wrong = misfit(param, state, states, non_negative)
    if wrong is None and "compensation" in state and state["compensation"].dtype != param.dtype:
        wrong = "compensation", f"is {state['compensation'].dtype}", f"{param.dtype}, shape {tuple(param.shape)}"
    if wrong is None and "weight_remainder" in state and param.dtype != torch.bfloat16:
        wrong = "weight_remainder", f"belongs to a {param.dtype} weight", "a torch.bfloat16 weight"
    if wrong is not None:
        name, found, expected = wrong
        raise ValueError(f"loaded state dict: '{name}' of parameter {key} {found}, expected {expected}")


def adopted(
    key: Any, param: Tensor, state: dict[str, Any], states: Iterable[str], non_negative: tuple[str, ...]
) -> dict[str, Any]:
    """A loaded state, checked, with 8-bit states in the layout of their parameter."""
    check_loaded(key, param, state, states, non_negative)
    adopted = dict(state)
    for name in states:
        value = state.get(name)
        if isinstance(value, Tensor) and value.dtype in CODES:
            codes, scales = (t.to(param.device) for t in (value, state[scale_name(name)]))
            adopted[name], adopted[scale_name(name)] = laid_out_as(codes, scales, layout.dense_like(param))
    return adopted


def warn_of_conversions(
    optimizer: FusedOptimizer, loaded: dict[Tensor, dict[str, Any]], names: dict[Tensor, str | None]
) -> None:
    """One warning of all that the next step will convert of a loaded state; none if there is nothing."""
    options = optimizer._precision
    found: dict[str, None] = {}
    groups = {param: group for group in reversed(optimizer.param_groups) for param in group["params"]}
    for param, state in loaded.items():
        form = options.form_of(param)
        for other, key in COMPANIONS.items():
            if key in state and other is not form:
                found[f"{key} becomes {COMPANIONS.get(form) or 'nothing (the weights go on as they are)'}"] = None
        exact = optimizer.exact_states(groups[param])
        for key in optimizer.state_names:
            target = options.format_of(param, names.get(param), key in exact)
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
