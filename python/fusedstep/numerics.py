"""Arithmetic that every language of this package repeats operation by operation, to the same bits."""

from __future__ import annotations

import math

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


# Taylor series of cos(pi x) and sin(pi x) in x^2; on [0, 1/4] what is left out is below half a unit in the last place.
COS_PI = (
    *(1.0, -4.934802200544679, 4.0587121264167685, -1.3352627688545895, 0.2353306303588932),
    *(-0.02580689139001406, 0.0019295743094039231, -0.0001046381049248457, 4.303069587032947e-06),
    -1.3878952462213771e-07,
)
SIN_PI = (
    *(3.141592653589793, -5.16771278004997, 2.5501640398773455, -0.5992645293207921, 0.08214588661112823),
    *(-0.0073704309457143504, 0.00046630280576761255, -2.1915353447830217e-05, 7.952054001475513e-07),
)


def cos_pi(x: float) -> float:
    """cos(pi x), to two units in the last place: only IEEE operations, so that every backend gets the same bits."""
    x = abs(x)
    x = x - 2.0 * math.floor(0.5 * x)
    if x > 1.0:
        x = 2.0 - x
    sign = 1.0
    if x > 0.5:
        x = 1.0 - x
        sign = -1.0
    if x <= 0.25:
        return sign * horner(COS_PI, x * x)
    x = 0.5 - x
    return sign * (x * horner(SIN_PI, x * x))


def horner(coefficients: tuple[float, ...], x: float) -> float:
    """The polynomial with these coefficients, the constant one first."""
    result = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        result = result * x + coefficient
    return result


def square_root(x: Tensor) -> Tensor:
    """The correctly rounded square root: on CPU, torch's own is up to one unit in the last place off."""
    if x.device.type != "cpu":
        return x.sqrt()
    root = torch.empty_like(x)
    with np.errstate(invalid="ignore"):
        np.sqrt(x.numpy(), out=root.numpy())
    return root
