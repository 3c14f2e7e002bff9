"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..numerics import where
from ..optimizer import FusedOptimizer
from ..options import Options


class Hyper(NamedTuple):
    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: float


_values_of = itemgetter(*Hyper._fields)


class Scalars(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float
    keep: float
    take: float
    nesterov: bool


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent, optionally with (Nesterov) momentum, in one kernel call per group.

    With gradient :math:`g`, learning rate :math:`\gamma`, weight decay :math:`\lambda`, momentum :math:`\mu`,
    dampening :math:`\tau`:

    .. math::
        g &\leftarrow g + \lambda \theta \\
        b &\leftarrow \mu b + (1 - \tau) g \quad (b \leftarrow g \text{ in a parameter's first step}) \\
        \theta &\leftarrow \theta - \gamma b \quad (\theta - \gamma (g + \mu b) \text{ with nesterov})

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: learning rate, 0 or larger; a number or a one-element tensor (read on its device in every step).
        momentum: 0 or larger; 0 keeps no state.
        dampening: the buffer takes (1 - dampening) of each gradient but the first; any finite number.
        weight_decay: L2 penalty, 0 or larger.
        nesterov: look ahead by one momentum step; needs ``momentum > 0`` and ``dampening == 0``.
        maximize: ascend instead of descend.
        foreach, fused: accepted for compatibility; they choose nothing here.
        differentiable: must be False.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter: with momentum ``momentum_buffer``, in the parameter's dtype and layout: 0 (4) bytes per
    fp32 parameter.

    Raises:
        ValueError, TypeError: an argument is out of range.
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    Follows ``torch.optim.SGD``, whose state_dict it shares. Differs: the buffer is dense under sparse gradients too.
    Paper: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    rule = "sgd"
    Hyper, Scalars = Hyper, Scalars
    state_names = ("momentum_buffer",)
    step_form = "absent"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.check_lr(group["lr"])
        checks.check_non_negative("momentum value", group["momentum"])
        checks.check_finite("dampening value", group["dampening"])
        checks.check_non_negative("weight_decay value", group["weight_decay"])
        checks.check_flag("maximize", group["maximize"])
        checks.check_flag("nesterov", group["nesterov"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["momentum"] != 0 else ()

    def begins_anew(self, group: dict[str, Any]) -> bool:
        return group["dampening"] != 0  # the first gradient is not dampened

    @classmethod
    def check_sparse(cls, group: dict[str, Any], what: str) -> None:
        checks.check_no_decay(cls.__name__, group["weight_decay"], what)

    @classmethod
    def changes_rows_alone(cls, group: dict[str, Any]) -> bool:
        return group["momentum"] == 0  # with momentum, rows that were named before go on moving

    def hyper(self, group: dict[str, Any], variant: None) -> tuple[float | Tensor, ...]:
        return _values_of(group)

    @staticmethod
    def prepare(h, step):
        first = step == 1
        keep = where(first, 0.0, h.momentum)
        take = where(first, 1.0, 1.0 - h.dampening)
        return Scalars(h.lr, h.weight_decay, h.momentum, keep, take, h.nesterov != 0)

    @staticmethod
    def update(param, grad, momentum_buffer, s, has):
        if s.weight_decay != 0:
            grad = grad + s.weight_decay * param
        if has.momentum_buffer:
            momentum_buffer = s.keep * momentum_buffer + s.take * grad
            grad = where(s.nesterov, grad + s.momentum * momentum_buffer, momentum_buffer)
        return param - s.lr * grad, momentum_buffer
