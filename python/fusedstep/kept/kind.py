"""The interface behind which everything lies that an optimizer keeps beside its parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, layout

if TYPE_CHECKING:
    from ..backends import Backend
    from ..optimizer import FusedOptimizer


class Entry(NamedTuple):
    """A parameter, and where that lies which is kept beside it."""

    rule: FusedOptimizer
    group: dict[str, Any]
    index: int  # among all parameters of the optimizer
    name: str | None
    first_name: str | None  # by which its states are stored: of a parameter that is listed twice, the first
    param: Tensor
    state: dict[str, Any]  # what `optimizer.state` has for it
    backend: Backend | None = None
    memory: Tensor | None = None  # what a step updates

    @property
    def what(self) -> str:
        """The parameter's name in an error; made anew each time."""
        return checks.describe(self.index, self.name, self.param)

    def usable(self, value: Tensor, beside: Tensor | None = None) -> Tensor | None:
        """``value`` as the backend can take it; None: it must be laid out anew.

        ``beside``: the memory whose layout it must have, None for the parameter's.
        """
        return self.backend.state_memory(value, self.memory if beside is None else beside)


class Kind:
    """One kind of thing that is kept beside a parameter; each method is for one parameter's."""

    def __init__(self) -> None:
        self.beside: dict[Tensor, Any] = {}  # by parameter, what is kept in no state of `optimizer.state`

    def keys(self, entry: Entry) -> Iterable[str]:
        """Under which keys of its state the parameter has, or will have, something of this kind."""
        return ()

    def check_param(self, entry: Entry, reduces: bool) -> None:
        """Raise ValueError if the options of this kind cannot be had for the parameter, or by a rule that reduces."""

    def check(self, entry: Entry, what: str) -> None:
        """Raise RuntimeError if what the state has of this kind cannot go with the parameter, which ``what`` names."""

    def make(self, entry: Entry) -> None:
        """Make what there must be before the first step, where a rule has states from its construction on."""

    def fields(self, entry: Entry) -> dict[str, Any]:
        """What the parameter's `Record` has of this kind; what is missing is made, and the rest brought into shape."""
        return {}

    def step_fields(self) -> dict[str, Any]:
        """What each `Step` has of this kind."""
        return {}

    def load(self, key: Any, entry: Entry, loaded: dict[str, Any]) -> dict[str, Any]:
        """Take what is of this kind out of a loaded state: copies, as they are to be kept.

        Raises:
            ValueError: it cannot be the parameter's, which the state_dict calls ``key``.
        """
        return {}

    def report(self, loaded: list[Entry]) -> Iterable[str]:
        """What the next step will convert of loaded states, as they were in the state_dict; all else it warns of."""
        return ()


def copied(value: Any, device: torch.device) -> Any:
    """A loaded value as our own, on that device; a sparse one dense."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return (value.to_dense() if value.is_sparse else value).to(device, copy=True)


def copied_like(value: Any, param: Tensor) -> Any:
    """The same on the parameter's device and, if it has its shape, in its layout."""
    plain = isinstance(value, Tensor) and not layout.is_wrapper(value) and not layout.is_wrapper(param)
    if not plain or value.shape != param.shape:
        return copied(value, param.device)
    value = value.detach()
    return layout.dense_like(param, value.dtype).copy_(value.to_dense() if value.is_sparse else value)


def mismatch(
    key: str, value: Any, param: Tensor, dtypes: tuple[torch.dtype, ...], shape: torch.Size | tuple[int]
) -> tuple[str, str, str] | None:
    """How a value differs from a tensor of one of these dtypes: its key, what was found, what is expected."""
    expected = f"{' or '.join(map(str, dtypes))}, shape {tuple(shape)}"
    if not isinstance(value, Tensor):
        return key, f"is {value!r}", expected
    odd = [str(value.layout)] * (value.layout != torch.strided)
    odd += [str(value.device)] * (value.is_meta and not param.is_meta)
    if not odd and value.dtype in dtypes and value.shape == shape:
        return None
    return key, ", ".join([f"is {value.dtype}, shape {tuple(value.shape)}", *odd]), expected


def refuse_reduces(entry: Entry) -> None:
    raise ValueError(
        f"{type(entry.rule).__name__} takes no state_dtype, master_weights, rounding or kahan where its rule sums over "
        f"rows, columns or whole tensors ({entry.what}): such kernels store weights and states as they are"
    )
