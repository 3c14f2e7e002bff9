"""Fused optimizer steps for PyTorch: one kernel call for a whole parameter group."""

from . import schedules, tuning
from .accumulate import GradientAccumulator
from .adabelief import AdaBelief
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam
from .adam_weight_decay import AdamWeightDecay
from .adamw import AdamW
from .amos import Amos, amos_reductions, amos_scales
from .amp import GradScaler
from .backends import use_backend
from .clipping import clip_grad_norm_
from .lion import Lion
from .optimizer import FusedOptimizer
from .options import Options
from .recipe import create_optimizer
from .rmsprop import RMSprop
from .sgd import SGD
from .torch_adafactor import TorchAdafactor
from .verification import verify

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "AdaBelief",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWeightDecay",
    "Amos",
    "FusedOptimizer",
    "GradScaler",
    "GradientAccumulator",
    "Lion",
    "Options",
    "RMSprop",
    "TorchAdafactor",
    "amos_reductions",
    "amos_scales",
    "clip_grad_norm_",
    "create_optimizer",
    "schedules",
    "tuning",
    "use_backend",
    "verify",
]
