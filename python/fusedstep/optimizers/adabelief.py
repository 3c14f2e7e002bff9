"""AdaBelief."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import torch
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
    weight_decouple: float
    fixed_decay: float
    rectify: float
    degenerated_to_sgd: float


class Scalars(NamedTuple):
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    inv_bias_correction2_sqrt: float
    eps: float
    weight_decay: float
    decay: float
    rectify: bool
    adaptive: bool


class AdaBelief(FusedOptimizer):
    r"""AdaBelief, rectified or not, with AMSGrad, with coupled, decoupled or fixed decay; one kernel call per group.

    With gradient :math:`g`, learning rate :math:`\gamma`, weight decay :math:`\lambda`, step :math:`t`:

    .. math::
        \theta &\leftarrow (1 - \gamma\lambda)\,\theta \quad
        (\text{fixed: } (1 - \lambda)\,\theta; \text{ coupled: } g \leftarrow g + \lambda\theta) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        s &\leftarrow \beta_2 s + (1 - \beta_2) (g - m)^2 + \epsilon \qquad s_{max} \leftarrow \max(s_{max}, s) \\
        \theta &\leftarrow \theta - \frac{\gamma}{1 - \beta_1^t} \frac{m}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}

    with :math:`s_{max}` in place of :math:`s` in the last line if ``amsgrad``. With ``rectify`` the last line is that
    of RAdam (arXiv 1908.03265): let :math:`\rho_\infty = 2 / (1 - \beta_2) - 1` and
    :math:`\rho = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)`. If :math:`\rho \ge 5`,

    .. math::
        \theta \leftarrow \theta - \frac{\gamma}{1 - \beta_1^t} \sqrt{(1 - \beta_2^t)
        \frac{(\rho - 4)(\rho - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho}} \frac{m}{\sqrt s + \epsilon}

    and otherwise :math:`\theta \leftarrow \theta - \gamma m / (1 - \beta_1^t)`, or nothing without
    ``degenerated_to_sgd``.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: learning rate, 0 or larger; a number or a one-element tensor (read on its device in every step).
        betas: decay rates of the two running averages, each in [0, 1); typically (0.9, 0.999).
        eps: 0 or larger; added to the running variance in every step, where it stays, and to its root.
        weight_decay: 0 or larger.
        amsgrad: divide by the largest variance so far; as in the original, a rectified step does not.
        weight_decouple: decay the parameter itself instead of adding the decay to the gradient.
        fixed_decay: with ``weight_decouple``, do not multiply the decay by the learning rate.
        rectify: take RAdam's rectified step.
        degenerated_to_sgd: with ``rectify``, take a momentum step while the variance cannot be trusted yet.
        print_change_log: accepted for compatibility; nothing is printed.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility; it chooses nothing here.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter: ``step``, ``exp_avg``, ``exp_avg_var`` and with amsgrad ``max_exp_avg_var``, in the
    parameter's dtype (fp32 for fp16) and layout: 8 (12) bytes per fp32 parameter.

    Raises:
        ValueError, TypeError: an argument is out of range.
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.AdaBelief(model.parameters(), lr=1e-3, eps=1e-16)

    Follows adabelief-pytorch 0.2.1, whose state_dict it shares. Differs from it: the gradient is not written to;
    ``weight_decouple``, ``fixed_decay``, ``rectify`` and ``degenerated_to_sgd`` are options of the group. Paper: arXiv
    2010.07468.
    """

    rule = "adabelief"
    Hyper, Scalars = Hyper, Scalars
    state_names = ("exp_avg", "exp_avg_var", "max_exp_avg_var")
    non_negative = ("exp_avg_var", "max_exp_avg_var")
    step_form = "int"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0,
        amsgrad: bool = False,
        weight_decouple: bool = True,
        fixed_decay: bool = False,
        rectify: bool = True,
        degenerated_to_sgd: bool = True,
        print_change_log: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "buffer": [[None, None, None] for _ in range(10)],  # the original's, which it misses if it is not there
            "weight_decouple": weight_decouple,
            "fixed_decay": fixed_decay,
            "rectify": rectify,
            "degenerated_to_sgd": degenerated_to_sgd,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.check_lr(group["lr"])
        checks.check_non_negative("epsilon value", group["eps"])
        checks.check_betas(group["betas"])
        checks.check_non_negative("weight_decay value", group["weight_decay"])
        for flag in ("amsgrad", "weight_decouple", "fixed_decay", "rectify", "degenerated_to_sgd", "maximize"):
            checks.check_flag(flag, group[flag])

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["amsgrad"] else self.state_names[:2]

    def init_state(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> Tensor:
        dtype = torch.float32 if param.dtype == torch.float16 else param.dtype
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def hyper(self, group: dict[str, Any], variant: None) -> tuple[float | Tensor, ...]:
        return group["lr"], *group["betas"], *(group[name] for name in Hyper._fields[3:])

    @staticmethod
    def prepare(h, step):
        rectify, decouple = h.rectify != 0, h.weight_decouple != 0
        beta2_t = power(h.beta2, step)
        step_size = divide(h.lr, 1.0 - power(h.beta1, step))
        n_max = divide(2.0, 1.0 - h.beta2) - 1.0
        n = n_max - divide(2.0 * real(step) * beta2_t, 1.0 - beta2_t)
        rectified = n >= 5.0
        n = where(rectified, n, 5.0)  # where they are not used, numbers that keep the root real
        n_max = where(rectified, n_max, 5.0)
        ratio = divide(divide(divide(n - 4.0, n_max - 4.0) * (n - 2.0), n) * n_max, n_max - 2.0)
        rectified_size = step_size * square_root((1.0 - beta2_t) * ratio)
        degenerated_size = where(h.degenerated_to_sgd != 0, step_size, 0.0)
        decay = where(h.fixed_decay != 0, 1.0 - h.weight_decay, 1.0 - h.lr * h.weight_decay)
        return Scalars(
            beta1=h.beta1,
            one_minus_beta1=1.0 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1.0 - h.beta2,
            step_size=where(rectify, where(rectified, rectified_size, degenerated_size), step_size),
            inv_bias_correction2_sqrt=where(rectify, 1.0, divide(1.0, square_root(1.0 - beta2_t))),
            eps=h.eps,
            weight_decay=where(decouple, 0.0, h.weight_decay),
            decay=where(decouple, decay, 1.0),
            rectify=rectify,
            adaptive=rectified | (h.rectify == 0),
        )

    @staticmethod
    def update(param, grad, exp_avg, exp_avg_var, max_exp_avg_var, s, has):
        param = param * s.decay
        if s.weight_decay != 0:
            grad = grad + s.weight_decay * param
        exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad
        residual = grad - exp_avg
        exp_avg_var = s.beta2 * exp_avg_var + s.one_minus_beta2 * residual * residual + s.eps
        variance = exp_avg_var
        if has.max_exp_avg_var:
            max_exp_avg_var = maximum(max_exp_avg_var, exp_avg_var)
            variance = where(s.rectify, exp_avg_var, max_exp_avg_var)
        if s.adaptive:
            denom = square_root(variance) * s.inv_bias_correction2_sqrt + s.eps
            param = param - divide(s.step_size * exp_avg, denom)
        elif s.step_size != 0:
            param = param - s.step_size * exp_avg
        return param, exp_avg, exp_avg_var, max_exp_avg_var
