"""Lion."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..numerics import where
from ..optimizer import FusedOptimizer
from ..options import Options


class Hyper(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    weight_decay: float


class Scalars(NamedTuple):
    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    decay: float


class Lion(FusedOptimizer):
    r"""Lion: the sign of an interpolated momentum, in one kernel call per group.

    With gradient :math:`g`, learning rate :math:`\gamma` and weight decay :math:`\lambda`:

    .. math::
        \theta &\leftarrow (1 - \gamma \lambda)\,\theta - \gamma \operatorname{sign}(\beta_1 m + (1 - \beta_1) g) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    The sign of exactly zero is zero: without gradient and momentum nothing moves but the decay.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: learning rate, 0 or larger, typically 3 to 10 times smaller than AdamW's; a number or a one-element tensor.
        betas: weight of the momentum in the step, and decay rate of the momentum, each in [0, 1].
        weight_decay: 0 or larger, typically 3 to 10 times larger than AdamW's.
        use_triton: accepted for compatibility; it chooses nothing here.
        decoupled_weight_decay: divide the weight decay by the learning rate given here, so that it is a rate per step
            of a constant schedule.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility; it chooses nothing here.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter: ``exp_avg`` in the parameter's dtype and layout: 4 bytes per fp32 parameter.

    Raises:
        ValueError, TypeError: an argument is out of range.
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)

    Follows ``lion_pytorch.Lion`` (0.2.5), whose state_dict it shares. Differs from it: a learning rate of 0 is allowed;
    ``decoupled_weight_decay`` is an option of the group. Paper: arXiv 2302.06675.
    """

    rule = "lion"
    Hyper, Scalars = Hyper, Scalars
    state_names = ("exp_avg",)
    step_form = "absent"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        use_triton: bool = False,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        checks.check_flag("decoupled_weight_decay", decoupled_weight_decay)
        if decoupled_weight_decay:
            checks.check_lr(lr)
            if not lr > 0:
                raise ValueError(f"Invalid learning rate: {lr} (with decoupled_weight_decay it must be larger than 0)")
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "weight_decay_divisor": float(lr) if decoupled_weight_decay else 1.0,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.check_lr(group["lr"])
        checks.check_betas(group["betas"], one_allowed=True)
        checks.check_non_negative("weight_decay value", group["weight_decay"])
        checks.check_flag("maximize", group["maximize"])

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names

    def hyper(self, group: dict[str, Any], variant: None) -> tuple[float | Tensor, ...]:
        return group["lr"], *group["betas"], group["weight_decay"] / group["weight_decay_divisor"]

    @staticmethod
    def prepare(h, step):
        return Scalars(h.lr, h.beta1, 1.0 - h.beta1, h.beta2, 1.0 - h.beta2, 1.0 - h.lr * h.weight_decay)

    @staticmethod
    def update(param, grad, exp_avg, s, has):
        direction = s.beta1 * exp_avg + s.one_minus_beta1 * grad
        step = where(direction > 0, -s.lr, where(direction < 0, s.lr, direction))
        return param * s.decay + step, s.beta2 * exp_avg + s.one_minus_beta2 * grad
