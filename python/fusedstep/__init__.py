"""Fused optimizer steps for PyTorch: one kernel call for a whole parameter group."""

from .adam import Adam
from .adamw import AdamW
from .backends import use_backend
from .optimizer import FusedOptimizer
from .sgd import SGD
from .verification import verify

__version__ = "0.1.0"
__all__ = ["SGD", "Adam", "AdamW", "FusedOptimizer", "use_backend", "verify"]
