"""The options of an optimizer about gradients: their norm, and what a step leaves of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from . import checks
from .backends.norm import Limits

NORM_TYPES = (2.0, math.inf)


def check_max_norm(label: str, value: Any) -> None:
    """Raise unless ``value`` is a number that a norm can be limited to."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Invalid {label}: {value!r} is a {type(value).__name__}; it must be a number, 0 or larger")
    if not checks.as_float(label, value) >= 0:
        raise ValueError(f"Invalid {label}: {value} (it must be 0 or larger)")


def check_norm_type(value: Any) -> float:
    """The order of a norm as a number; raises ValueError unless it is one that the kernels know."""
    try:
        order = float(value)
    except (OverflowError, TypeError, ValueError):
        order = math.nan
    if order not in NORM_TYPES:
        raise ValueError(f"Invalid norm_type: {value!r} (it must be 2 or inf)")
    return order


@dataclass(frozen=True)
class GradientOptions:
    """Options of an optimizer about gradients, as `fusedstep.Options` describes them.

    Args:
        epsilon: what the norm is increased by before it divides ``max_grad_norm``.
        nan_if_nonfinite: whether an infinite norm makes every gradient NaN, not zero.
    """

    max_grad_norm: float | None = None
    norm_type: float = 2.0
    error_if_nonfinite: bool = False
    skip_nonfinite: bool = False
    write_grads: bool = False
    zero_grads: bool = False
    epsilon: float = 1e-6
    nan_if_nonfinite: bool = False

    @classmethod
    def chosen(cls, options: dict[str, Any]) -> GradientOptions:
        """Those of an optimizer's options that are about gradients."""
        return cls(**{name: options[name] for name in cls.__annotations__ if name in options})

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None:
            check_max_norm("max_grad_norm", self.max_grad_norm)
        object.__setattr__(self, "norm_type", check_norm_type(self.norm_type))
        for flag in ("error_if_nonfinite", "skip_nonfinite", "write_grads", "zero_grads"):
            checks.check_flag(flag, getattr(self, flag))
        if self.error_if_nonfinite and self.skip_nonfinite:
            raise ValueError(
                "error_if_nonfinite=True and skip_nonfinite=True contradict each other: a step with a non-finite "
                "norm either raises or is skipped"
            )
        if self.write_grads and self.zero_grads:
            raise ValueError(
                "write_grads=True and zero_grads=True contradict each other: after the step .grad holds either the "
                "gradient that was used or zeros"
            )

    def limits(self, max_grad_norm: float | None, find_nonfinite: bool) -> Limits | None:
        """What a step decides by the norm, ``max_grad_norm`` in place of the option; None if it needs no norm."""
        if max_grad_norm is None:
            max_grad_norm = self.max_grad_norm
        if max_grad_norm is None and not (find_nonfinite or self.error_if_nonfinite or self.skip_nonfinite):
            return None
        return Limits(
            math.inf if max_grad_norm is None else float(max_grad_norm),
            self.epsilon,
            self.norm_type == math.inf,
            self.nan_if_nonfinite,
            find_nonfinite,
            bool(self.skip_nonfinite),
        )
