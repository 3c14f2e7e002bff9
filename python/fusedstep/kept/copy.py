"""A copy of each parameter in a narrower dtype, which every step writes beside the parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import layout
from .ema import follower
from .kind import Entry, Kind
from .weights import Weights

COPY_DTYPES = (torch.bfloat16, torch.float16)


class WeightsCopy(Kind):
    """The option weights_copy, as `fusedstep.Options` describes it. Copies are in no state, and are not saved."""

    def __init__(self, weights: Weights, weights_copy: torch.dtype | None) -> None:
        super().__init__()
        if weights_copy is not None and weights_copy not in COPY_DTYPES:
            raise ValueError(
                f"Invalid weights_copy: {weights_copy!r} (it must be {' or '.join(map(str, COPY_DTYPES))})"
            )
        self.weights = weights
        self.dtype = weights_copy

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "beside": {}}

    def check(self, entry: Entry, what: str) -> None:
        if self.dtype is not None and entry.param.is_complex():
            raise RuntimeError(
                f"{type(entry.rule).__name__}: weights_copy={self.dtype} cannot copy a complex parameter ({what})"
            )

    def fields(self, entry: Entry) -> dict[str, Any]:
        if self.dtype is None:
            return {}
        self.beside[entry.param], copy = follower(entry, self.weights, self.beside.get(entry.param), self.dtype)
        return {"copy": copy}

    def of(
        self, memory: Iterable[tuple[Tensor, Tensor]], weight_of: Callable[[Tensor], Tensor]
    ) -> dict[Tensor, Tensor]:
        """A copy of every parameter, given with the memory that a step updates; made where there is none yet."""
        if self.dtype is None:
            raise RuntimeError("there are no copies of the weights; give the optimizer weights_copy=torch.bfloat16")
        copies = {}
        for param, tensor in memory:
            copy = self.beside.get(param)
            if copy is None or copy.device != param.device:
                if layout.is_wrapper(param) or not layout.is_dense(tensor):
                    copy = weight_of(param).to(self.dtype, copy=True, memory_format=torch.preserve_format)
                else:
                    copy = layout.laid_out_as(weight_of(param), tensor, self.dtype)
                self.beside[param] = copy
            copies[param] = copy
        return copies

    @torch.no_grad()
    def renew(self, weight_of: Callable[[Tensor], Tensor]) -> None:
        """Copy the parameters as they are now."""
        for param, copy in self.beside.items():
            copy.copy_(weight_of(param))
