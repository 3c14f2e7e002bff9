"""Fused optimizer steps for PyTorch: one kernel call for a whole parameter group."""

from . import schedules
from .adabelief import AdaBelief
from .adagrad import Adagrad
from .adam import Adam
from .adam_weight_decay import AdamWeightDecay
from .adamw import AdamW
from .amos import Amos, amos_scales
from .backends import use_backend
from .lion import Lion
from .optimizer import FusedOptimizer
from .rmsprop import RMSprop
from .sgd import SGD
from .verification import verify

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "AdaBelief",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWeightDecay",
    "Amos",
    "FusedOptimizer",
    "Lion",
    "RMSprop",
    "amos_scales",
    "schedules",
    "use_backend",
    "verify",
]
