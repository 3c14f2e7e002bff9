"""The formats of a 16-bit weight, whose rounding loses nothing, or nothing on average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import codecs, layout, shards
from .kind import Entry, Kind, copied, mismatch, refuse_reduces

HALVES = (torch.bfloat16, torch.float16)


class WeightFormat:
    """A weight as a number of its dtype. Each format is one object, in `FORMATS`."""

    number: ClassVar[int] = 0  # csrc/codecs.h's WeightFormat
    name: ClassVar[str] = "plain"
    key: ClassVar[str | None] = None  # of the aux state: what the format keeps beside the weight
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ()  # of the aux state
    is_exact: ClassVar[bool] = False  # whether it keeps an fp32 weight
    is_random: ClassVar[bool] = False  # whether `split` needs random bits

    def takes(self, dtype: torch.dtype, aux: torch.dtype) -> bool:
        """Whether a weight of that dtype can have an aux state of the other."""
        return aux in self.dtypes

    def join(self, memory: Tensor, aux: Tensor | None) -> Tensor:
        """The fp32 weight that a 16-bit one stands for."""
        return memory.float()

    def split(self, weight: Tensor, dtype: torch.dtype, random: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """An fp32 weight as it is stored: in 16 bits, and what is kept beside these."""
        return weight, None

    def aux_of(self, weight: Tensor, memory: Tensor) -> Tensor:
        """What is kept beside ``memory``, already rounded in some way, for it to stand for the fp32 ``weight``."""
        raise NotImplementedError


class Master(WeightFormat):
    """Beside an fp32 copy, which is what a step updates."""

    number, name, key, dtypes, is_exact = 1, "master", "master_weight", (torch.float32,), True

    def join(self, memory: Tensor, aux: Tensor | None) -> Tensor:
        return aux.float()

    def split(self, weight: Tensor, dtype: torch.dtype, random: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, weight

    def aux_of(self, weight: Tensor, memory: Tensor) -> Tensor:
        return weight


class Split(WeightFormat):
    """As the upper half of an fp32 number, beside the lower one."""

    number, name, key, dtypes, is_exact = 2, "split", "weight_remainder", (torch.int16,), True

    def takes(self, dtype: torch.dtype, aux: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and aux == torch.int16

    def join(self, memory: Tensor, aux: Tensor | None) -> Tensor:
        return codecs.join(memory, aux)

    def split(self, weight: Tensor, dtype: torch.dtype, random: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return codecs.split(weight)

    def aux_of(self, weight: Tensor, memory: Tensor) -> Tensor:
        return codecs.remainder_of(weight, memory)


class Kahan(WeightFormat):
    """Beside what rounding has lost."""

    number, name, key, dtypes = 3, "kahan", "compensation", HALVES

    def takes(self, dtype: torch.dtype, aux: torch.dtype) -> bool:
        return dtype == aux

    def join(self, memory: Tensor, aux: Tensor | None) -> Tensor:
        return memory.float() + aux.float()

    def split(self, weight: Tensor, dtype: torch.dtype, random: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return codecs.compensate(weight, dtype)

    def aux_of(self, weight: Tensor, memory: Tensor) -> Tensor:
        return torch.where(memory.isfinite(), weight - memory.float(), 0.0).to(memory.dtype)


class Stochastic(WeightFormat):
    """Rounded up or down at random."""

    number, name, is_random = 4, "stochastic", True

    def split(self, weight: Tensor, dtype: torch.dtype, random: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return codecs.narrow_stochastic(weight, dtype, random), None


PLAIN = WeightFormat()
FORMATS = (PLAIN, Master(), Split(), Kahan(), Stochastic())  # by their numbers
AUX = {made.key: made for made in FORMATS if made.key is not None}
# The lower halves of parts of tensors leave the optimizer as the first: no process group carries the second.
WIDENED = (torch.int32, torch.int16)


class Weights(Kind):
    """The options master_weights, kahan, rounding and rounding_seed, as `fusedstep.Options` describes them."""

    def __init__(
        self,
        master_weights: bool | Literal["split"],
        kahan: bool,
        rounding: Literal["nearest", "stochastic"],
        rounding_seed: int,
    ) -> None:
        super().__init__()
        if not (isinstance(master_weights, bool) or master_weights == "split"):
            raise ValueError(f"Invalid master_weights: {master_weights!r} (it must be False, True or 'split')")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"Invalid rounding: {rounding!r} (it must be 'nearest' or 'stochastic')")
        if not isinstance(kahan, bool):
            raise ValueError(f"Invalid kahan: {kahan!r} (it must be True or False)")
        if not is_seed(rounding_seed):
            raise ValueError(
                f"Invalid rounding_seed: {rounding_seed!r} (it must be a whole number from 0 to 2**63 - 1)"
            )
        chosen = {
            f"master_weights={master_weights!r}": FORMATS[2 if master_weights == "split" else 1],
            "kahan=True": FORMATS[3],
            "rounding='stochastic'": FORMATS[4],
        }
        wanted = (master_weights, kahan, rounding == "stochastic")
        chosen = {name: made for (name, made), is_wanted in zip(chosen.items(), wanted, strict=True) if is_wanted}
        if len(chosen) > 1:
            raise ValueError(
                f"{' and '.join(chosen)} contradict each other: each is another answer to what rounding a 16-bit "
                "weight loses; choose one"
            )
        self.format = next(iter(chosen.values()), PLAIN)
        self.seed = rounding_seed

    def __getstate__(self) -> tuple[int, int]:
        return self.format.number, self.seed

    def __setstate__(self, state: tuple[int, int]) -> None:
        super().__init__()
        number, self.seed = state
        self.format = FORMATS[number]

    def format_of(self, param: Tensor) -> WeightFormat:
        """The format of a parameter: only 16-bit ones lose enough for anything but the plain one."""
        return self.format if param.dtype in HALVES else PLAIN

    def needs_count(self, param: Tensor) -> bool:
        """Whether a parameter's number of steps must be saved: its random numbers depend on it."""
        return self.format_of(param).is_random

    def keys(self, entry: Entry) -> Iterable[str]:
        key = self.format_of(entry.param).key
        return () if key is None else (key,)

    def check_param(self, entry: Entry, reduces: bool) -> None:
        if reduces and self.format is not PLAIN:
            refuse_reduces(entry)
        if entry.param.dtype == torch.float16 and self.format is AUX["weight_remainder"]:
            raise ValueError(
                f"master_weights='split' needs bfloat16 parameters, whose bits are the upper half of fp32 "
                f"({entry.what}); use master_weights=True"
            )

    def check(self, entry: Entry, what: str) -> None:
        if wrong := _mismatch(entry.state, entry.param):
            name, found, expected = wrong
            raise RuntimeError(f"{type(entry.rule).__name__}: state '{name}' {found}, expected {expected} for {what}")

    def fields(self, entry: Entry) -> dict[str, Any]:
        made = self.format_of(entry.param)
        self._convert(entry, made)
        aux = None
        if made.key is not None:
            aux = entry.usable(entry.state[made.key])
            if aux is None:
                aux = layout.laid_out_as(entry.state[made.key], entry.memory)
                entry.state[made.key] = aux
        if made is PLAIN:
            return {}
        fields = {"weight_format": made, "aux": aux, "seed": self.seed}
        return {**fields, "element_map": shards.element_map_of(entry.param, entry.what)} if made.is_random else fields

    def _convert(self, entry: Entry, made: WeightFormat) -> None:
        """Bring what is kept beside the parameter into these options' format, whatever format it was in."""
        state, param = entry.state, entry.param
        kept = [key for key in AUX if key in state]
        if not kept and made.key is None:
            return
        found = found_format(state, param)
        if found is made and made.key is not None:
            if state[made.key].device != param.device:
                state[made.key] = state[made.key].to(param.device)
            return
        fresh = None
        if made.key is not None:
            memory = layout.local(param.detach())
            fresh = _like(param, made.aux_of(_weight(found, param, state), memory))
        for key in kept:
            del state[key]
        if fresh is not None:
            state[made.key] = fresh

    def followed(self, param: Tensor, state: dict[str, Any]) -> Tensor:
        """What averages and copies follow: the fp32 weight where the options keep one, else the stored one."""
        found = found_format(state, param)  # other options', until the next step
        if not self.format_of(param).is_exact or found is PLAIN:
            return param.detach()
        return state[found.key] if found.name == "master" else _like(param, _weight(found, param, state))

    def load(self, key: Any, entry: Entry, loaded: dict[str, Any]) -> dict[str, Any]:
        for name in AUX.keys() & loaded.keys():
            value, dtype = loaded[name], entry.param.dtype if name == Kahan.key else AUX[name].dtypes[0]
            # It may have been widened to be gathered.
            if isinstance(value, Tensor) and (shards.is_flattened(entry.param) or (value.dtype, dtype) == WIDENED):
                loaded[name] = value.to(dtype)
        wrong = _mismatch(loaded, entry.param)
        for name in AUX:
            if wrong is None and name in loaded and not AUX[name].takes(entry.param.dtype, loaded[name].dtype):
                wrong = _dtype_mismatch(name, loaded[name], entry.param)
        if wrong is not None:
            name, found, expected = wrong
            raise ValueError(f"loaded state dict: '{name}' of parameter {key} {found}, expected {expected}")
        return {name: copied(loaded.pop(name), entry.param.device) for name in [*loaded] if name in AUX}

    def report(self, loaded: list[Entry]) -> Iterator[str]:
        for entry in loaded:
            made = self.format_of(entry.param)
            for key in AUX:
                if key in entry.state and key != made.key:
                    yield f"{key} becomes {made.key or 'nothing (the weights go on as they are)'}"


def is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def found_format(state: dict[str, Any], param: Tensor) -> WeightFormat:
    """The format of a parameter by what its state has; what belongs to a weight of another dtype does not count."""
    for key, made in AUX.items():
        if key in state and made.takes(param.dtype, state[key].dtype):
            return made
    return PLAIN


def _weight(found: WeightFormat, param: Tensor, state: dict[str, Any]) -> Tensor:
    """The fp32 weight that a parameter and its aux state stand for."""
    aux = None if found.key is None else layout.local(state[found.key]).to(param.device)
    return found.join(layout.local(param.detach()), aux)


def _like(param: Tensor, values: Tensor) -> Tensor:
    """The values in a new tensor in the layout of a parameter, which may be a wrapper."""
    made = torch.empty_like(param, dtype=values.dtype, memory_format=torch.preserve_format, requires_grad=False)
    layout.local(made).copy_(values)
    return made


def _mismatch(state: dict[str, Any], param: Tensor) -> tuple[str, str, str] | None:
    """A mismatch between an aux state and its parameter: its key, what was found, what is expected."""
    keys = [key for key in AUX if key in state]
    if len(keys) > 1:
        return keys[1], f"stands beside '{keys[0]}'", "one of them"
    return mismatch(keys[0], state[keys[0]], param, AUX[keys[0]].dtypes, param.shape) if keys else None


def _dtype_mismatch(name: str, aux: Tensor, param: Tensor) -> tuple[str, str, str]:
    if name == "weight_remainder":
        return name, f"belongs to a {param.dtype} weight", "a torch.bfloat16 weight"
    return name, f"is {aux.dtype}", f"{param.dtype}, shape {tuple(param.shape)}"
