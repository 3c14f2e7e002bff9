"""Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..options import Options
from .adam import Adam


class AdamW(Adam):
    r"""AdamW: Adam whose weight decay acts on the parameter, not on the gradient, in one kernel call per group.

    The update is that of :class:`fusedstep.Adam` with ``decoupled_weight_decay=True``:
    :math:`\theta \leftarrow (1 - \gamma\lambda)\,\theta` and then Adam's step on the plain gradient.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: learning rate, 0 or larger; a number or a one-element tensor (read on its device in every step).
        betas: decay rates of the two running averages, each in [0, 1); typically (0.9, 0.999).
        eps: added to the root of the second moment, 0 or larger.
        weight_decay: 0 or larger; the decay per step is ``lr * weight_decay``.
        amsgrad, maximize, foreach, capturable, differentiable, fused, **options: as in :class:`fusedstep.Adam`.

    State of each parameter: as in :class:`fusedstep.Adam`, 8 (12) bytes per fp32 parameter.

    Raises:
        ValueError, TypeError, RuntimeError: as in :class:`fusedstep.Adam`.

    Example:
        >>> optimizer = fusedstep.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)

    Follows ``torch.optim.AdamW``, whose state_dict it shares. Paper: arXiv 1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of an AdamW that had no such option
            group["decoupled_weight_decay"] = True
