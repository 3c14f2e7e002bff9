"""Amos, and the scales that it needs of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import checks
from .numerics import power, square_root
from .optimizer import FusedOptimizer
from .options import Options


class Amos(FusedOptimizer):
    r"""Amos: Adam-style steps whose learning rate and weight decay fade by themselves; one kernel call per group.

    With gradient :math:`g`, global learning rate :math:`\xi`, the parameter's expected scale :math:`\eta`, step
    :math:`t`:

    .. math::
        v &\leftarrow \beta v + (1 - \beta) g^2 \qquad \hat v = \max(v, \epsilon) / (1 - \beta^t) \\
        \gamma &= \frac{\xi^2 g^2}{\hat v \sqrt{1 + c \sqrt\xi\, b}} \\
        \delta &= \frac{\xi \eta\, g / \sqrt{\hat v} + (\gamma / 2 + \lambda)\,\theta}{1 + d \sqrt{\xi\eta}\, b} \\
        b &\leftarrow b + \gamma (1 + b) \\
        \theta &\leftarrow \theta - \delta

    where :math:`g` is clipped to :math:`\pm` ``clip_value`` first, :math:`\lambda` is ``extra_l2``, and with momentum
    the running average of :math:`\delta` takes its place in the last line.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: the global learning rate, 0 or larger; about 1 / sqrt(number of batches of the training data). A number or
            a one-element tensor (read on its device in every step).
        eta: the scale that the entries of a parameter grow to, 0 or larger: a number, or a dict from names to numbers
            (then parameters must be named), as `amos_scales` derives it from a model.
        beta: decay rate of the average of squares, in [0, 1); 1 - beta of the order of ``lr``.
        momentum: decay rate of the average of updates, in [0, 1); 0 keeps none.
        clip_value: limit of the size of each element of a gradient; None or 0: no limit.
        extra_l2: additional weight decay, 0 or larger.
        c_coef, d_coef: how fast weight decay and learning rate fade, 0 or larger.
        eps: least value of v, larger than 0.
        maximize: ascend instead of descend.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter: ``step`` (one fp32 number), ``exp_avg_sq`` (v), ``decay`` (b) and with momentum
    ``exp_avg``, in the parameter's dtype and layout: 8 (12) bytes per fp32 parameter.

    Raises:
        ValueError, TypeError: an argument is out of range, or ``eta`` has no entry for a parameter.
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.Amos(model.named_parameters(), lr=0.01, eta=fusedstep.amos_scales(model))

    Follows the authors' JAX code (google-research/jestimator, amos.py). Paper: arXiv 2210.11693, algorithm 1.
    """

    rule = "amos"
    hyper_names = ("lr", "eta", "beta", "momentum", "clip_value", "extra_l2", "c_coef", "d_coef", "eps")
    state_names = ("exp_avg_sq", "decay", "exp_avg")
    non_negative = ("exp_avg_sq", "decay")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        eta: float | Mapping[str, float] = 1.0,
        beta: float = 0.999,
        momentum: float = 0.0,
        clip_value: float | None = None,
        extra_l2: float = 0.0,
        c_coef: float = 0.25,
        d_coef: float = 0.25,
        eps: float = 2.0**-125,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "eta": dict(eta) if isinstance(eta, Mapping) else eta,
            "beta": beta,
            "momentum": momentum,
            "clip_value": clip_value,
            "extra_l2": extra_l2,
            "c_coef": c_coef,
            "d_coef": d_coef,
            "eps": eps,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.check_lr(group["lr"])
        eta = group["eta"]
        for name, value in eta.items() if isinstance(eta, Mapping) else (("", eta),):
            checks.check_non_negative(f"eta value for '{name}'" if name else "eta value", value)
        checks.check_fraction("beta value", group["beta"], one_allowed=False)
        checks.check_fraction("momentum value", group["momentum"], one_allowed=False)
        for option in ("extra_l2", "c_coef", "d_coef"):
            checks.check_non_negative(f"{option} value", group[option])
        if group["clip_value"] is not None:
            checks.check_non_negative("clip_value value", group["clip_value"])
        checks.check_positive("epsilon value", group["eps"])
        checks.check_flag("maximize", group["maximize"])

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["momentum"] != 0 else self.state_names[:2]

    def variant_of(self, group: dict[str, Any], name: str | None, param: Tensor) -> float:
        """The scale of a parameter."""
        eta = group["eta"]
        if not isinstance(eta, Mapping):
            return eta
        if name not in eta:
            raise ValueError(f"Invalid eta: it has no entry for parameter {name!r} of shape {tuple(param.shape)}")
        return eta[name]

    def hyper(self, group: dict[str, Any], variant: float) -> tuple[float | Tensor, ...]:
        numbers = (group[name] for name in ("extra_l2", "c_coef", "d_coef", "eps"))
        return group["lr"], variant, group["beta"], group["momentum"], group["clip_value"] or 0.0, *numbers

    class Scalars(NamedTuple):
        beta: float
        one_minus_beta: float
        bias_correction: float
        lr_squared: float
        init_lr: float
        c: float
        d: float
        extra_l2: float
        eps: float
        momentum: float
        one_minus_momentum: float
        clip_value: float

    @classmethod
    def prepare(cls, hyper: tuple[float, ...], step: int) -> Scalars:
        lr, eta, beta, momentum, clip_value, extra_l2, c_coef, d_coef, eps = hyper
        init_lr = lr * eta
        return cls.Scalars(
            beta=beta,
            one_minus_beta=1.0 - beta,
            bias_correction=1.0 - power(beta, step),
            lr_squared=lr * lr,
            init_lr=init_lr,
            c=c_coef * math.sqrt(lr),
            d=d_coef * math.sqrt(init_lr),
            extra_l2=extra_l2,
            eps=eps,
            momentum=momentum,
            one_minus_momentum=1.0 - momentum,
            clip_value=clip_value,
        )

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg_sq: Tensor,
        decay: Tensor,
        exp_avg: Tensor | None,
        s: Scalars,
    ) -> tuple[Tensor | None, ...]:
        if s.clip_value != 0:
            grad = grad.clamp(-s.clip_value, s.clip_value)
        grad_sq = grad * grad
        exp_avg_sq = s.beta * exp_avg_sq + s.one_minus_beta * grad_sq
        reciprocal = torch.full_like(exp_avg_sq, s.bias_correction) / exp_avg_sq.clamp(min=s.eps)
        gamma = s.lr_squared * (reciprocal * grad_sq) / square_root(1.0 + s.c * decay)
        delta = s.init_lr * (square_root(reciprocal) * grad) + (0.5 * gamma + s.extra_l2) * param
        delta = delta / (1.0 + s.d * decay)
        decay = decay + gamma * (1.0 + decay)
        if exp_avg is not None:
            exp_avg = s.momentum * exp_avg + s.one_minus_momentum * delta
            delta = exp_avg
        return param - delta, exp_avg_sq, decay, exp_avg


NORMS = (
    *(torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm),
    *(torch.nn.modules.batchnorm._NormBase,),  # batch and instance norms of every dimension
)


def amos_scales(model: torch.nn.Module, after_activation: Sequence[str] = ()) -> dict[str, float]:
    """`Amos`'s ``eta`` for the parameters of common layers, by name.

    Args:
        model: its linear, convolution, embedding and normalisation layers are known; so are biases of any layer, and
            matrices of any other layer, which count as linear.
        after_activation: regular expressions of the names of parameters whose layer takes the output of a ReLU-like
            activation, which lets half of its input through.

    Returns:
        For a weight of a normalisation layer 1; for a bias 0.5; for an embedding of dimension d sqrt(2 / d); for a
        linear layer or convolution with n inputs to each output sqrt(1 / n), or sqrt(2 / n) after an activation.

    Raises:
        ValueError: a parameter is none of these; the text names it.

    Paper: arXiv 2210.11693, section 3.1 and appendix; the values are those of the authors' models
    (google-research/jestimator, models/bert/modeling.py).
    """
    scales = {}
    for path, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            gain = 2.0 if any(re.search(pattern, full) for pattern in after_activation) else 1.0
            if "bias" in name:
                scale = 0.5
            elif isinstance(module, NORMS):
                scale = 1.0
            elif isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
                scale = math.sqrt(2.0 / param.shape[-1])
            elif isinstance(module, torch.nn.modules.conv._ConvNd):
                inputs = module.in_channels // module.groups * math.prod(module.kernel_size)
                scale = math.sqrt(gain / inputs)
            elif param.dim() >= 2:
                scale = math.sqrt(gain / math.prod(param.shape[1:]))
            else:
                raise ValueError(
                    f"there is no known scale for parameter '{full}' of {type(module).__name__}, shape "
                    f"{tuple(param.shape)}; give Amos an eta of your own for it"
                )
            scales[full] = scale
    return scales
