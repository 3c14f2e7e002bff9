"""Arithmetic that every language of this package repeats operation by operation, to the same bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def power(base: float, exponent: int) -> float:
    """``base ** exponent`` by squaring: only IEEE multiplications, so that every backend gets the same bits."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def square_root(x: Tensor) -> Tensor:
    """The correctly rounded square root: on CPU, torch's own is up to one unit in the last place off."""
    if x.device.type != "cpu":
        return x.sqrt()
    root = torch.empty_like(x)
    with np.errstate(invalid="ignore"):
        np.sqrt(x.numpy(), out=root.numpy())
    return root
