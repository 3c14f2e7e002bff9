"""Hugging Face's learning-rate schedulers by their names, as `transformers` chooses among them.

What each scheduler does, and with which arguments, is in `hugging_face_functions`.
"""

from __future__ import annotations

import enum
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .by_metric import GreedyLR, ReduceLROnPlateau
from .hugging_face_functions import (
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    get_greedy_schedule,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_reduce_on_plateau_schedule,
    get_wsd_schedule,
)


class SchedulerType(str, enum.Enum):  # noqa: UP042 - a StrEnum prints otherwise, in errors too
    """Names of the schedulers, for `get_scheduler`."""

    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    INVERSE_SQRT = "inverse_sqrt"
    REDUCE_ON_PLATEAU = "reduce_lr_on_plateau"
    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    COSINE_WARMUP_WITH_MIN_LR = "cosine_warmup_with_min_lr"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"
    GREEDY = "greedy"

    @classmethod
    def _missing_(cls, value: object) -> SchedulerType:
        names = [member.value for member in cls]
        if isinstance(value, enum.Enum) and value.value in names:  # that of transformers
            return cls(value.value)
        raise ValueError(f"{value} is not a valid {cls.__name__}, please select one of {names}")


TYPE_TO_SCHEDULER_FUNCTION = {
    SchedulerType.LINEAR: get_linear_schedule_with_warmup,
    SchedulerType.COSINE: get_cosine_schedule_with_warmup,
    SchedulerType.COSINE_WITH_RESTARTS: get_cosine_with_hard_restarts_schedule_with_warmup,
    SchedulerType.POLYNOMIAL: get_polynomial_decay_schedule_with_warmup,
    SchedulerType.CONSTANT: get_constant_schedule,
    SchedulerType.CONSTANT_WITH_WARMUP: get_constant_schedule_with_warmup,
    SchedulerType.INVERSE_SQRT: get_inverse_sqrt_schedule,
    SchedulerType.REDUCE_ON_PLATEAU: get_reduce_on_plateau_schedule,
    SchedulerType.COSINE_WITH_MIN_LR: get_cosine_with_min_lr_schedule_with_warmup,
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    SchedulerType.WARMUP_STABLE_DECAY: get_wsd_schedule,
    SchedulerType.GREEDY: get_greedy_schedule,
}
NEED_A_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def get_scheduler(
    name: str | SchedulerType,
    optimizer: Optimizer,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> LambdaLR | ReduceLROnPlateau | GreedyLR:
    """Any of the schedulers by its name.

    Args:
        name: one of `SchedulerType`.
        optimizer: any `torch.optim.Optimizer`.
        num_warmup_steps: of the warm-up; not needed by "constant" and by those that are driven by a metric.
        num_training_steps: of everything; not needed by these, "constant_with_warmup" and "inverse_sqrt", nor by
            "warmup_stable_decay" with ``num_stable_steps``.
        scheduler_specific_kwargs: further arguments of the scheduler's own function. "constant" and
            "constant_with_warmup" take none and ignore them.

    Raises:
        ValueError: the name is unknown, or a number that it needs is missing.
        TypeError: the scheduler has no such argument.

    Example:
        >>> scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=1000)
    """
    name = SchedulerType(name)
    make = TYPE_TO_SCHEDULER_FUNCTION[name]
    if hasattr(optimizer, "optimizer_dict"):
        raise ValueError(
            f"{type(optimizer).__name__} holds an optimizer for each parameter; make a scheduler for each of them, "
            "or use the get_scheduler of transformers"
        )
    specific = scheduler_specific_kwargs or {}
    if name == SchedulerType.CONSTANT:
        return make(optimizer)
    if name in NEED_A_METRIC:
        return make(optimizer, **specific)
    if num_warmup_steps is None:
        raise ValueError(f"{name} requires `num_warmup_steps`, please provide that argument.")
    if name == SchedulerType.CONSTANT_WITH_WARMUP:
        return make(optimizer, num_warmup_steps=num_warmup_steps)
    if name == SchedulerType.INVERSE_SQRT:
        return make(optimizer, num_warmup_steps=num_warmup_steps, **specific)
    if num_training_steps is None and name != SchedulerType.WARMUP_STABLE_DECAY:
        raise ValueError(f"{name} requires `num_training_steps`, please provide that argument.")
    return make(optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps, **specific)
