"""A gradient scaler that leaves the finite check to the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from .optimizer import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    r"""``torch.amp.GradScaler`` without its separate pass over the gradients.

    torch's scaler reads and writes every gradient to look for infinities and NaNs before it calls ``optimizer.step``.
    Here a `fusedstep` optimizer finds them in the reduction that also takes the norm for ``max_grad_norm``, and
    unscales in the step itself: unscale, check, clip and step read the gradients twice and do not write them.

    Scale, growth and skipped steps are those of ``torch.amp.GradScaler``, and so is the state_dict. Other optimizers,
    several of them at a time, and an explicit ``unscale_`` work as they do there.

    Args:
        device: "cuda" (default) or "cpu".
        init_scale, growth_factor, backoff_factor, growth_interval, enabled: as in ``torch.amp.GradScaler``.

    Example:
        >>> scaler = fusedstep.GradScaler("cuda")
        >>> optimizer = some_class(model.parameters(), max_grad_norm=1.0)  # any of this package
        >>> with torch.autocast("cuda", torch.float16):
        ...     loss = model(batch)
        >>> scaler.scale(loss).backward()
        >>> scaler.step(optimizer)  # unscales, checks, clips and steps
        >>> scaler.update()

    A skipped step is seen by the scale, which `update` lowers then and otherwise never:

        >>> before = scaler.get_scale()
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> was_skipped = scaler.get_scale() < before

    Differs from torch: ``optimizer.step`` is called in any case, so that its hooks run in a skipped step too, and
    whatever counts its calls (Accelerate does) counts that one; it does nothing then, nobody waits for the device, and
    ``.grad`` stays scaled unless ``write_grads`` asks for what was used. The gradients are looked at after the step
    hooks have run. An error in ``step`` leaves no ``grad_scale`` on the optimizer. Where one of these matters, take
    ``torch.amp.GradScaler``: under it these optimizers behave as those of torch.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Update the parameters from scaled gradients, unless one of these is not finite."""
        state = self._per_optimizer_states[id(optimizer)] if self._enabled else None
        if (
            state is None
            or state["stage"] is OptState.STEPPED
            or "closure" in kwargs
            or not isinstance(optimizer, FusedOptimizer)
        ):
            return super().step(optimizer, *args, **kwargs)
        self._check_scale_growth_tracker("step")
        scale: Tensor = self._get_scale_async()
        is_ready = state["stage"] is OptState.READY
        finds_nonfinite = (
            is_ready
            and not optimizer.clips()  # it works on copies, which need not be finite where the gradients are not
            and optimizer.stepper.gradients.can_sum(optimizer)
        )
        if finds_nonfinite:
            found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        else:
            if is_ready:
                self._check_inf_per_device(optimizer)
            found = [each.to(scale.device, non_blocking=True) for each in state["found_inf_per_device"].values()]
            found_inf = torch.stack(found).sum() if found else None
        if is_ready:
            optimizer.grad_scale = scale * getattr(optimizer, "grad_scale", 1)  # the user's own besides, as in torch
        optimizer.found_inf = found_inf
        optimizer.stepper.finds_nonfinite = finds_nonfinite
        try:
            result = optimizer.step(*args, **kwargs)
        finally:
            optimizer.__dict__.pop("grad_scale", None)
            del optimizer.found_inf
            optimizer.stepper.finds_nonfinite = False
        state["stage"] = OptState.STEPPED
        if finds_nonfinite and optimizer.stepper.gradients.any_seen:  # else there was no check, as `update` complains
            state["found_inf_per_device"] = {found_inf.device: found_inf}
        return result
