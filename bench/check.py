"""The correctness check that every row passes before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import chain
from .optimizers import Optimizer

# The gradient changes its size and sign from step to step: with a constant one, Adam's first steps do not depend on its
# betas, nor AMSGrad's on its maximum. All factors are powers of two, so that scaling is exact in every dtype.
GRAD_FACTORS = (2.0, -0.25, 0.25)

# Largest `error` of a right implementation. In float32 it is rounding error, and that of torch's CUDA kernels in the
# bias correction (6e-5). In bfloat16 it is that of a for-loop which rounds after every operation: three units in the
# last place.
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 3 * 2.0**-7}

PIECE = 1 << 22  # elements that the reference computes at once, to bound its memory


def make_parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random parameters with random gradients; the same ones in every run."""
    generator = torch.Generator(device).manual_seed(20)
    params = []
    for shape in shapes:
        param = torch.empty(shape, dtype=dtype, device=device).uniform_(-1.0, 1.0, generator=generator)
        param.grad = torch.empty_like(param)
        params.append(param.requires_grad_())
    fill_grads(params)
    return params


@torch.no_grad()
def fill_grads(params: Sequence[Tensor]) -> None:
    """Random gradients of both signs, none of which is zero; the same ones in every run."""
    generator = torch.Generator(params[0].device).manual_seed(21)
    for param in params:
        param.grad.uniform_(0.1, 1.1, generator=generator)
        param.grad.view(-1)[::3].neg_()


def take_steps(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], factors: Sequence[float] = GRAD_FACTORS
) -> Iterator[None]:
    """Take the steps of the check and pause after each; in the end the gradients are again what they were."""
    scale = 1.0
    try:
        for factor in factors:
            _scale_grads(params, factor / scale)
            scale = factor
            optimizer.step()
            yield
    finally:
        _scale_grads(params, 1.0 / scale)


@torch.no_grad()
def _scale_grads(params: Sequence[Tensor], factor: float) -> None:
    torch._foreach_mul_([param.grad for param in params], factor)


@torch.no_grad()
def expected(optimizer: Optimizer, params: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What the parameters are after the steps of the check, as float32.

    The arithmetic is that of the for-loop of torch.optim in float64 (of the reference backend for an optimizer that
    torch lacks). Parameters and states are rounded to ``dtype`` after every step, since that is how they are stored;
    not if it is float32, whose rounding is below the tolerance.
    """
    results = []
    factors: Sequence[float] = GRAD_FACTORS
    if optimizer.chain:
        factors = [f * c for f, c in zip(factors, chain.coefficients(params, factors), strict=True)]
    for param in params:
        result = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
        size = PIECE if optimizer.elementwise else max(1, param.numel())
        shape = (-1,) if optimizer.elementwise else param.shape
        pieces = (param.detach().view(-1).split(size), param.grad.view(-1).split(size), result.view(-1).split(size))
        for piece, grad, target in zip(*pieces, strict=True):
            wide = piece.to(torch.float64).view(shape).requires_grad_()
            wide.grad = grad.to(torch.float64).view(shape)
            reference = _reference(optimizer, wide)
            for _ in take_steps(reference, [wide], factors):
                if dtype != torch.float32:
                    states = [value for value in reference.state[wide].values() if isinstance(value, Tensor)]
                    for stored in (wide, *(state for state in states if state.shape == wide.shape)):
                        stored.copy_(stored.to(dtype))
            target.copy_(wide.view(-1))
        results.append(result)
    return results


def _reference(optimizer: Optimizer, param: Tensor) -> torch.optim.Optimizer:
    if optimizer.torch_class is not None:
        return optimizer.torch_class([param], **optimizer.options, foreach=False)
    return optimizer.our_class([param], **optimizer.options, backend="reference")


@torch.no_grad()
def error(params: Sequence[Tensor], before: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest ``|param - right| / (|right| + |right - before|)`` of all elements; NaN if any element is NaN."""
    worst = 0.0
    for tensors in zip(params, before, right, strict=True):
        for p, b, r in zip(*(tensor.detach().view(-1).split(PIECE) for tensor in tensors), strict=True):
            scale = r.abs() + (r - b).abs() + 1e-6  # an element that should not move, from zero to zero
            found = ((p - r).abs() / scale).max().item()
            if not found <= worst:
                worst = found
            if worst != worst:
                return worst
    return worst


def check(
    build: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    right: Sequence[Tensor],
) -> tuple[torch.optim.Optimizer, float]:
    """Build an optimizer, let it take the steps from ``before``, and compare with ``right``.

    Returns the optimizer and the error.
    """
    with torch.no_grad():
        for param, start in zip(params, before, strict=True):
            param.copy_(start)
    optimizer = build(params)
    for _ in take_steps(optimizer, params):
        pass
    return optimizer, error(params, before, right)
