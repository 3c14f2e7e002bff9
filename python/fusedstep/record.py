"""What crosses to a backend: a `Record` of each parameter and a `Step` for all of them. csrc/ has the same names."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .kept.weights import PLAIN, WeightFormat
from .shards import IDENTITY, ElementMap


class Record(NamedTuple):
    """One parameter and what belongs to it: csrc/table.h's Record, with tensors where that has addresses."""

    index: int  # among all parameters of the optimizer
    name: str | None
    owner: Tensor  # the parameter, whose ``.grad`` is read
    param: Tensor | None = None  # the memory to update; None: no gradient so far, hence no state
    states: tuple[Tensor | None, ...] = ()  # in the order of the plan's; None: this parameter does not have the state
    step: Tensor | None = None  # the counter of its updates
    into: Tensor | None = None  # what the gradient updates, if not `owner` itself
    matrices: tuple[int, int, int] | None = None  # (batch, rows, columns) for a rule that reduces; None: flat
    average: Tensor | None = None  # of the weight over the steps
    copy: Tensor | None = None  # of the weight, in a narrower dtype
    weight_format: WeightFormat = PLAIN
    aux: Tensor | None = None  # what the weight's format keeps beside it
    scales: tuple[Tensor | None, ...] = ()  # of each state; None: not quantized. Empty: none is
    seed: int = 0  # of stochastic rounding
    element_map: ElementMap = IDENTITY  # of the memory in the whole parameter, by whose elements it is random

    @property
    def target(self) -> Tensor:
        return self.owner if self.into is None else self.into

    @property
    def is_plain(self) -> bool:
        """Whether weight and states are numbers of their dtypes."""
        return self.weight_format is PLAIN and not any(scale is not None for scale in self.scales)


class Step(NamedTuple):
    """What one step does, besides the tensors of its plan: what every engine's call is made of."""

    hyper: tuple[float | Tensor, ...]  # the rule's hyperparameters
    maximize: bool = False  # whether gradients are negated
    grad_scale: Tensor | None = None  # what gradients are divided by
    found_inf: Tensor | None = None  # the step is skipped if it is not 0
    coefficient: Tensor | None = None  # what gradients are then multiplied by, a float64 number on the plan's device
    zero_grads: bool = False  # whether each gradient is set to zero as it is read
    write_grads: bool = False  # or to what it was changed to before the rule took it
    average_weight: float = 0.0  # of the new weight in its average

    @property
    def skipped(self) -> bool:
        """Whether the step is skipped; the host waits for the device of ``found_inf``."""
        return self.found_inf is not None and self.found_inf.item() != 0

    @property
    def changes_grads(self) -> bool:
        return self.zero_grads or self.write_grads


@functools.cache
def memory_layout() -> np.dtype:
    """How csrc/table.h's Record lies in memory, with its addresses as whole numbers."""
    from . import _C

    return np.dtype(_C.record_fields())


def words_of(records: np.ndarray) -> np.ndarray:
    """Records in `memory_layout` as rows of int64 words, which is how Triton's kernels read them."""
    return np.ascontiguousarray(records).view(np.int64).reshape(len(records), -1)
