"""RMSprop."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..numerics import divide, maximum, power, square_root
from ..optimizer import FusedOptimizer
from ..options import Options


class Hyper(NamedTuple):
    lr: float
    alpha: float
    eps: float
    weight_decay: float
    momentum: float
    momentum_decay: float


_values_of = itemgetter(*Hyper._fields)


class Scalars(NamedTuple):
    lr: float
    alpha: float
    one_minus_alpha: float
    eps: float
    weight_decay: float
    momentum: float


class RMSprop(FusedOptimizer):
    r"""RMSprop, plain or centered, with or without momentum, in one kernel call per group.

    With gradient :math:`g`, learning rate :math:`\gamma`, weight decay :math:`\lambda`, momentum :math:`\mu` with decay
    :math:`\delta`, step :math:`t`:

    .. math::
        g &\leftarrow g + \lambda \theta \\
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        \bar g &\leftarrow \bar g + (1 - \alpha)(g - \bar g), \quad
        \hat v = \max(v - \bar g^2, 0) \quad (\text{centered; otherwise } \hat v = v) \\
        b &\leftarrow \mu (1 - \delta)^{t - 1} b + g / (\sqrt{\hat v} + \epsilon) \\
        \theta &\leftarrow \theta - \gamma b

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: learning rate, 0 or larger; a number or a one-element tensor (read on its device in every step).
        alpha: decay rate of the running averages, 0 or larger; typically 0.99.
        eps: added to the root, 0 or larger.
        weight_decay: 0 or larger.
        momentum: 0 or larger; 0 keeps no buffer.
        centered: divide by an estimate of the gradient's standard deviation.
        maximize: ascend instead of descend.
        foreach, capturable: accepted for compatibility; they choose nothing here.
        differentiable: must be False.
        momentum_decay: in [0, 1]; the momentum of step t is ``momentum * (1 - momentum_decay) ** (t - 1)``.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter: ``step`` (one fp32 number), ``square_avg``, with momentum ``momentum_buffer``, if centered
    ``grad_avg``, in the parameter's dtype and layout: 4, 8 or 12 bytes per fp32 parameter. With ``state_dtype`` both
    averages of a centered one are in fp32: their difference would not survive in fewer bits.

    Raises:
        ValueError, TypeError: an argument is out of range.
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.RMSprop(model.parameters(), lr=1e-3, momentum=0.9, centered=True)

    Follows ``torch.optim.RMSprop``, whose state_dict it shares. Differs from it: ``momentum_decay``; a centered
    variance that rounding has made negative counts as zero, where torch takes its root, which is NaN. Papers: Tieleman
    and Hinton, lecture 6.5 of "Neural Networks for Machine Learning", 2012; centered: arXiv 1308.0850.
    """

    rule = "rmsprop"
    Hyper, Scalars = Hyper, Scalars
    state_names = ("square_avg", "momentum_buffer", "grad_avg")
    non_negative = ("square_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        momentum_decay: float = 0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "momentum_decay": momentum_decay,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.check_lr(group["lr"])
        checks.check_non_negative("epsilon value", group["eps"])
        checks.check_non_negative("momentum value", group["momentum"])
        checks.check_non_negative("weight_decay value", group["weight_decay"])
        checks.check_non_negative("alpha value", group["alpha"])
        checks.check_fraction("momentum_decay value", group["momentum_decay"])
        for flag in ("centered", "maximize"):
            checks.check_flag(flag, group[flag])

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        momentum = ("momentum_buffer",) if group["momentum"] != 0 else ()
        return ("square_avg", *momentum, *(("grad_avg",) if group["centered"] else ()))

    def exact_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("square_avg", "grad_avg") if group["centered"] else ()

    def hyper(self, group: dict[str, Any], variant: None) -> tuple[float | Tensor, ...]:
        return _values_of(group)

    @staticmethod
    def prepare(h, step):
        momentum = h.momentum * power(1.0 - h.momentum_decay, step - 1)
        return Scalars(h.lr, h.alpha, 1.0 - h.alpha, h.eps, h.weight_decay, momentum)

    @staticmethod
    def update(param, grad, square_avg, momentum_buffer, grad_avg, s, has):
        if s.weight_decay != 0:
            grad = grad + s.weight_decay * param
        square_avg = s.alpha * square_avg + s.one_minus_alpha * grad * grad
        variance = square_avg
        if has.grad_avg:
            grad_avg = grad_avg + s.one_minus_alpha * (grad - grad_avg)
            variance = maximum(square_avg - grad_avg * grad_avg, 0.0)
        denom = square_root(variance) + s.eps
        if has.momentum_buffer:
            momentum_buffer = s.momentum * momentum_buffer + divide(grad, denom)
            param = param - s.lr * momentum_buffer
        else:
            param = param - divide(s.lr * grad, denom)
        return param, square_avg, momentum_buffer, grad_avg
