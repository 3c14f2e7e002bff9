"""Learning-rate schedules: Hugging Face's schedulers, those of Dive into Deep Learning, and warm-up around any."""

from .adafactor import AdafactorSchedule, get_adafactor_schedule
from .by_metric import GreedyLR, ReduceLROnPlateau, StreamingAverage
from .d2l import (
    ConstantScheduler,
    CosineScheduler,
    FactorScheduler,
    LinearScheduler,
    MultiFactorScheduler,
    PolyScheduler,
    SquareRootScheduler,
)
from .hugging_face import (
    TYPE_TO_SCHEDULER_FUNCTION,
    SchedulerType,
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
    get_scheduler,
    get_wsd_schedule,
)
from .hugging_face_curves import get_schedule
from .schedule import Schedule, ScheduleLR, WarmUp

__all__ = [
    "TYPE_TO_SCHEDULER_FUNCTION",
    "AdafactorSchedule",
    "ConstantScheduler",
    "CosineScheduler",
    "FactorScheduler",
    "GreedyLR",
    "LinearScheduler",
    "MultiFactorScheduler",
    "PolyScheduler",
    "ReduceLROnPlateau",
    "Schedule",
    "ScheduleLR",
    "SchedulerType",
    "SquareRootScheduler",
    "StreamingAverage",
    "WarmUp",
    "get_adafactor_schedule",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
    "get_greedy_schedule",
    "get_inverse_sqrt_schedule",
    "get_linear_schedule_with_warmup",
    "get_polynomial_decay_schedule_with_warmup",
    "get_reduce_on_plateau_schedule",
    "get_schedule",
    "get_scheduler",
    "get_wsd_schedule",
]
