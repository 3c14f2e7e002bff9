"""Arithmetic that every language of this package repeats operation by operation, to the same bits.

What the update rules are written in works on tensors and on floats here, and has a twin of the same name in
triton_kernels/numeric.py.
"""

from __future__ import annotations

import functools
import math
from ctypes import c_float
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
from torch import Tensor

Number = Tensor | float


class Double(float):
    """The type of a scalar that is in float64 whatever the dtype of the arithmetic, as `Rule.finish` takes it."""


def real(n: int) -> float:
    """A number of steps, for a formula in float64."""
    return float(n)


def divide(a: Number, b: Number) -> Number:
    """The correctly rounded quotient: for a number by a tensor, torch itself multiplies by the reciprocal."""
    return b.new_full((), a) / b if isinstance(b, Tensor) and not isinstance(a, Tensor) else a / b


def where(condition: Tensor | bool, a: Number, b: Number) -> Number:
    """``a`` or ``b``, which are both computed: neither may raise."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def maximum(a: Tensor, b: Number) -> Tensor:
    """NaN wins."""
    return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)


def minimum(a: Tensor, b: Number) -> Tensor:
    """NaN wins."""
    return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)


def interpolate(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """From ``a`` to ``b``: exactly there for a weight of 1."""
    return torch.lerp(a, b, weight)


def reciprocal(x: float) -> float:
    """1 / x; infinity for 0."""
    return 1.0 / x if x != 0 else math.inf


def real_power(base: float, exponent: float) -> float:
    """``base ** exponent``, which backends do not have to the same bits."""
    return math.pow(base, exponent)


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


def square_root(x: Number) -> Number:
    """The correctly rounded square root: on CPU, torch's own is up to one unit in the last place off."""
    if not isinstance(x, Tensor):
        return math.sqrt(x)
    if x.device.type != "cpu":
        return x.sqrt()
    root = torch.empty_like(x)
    with np.errstate(invalid="ignore"):
        np.sqrt(x.numpy(), out=root.numpy())
    return root


@functools.cache
def narrows(scalars: type[NamedTuple]) -> tuple[bool, ...]:
    """Which of a rule's scalars are taken in the dtype of its arithmetic: neither flags nor what is `Double`."""
    return tuple(hint is float for hint in get_type_hints(scalars).values())


def narrowed(scalars: Any, arithmetic: torch.dtype) -> Any:
    """The scalars of a step, computed in float64, as the functions of a rule take them."""
    if arithmetic == torch.float64:
        return scalars
    pairs = zip(scalars, narrows(type(scalars)), strict=True)
    return scalars._make([_as_fp32(value) if narrow else value for value, narrow in pairs])


def _as_fp32(value: Number) -> Number:
    return value.to(torch.float32) if isinstance(value, Tensor) else c_float(value).value
