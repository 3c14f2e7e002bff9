"""Adam and AMSGrad."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..numerics import divide, maximum, power, real, square_root, where
from ..optimizer import FusedOptimizer
from ..options import Options


class Hyper(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: float
    epsilon_hat: float  # this and the next one: of subclasses
    lr_decay: float


class Scalars(NamedTuple):
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    inv_bias_correction2_sqrt: float
    eps: float
    weight_decay: float
    decay: float


class Adam(FusedOptimizer):
    r"""Adam, optionally with AMSGrad or decoupled weight decay, in one kernel call per group.

    With gradient :math:`g`, learning rate :math:`\gamma`, weight decay :math:`\lambda`, step :math:`t`:

    .. math::
        g &\leftarrow g + \lambda \theta \quad (\text{decoupled: } \theta \leftarrow (1 - \gamma\lambda)\,\theta) \\
        m &\leftarrow m + (1 - \beta_1)(g - m) \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \qquad v_{max} \leftarrow \max(v_{max}, v) \\
        \theta &\leftarrow \theta - \frac{\gamma}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with :math:`v_{max}` in place of :math:`v` in the last line if ``amsgrad``.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: learning rate, 0 or larger; a number or a one-element tensor (read on its device in every step).
        betas: decay rates of the two running averages, each in [0, 1); typically (0.9, 0.999).
        eps: added to the root of the second moment, 0 or larger.
        weight_decay: 0 or larger.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend instead of descend.
        decoupled_weight_decay: decay the parameter itself, as AdamW does.
        foreach, fused, capturable: accepted for compatibility; they choose nothing here. ``step`` can be captured in
            a CUDA graph without a flag.
        differentiable: must be False.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter: ``step`` (one fp32 number), ``exp_avg``, ``exp_avg_sq`` and with amsgrad
    ``max_exp_avg_sq``, in the parameter's dtype and layout: 8 (12) bytes per fp32 parameter.

    Raises:
        ValueError, TypeError: an argument is out of range.
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.Adam(model.parameters(), lr=1e-3)

    Follows ``torch.optim.Adam``, whose state_dict it shares. Papers: arXiv 1412.6980; AMSGrad: Reddi et al., ICLR 2018.
    """

    rule = "adam"
    Hyper, Scalars = Hyper, Scalars
    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    non_negative = ("exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.check_lr(group["lr"])
        checks.check_non_negative("epsilon value", group["eps"])
        checks.check_betas(group["betas"])
        checks.check_non_negative("weight_decay value", group["weight_decay"])
        for flag in ("amsgrad", "maximize", "decoupled_weight_decay"):
            checks.check_flag(flag, group[flag])

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["amsgrad"] else self.state_names[:2]

    def hyper(self, group: dict[str, Any], variant: None) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        decoupled = group["decoupled_weight_decay"]
        return group["lr"], beta1, beta2, group["eps"], group["weight_decay"], decoupled, 0.0, 0.0

    @staticmethod
    def prepare(h, step):
        decoupled = h.decoupled_weight_decay != 0
        lr = divide(h.lr, 1.0 + real(step - 1) * h.lr_decay)
        bias_correction1 = 1.0 - power(h.beta1, step)
        inv_bias_correction2_sqrt = divide(1.0, square_root(1.0 - power(h.beta2, step)))
        return Scalars(
            one_minus_beta1=1.0 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1.0 - h.beta2,
            step_size=divide(lr, bias_correction1),
            inv_bias_correction2_sqrt=inv_bias_correction2_sqrt,
            eps=where(h.epsilon_hat != 0, h.eps * inv_bias_correction2_sqrt, h.eps),
            weight_decay=where(decoupled, 0.0, h.weight_decay),
            decay=where(decoupled & (h.weight_decay != 0), 1.0 - lr * h.weight_decay, 1.0),  # lr may be infinite
        )

    @staticmethod
    def update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, s, has):
        param = param * s.decay
        if s.weight_decay != 0:
            grad = grad + s.weight_decay * param
        exp_avg = exp_avg + s.one_minus_beta1 * (grad - exp_avg)
        exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad
        second_moment = exp_avg_sq
        if has.max_exp_avg_sq:
            max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
            second_moment = max_exp_avg_sq
        denom = square_root(second_moment) * s.inv_bias_correction2_sqrt + s.eps
        return param - divide(s.step_size * exp_avg, denom), exp_avg, exp_avg_sq, max_exp_avg_sq
