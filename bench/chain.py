"""What surrounds a step in training: unscale, check and clip, as one call to be checked and timed like a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fusedstep

MAX_NORM = 1.0  # far below the norm of the gradients of the check: every step clips
SCALE = 1024.0  # of the gradients in the check
CLIP, WHOLE = "clip", "unscale, check, clip"  # the kinds of chain


def coefficients(params: Sequence[Tensor], factors: Sequence[float]) -> list[float]:
    """What clipping multiplies the gradients by in steps that take them times ``factors``."""
    norm = sum(param.grad.detach().double().square().sum().item() for param in params) ** 0.5
    return [min(1.0, MAX_NORM / (abs(factor) * norm + 1e-6)) for factor in factors]


class Chain:
    """An optimizer whose `step` is the whole chain; otherwise the optimizer itself.

    torch's calls write into the gradients. While the chain is checked, each step begins with scaled gradients and ends
    by restoring them; while it is timed it does not, and the scale is 1, which costs the same and leaves the gradients
    as they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], kind: str, ours: bool) -> None:
        self.optimizer = optimizer
        self.params = params
        self.clips = not ours  # ours clips in the step
        self.scaler = None
        self.checked = True
        if kind == WHOLE:
            self._scale_by(SCALE, ours, params[0].device.type)

    def _scale_by(self, scale: float, ours: bool, device: str) -> None:
        made = fusedstep.GradScaler if ours else torch.amp.GradScaler
        self.scaler = made(device, init_scale=scale, growth_interval=1 << 30)
        self.scaler.scale(torch.ones((), device=device))  # makes it ready
        self._again = lambda: self._scale_by(1.0, ours, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def begin_timing(self) -> None:
        """From here on leave out what only the check needs."""
        self.checked = False
        if self.scaler is not None:
            self._again()

    def step(self) -> None:
        """Unscale, check and clip the gradients as the kind of chain has it, and update the parameters."""
        if not self.checked:
            return self._step()
        with torch.no_grad():
            grads = [param.grad for param in self.params]
            kept = [grad.clone() for grad in grads]
            if self.scaler is not None:
                torch._foreach_mul_(grads, SCALE)
            self._step()
            torch._foreach_copy_(grads, kept)

    def _step(self) -> None:
        if self.scaler is None:
            if self.clips:
                torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
            self.optimizer.step()
            return
        if self.clips:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def chained(build: Callable[[Sequence[Tensor]], torch.optim.Optimizer], kind: str, ours: bool) -> Callable[..., Chain]:
    """``build`` with the chain around what it makes."""
    return lambda params: Chain(build(params), params, kind, ours)
