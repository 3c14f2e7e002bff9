"""Fused optimizer steps for PyTorch: one kernel call for a whole parameter group."""

import sys

from . import schedules, tuning
from .accumulate import GradientAccumulator
from .amp import GradScaler
from .backends import use_backend
from .clipping import clip_grad_norm_
from .optimizer import FusedOptimizer
from .optimizers.adabelief import AdaBelief
from .optimizers.adafactor import Adafactor
from .optimizers.adagrad import Adagrad
from .optimizers.adam import Adam
from .optimizers.adam_weight_decay import AdamWeightDecay
from .optimizers.adamw import AdamW
from .optimizers.amos import Amos, amos_reductions, amos_scales
from .optimizers.lion import Lion
from .optimizers.rmsprop import RMSprop
from .optimizers.sgd import SGD
from .optimizers.torch_adafactor import TorchAdafactor
from .options import Options
from .recipe import create_optimizer
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

# A pickle names the module of its class: these lay here before.
for _cls in (SGD, AdaBelief, Adafactor, Adagrad, Adam, AdamW, AdamWeightDecay, Amos, Lion, RMSprop, TorchAdafactor):
    sys.modules[_cls.__module__.replace(".optimizers.", ".")] = sys.modules[_cls.__module__]
