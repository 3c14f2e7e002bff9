"""The norm of all gradients of a step: where its numbers lie, and the reference for the compiled engines."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = 4


class Limits(NamedTuple):
    """What the norm decides; csrc/norm.h's NormLimits."""

    max_norm: float  # coefficient: 1, or what brings the norm down to this
    epsilon: float  # added to the norm before max_norm is divided by it
    by_max_abs: bool  # the norm is the largest absolute value, not the root of the sum of squares
    nan_if_nonfinite: bool  # the coefficient is NaN if the norm is not finite
    find_nonfinite: bool  # a step with a gradient that is not finite is skipped
    skip_nonfinite: bool  # so is a step whose norm is not finite

    @property
    def skips(self) -> bool:
        return self.find_nonfinite or self.skip_nonfinite


NO_LIMITS = Limits(math.inf, 0.0, False, False, False, False)


class Norm:
    """The numbers of a reduction, csrc/norm.h's Norm in the memory of a device, and whether the step is skipped."""

    def __init__(self, device: torch.device) -> None:
        numbers = torch.zeros(NUMBERS, dtype=torch.float64, device=device)
        self.__setstate__((numbers, torch.zeros((), dtype=torch.float32, device=device)))

    def __getstate__(self) -> tuple[Tensor, Tensor]:
        return self.numbers, self.found_inf

    def __setstate__(self, state: tuple[Tensor, Tensor]) -> None:
        self.numbers, self.found_inf = state
        self.device = self.numbers.device
        self.sum_of_squares, self.max_abs, self.norm, self.coefficient = self.numbers.unbind()

    def add(self, sum_of_squares: Tensor, max_abs: Tensor) -> None:
        """Add the sums over other gradients."""
        self.sum_of_squares.add_(moved(sum_of_squares, self.device))
        self.max_abs.copy_(torch.maximum(self.max_abs, moved(max_abs, self.device)))

    def finish(self, limits: Limits, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """From the sums to what they decide."""
        if limits.by_max_abs:
            scale = 1.0 if grad_scale is None else moved(grad_scale, self.device).to(self.norm)
            self.norm.copy_(self.max_abs / scale)
        else:
            self.norm.copy_(self.sum_of_squares.sqrt())
        # Both operands are tensors: torch multiplies a number by the reciprocal of a tensor, which rounds twice.
        coefficient = (torch.full_like(self.norm, limits.max_norm) / (self.norm + limits.epsilon)).clamp(max=1.0)
        if limits.nan_if_nonfinite:
            coefficient = coefficient + (self.norm - self.norm)
        self.coefficient.copy_(coefficient)
        skipped = torch.zeros_like(self.norm, dtype=torch.bool)
        if found_inf is not None:
            skipped = skipped | (moved(found_inf, self.device).reshape(()) != 0)
        if limits.find_nonfinite:
            skipped = skipped | ~self.max_abs.isfinite()
        if limits.skip_nonfinite:
            skipped = skipped | ~self.norm.isfinite()
        self.found_inf.copy_(skipped)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the host waits for it only where it reads it itself."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def sums(grads: Iterable[Tensor], grad_scale: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sum of squares of the gradients divided by their scale, and the largest absolute value of those given."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    max_abs = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        values = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad
        if values.numel() == 0:
            continue
        magnitudes = values.abs()  # of a complex number too
        magnitudes = magnitudes.to(torch.promote_types(magnitudes.dtype, torch.float32))
        max_abs = torch.maximum(max_abs, magnitudes.max().to(max_abs))
        if grad_scale is not None:
            magnitudes = magnitudes * grad_scale.to(grad.device).double().reciprocal().to(magnitudes)
        total = total + magnitudes.square().sum(dtype=torch.float64).to(device)
    return total, max_abs
