"""Amos, and the scales that it needs of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..numerics import divide, maximum, minimum, power, square_root
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule


class Hyper(NamedTuple):
    lr: float
    eta: float
    beta: float
    momentum: float
    clip_value: float
    extra_l2: float
    c_coef: float
    d_coef: float
    eps: float


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
    the running average of :math:`\delta` takes its place in the last line. Over the dimensions of ``reduce``,
    :math:`g^2` is the mean, and v and b have one number.

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
        reduce: the dimensions over which v and b are shared, neighbours, for all parameters; or a dict from names to
            such dimensions (then parameters must be named; those that it lacks are not reduced), as `amos_reductions`
            derives it from a model. None: v and b have the parameter's shape.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility; it chooses nothing here.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter: ``step`` (one fp32 number), ``exp_avg_sq`` (v), ``decay`` (b) and with momentum
    ``exp_avg``, in the parameter's dtype and layout: 8 (12) bytes per fp32 parameter. Reduced v and b are fp32 (fp64
    for fp64) and have the size 1 in the reduced dimensions: of a linear layer's weight, reduced over its inputs, 8
    bytes per output are left, and 4 per parameter with momentum.

    Raises:
        ValueError, TypeError: an argument is out of range, or ``eta`` has no entry for a parameter.
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.Amos(model.named_parameters(), lr=0.01, eta=fusedstep.amos_scales(model))

    Follows the authors' JAX code (google-research/jestimator, amos.py). Paper: arXiv 2210.11693, algorithm 1.
    """

    rule = "amos"
    Hyper, Scalars = Hyper, Scalars
    state_names = ("exp_avg_sq", "decay", "exp_avg")
    non_negative = ("exp_avg_sq", "decay")
    variant_options = ("eta", "reduce", "param_names")

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
        reduce: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
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
            "reduce": dict(reduce) if isinstance(reduce, Mapping) else reduce,
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
        reduce = group["reduce"]
        for name, dims in reduce.items() if isinstance(reduce, Mapping) else (("", reduce),):
            whose = f" for '{name}'" if name else ""
            if dims is not None and not (
                isinstance(dims, Sequence) and all(type(dim) is int for dim in dims) and not isinstance(dims, str)
            ):
                raise ValueError(f"Invalid reduce{whose}: {dims!r} (it must be a sequence of dimensions, or None)")
        checks.check_flag("maximize", group["maximize"])

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["momentum"] != 0 else self.state_names[:2]

    class Variant(NamedTuple):
        eta: float
        rule: str

    def variant_of(self, group: dict[str, Any], name: str | None, param: Tensor) -> Variant:
        eta = group["eta"]
        if isinstance(eta, Mapping):
            if name not in eta:
                raise ValueError(f"Invalid eta: it has no entry for parameter {name!r} of shape {tuple(param.shape)}")
            eta = eta[name]
        reduced = self._reduced(group, name, param)
        if not reduced:
            return self.Variant(eta, "amos")
        return self.Variant(eta, "amos_rows" if math.prod(param.shape[reduced.stop :]) == 1 else "amos_columns")

    @staticmethod
    def _reduced(group: dict[str, Any], name: str | None, param: Tensor) -> range:
        """The dimensions over which the statistics of a parameter are reduced."""
        reduce = group["reduce"]
        dims = reduce.get(name) if isinstance(reduce, Mapping) else reduce
        if not dims or param.dim() == 0:
            return range(0)
        whose = f"for parameter {name!r} of shape {tuple(param.shape)}"
        if any(not -param.dim() <= dim < param.dim() for dim in dims):
            raise ValueError(f"Invalid reduce {whose}: {tuple(dims)} (it has {param.dim()} dimensions)")
        ordered = sorted({dim % param.dim() for dim in dims})
        if ordered[-1] - ordered[0] + 1 != len(ordered):
            raise ValueError(f"Invalid reduce {whose}: {tuple(dims)} (the dimensions must be neighbours)")
        reduced = range(ordered[0], ordered[-1] + 1)
        return range(0) if math.prod(param.shape[dim] for dim in reduced) == 1 else reduced

    @classmethod
    def rule_of(cls, variant: Variant) -> tuple[str, bool]:
        return variant.rule, variant.rule != cls.rule

    def matrix_dims(self, group: dict[str, Any], name: str | None, param: Tensor) -> tuple[int, int]:
        reduced = self._reduced(group, name, param)
        of_rows = self.variant_of(group, name, param).rule == "amos_rows"
        return (0, reduced.start) if of_rows else (reduced.start, reduced.stop)

    def state_shape(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> torch.Size:
        reduced = () if key == "exp_avg" else self._reduced(group, name, param)
        return torch.Size(1 if dim in reduced else size for dim, size in enumerate(param.shape))

    def init_state(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> Tensor:
        if key == "exp_avg" or not self._reduced(group, name, param):
            return super().init_state(key, group, name, param)
        dtype = torch.promote_types(param.dtype, torch.float32)
        return self.zeros(key, group, name, param, dtype)

    def hyper(self, group: dict[str, Any], variant: Variant) -> tuple[float | Tensor, ...]:
        numbers = (group[name] for name in ("extra_l2", "c_coef", "d_coef", "eps"))
        return group["lr"], variant.eta, group["beta"], group["momentum"], group["clip_value"] or 0.0, *numbers

    @classmethod
    def rule_named(cls, rule: str) -> type[Rule]:
        return {"amos_rows": AmosRows, "amos_columns": AmosColumns}.get(rule, cls)

    @staticmethod
    def prepare(h, step):
        init_lr = h.lr * h.eta
        return Scalars(
            beta=h.beta,
            one_minus_beta=1.0 - h.beta,
            bias_correction=1.0 - power(h.beta, step),
            lr_squared=h.lr * h.lr,
            init_lr=init_lr,
            c=h.c_coef * square_root(h.lr),
            d=h.d_coef * square_root(init_lr),
            extra_l2=h.extra_l2,
            eps=h.eps,
            momentum=h.momentum,
            one_minus_momentum=1.0 - h.momentum,
            clip_value=h.clip_value,
        )

    @staticmethod
    def update(param, grad, exp_avg_sq, decay, exp_avg, s, has):
        grad = clip(grad, s)
        exp_avg_sq, decay, reciprocal_root, l2, divisor = advance(grad * grad, exp_avg_sq, decay, s)
        delta = divide(s.init_lr * (reciprocal_root * grad) + l2 * param, divisor)
        if has.exp_avg:
            exp_avg = s.momentum * exp_avg + s.one_minus_momentum * delta
            delta = exp_avg
        return param - delta, exp_avg_sq, decay, exp_avg


def clip(grad, s):
    if s.clip_value != 0:
        grad = maximum(minimum(grad, s.clip_value), -s.clip_value)
    return grad


def advance(grad_sq, exp_avg_sq, decay, s):
    """The new statistics, and what an update makes of them."""
    exp_avg_sq = s.beta * exp_avg_sq + s.one_minus_beta * grad_sq
    reciprocal = divide(s.bias_correction, maximum(exp_avg_sq, s.eps))
    gamma = divide(s.lr_squared * (reciprocal * grad_sq), square_root(1.0 + s.c * decay))
    divisor = 1.0 + s.d * decay
    decay = decay + gamma * (1.0 + decay)
    return exp_avg_sq, decay, square_root(reciprocal), 0.5 * gamma + s.extra_l2, divisor


class AmosOfLines(Rule):
    """Amos with statistics of whole rows or columns."""

    Hyper, Scalars = Hyper, Scalars
    state_names = Amos.state_names
    reduces = True
    prepare = staticmethod(Amos.prepare)

    @staticmethod
    def square(grad, s):
        grad = clip(grad, s)
        return grad * grad

    @staticmethod
    def line(mean, exp_avg_sq, decay, s):
        exp_avg_sq, decay, reciprocal_root, l2, divisor = advance(mean, exp_avg_sq, decay, s)
        return exp_avg_sq, decay, divide(s.init_lr * reciprocal_root, divisor), divide(l2, divisor)

    @staticmethod
    def update(param, grad, factor, factor2, exp_avg, s, f, has):
        delta = factor * clip(grad, s) + factor2 * param
        if has.exp_avg:
            exp_avg = s.momentum * exp_avg + s.one_minus_momentum * delta
            delta = exp_avg
        return param - delta, exp_avg


class AmosRows(AmosOfLines):
    rule = "amos_rows"
    spans: ClassVar = {"exp_avg_sq": "row", "decay": "row", "exp_avg": "element"}


class AmosColumns(AmosOfLines):
    rule = "amos_columns"
    spans: ClassVar = {"exp_avg_sq": "column", "decay": "column", "exp_avg": "element"}


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


def amos_reductions(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """`Amos`'s ``reduce`` for the parameters of a model, by name, as the paper's experiments have it.

    Args:
        model: its parameters are taken as in `torch.nn`, where outputs (of an embedding, entries) come first.

    Returns:
        For a parameter of two or more dimensions all but the first: a number for each output or entry is left. For
        another all: one number is left.

    Paper: arXiv 2210.11693; the axes are those of the authors' models (google-research/jestimator, models/bert).
    """
    return {
        name: tuple(range(min(1, param.dim() - 1), param.dim()))
        for name, param in model.named_parameters()
        if param.dim()
    }
