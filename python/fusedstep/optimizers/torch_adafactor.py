"""Adafactor in the form of torch.optim."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..numerics import (
    Double,
    divide,
    interpolate,
    maximum,
    real,
    real_power,
    reciprocal,
    square_root,
    where,
)
from ..optimizer import FusedOptimizer
from ..options import Options
from .adafactor import Adafactor


class Hyper(NamedTuple):
    lr: float
    beta2_decay: float
    eps1: float
    eps2: float
    d: float
    weight_decay: float


class Scalars(NamedTuple):
    one_minus_beta2: float
    eps1: float
    limit: float
    rho: Double
    eps2: Double
    d: Double
    decay: Double


class Finish(NamedTuple):
    step_size: float
    decay: float


class TorchAdafactor(FusedOptimizer):
    r"""Adafactor as torch.optim computes it: epsilon bounds the estimate instead of being added to the square.

    With gradient :math:`g`, step :math:`t`, :math:`w = t^{\tau}` (:math:`\tau` is ``beta2_decay``), and the root mean
    square :math:`\mathrm{RMS}`:

    .. math::
        \gamma &= \max(\epsilon_2, \mathrm{RMS}(\theta)) \min(lr, 1/\sqrt t) \\
        R &\leftarrow (1 - w) R + w\,\mathrm{mean}_{columns}(g^2) \qquad
        C \leftarrow (1 - w) C + w\,\mathrm{mean}_{rows}(g^2) \\
        \hat V &= R\,C / \max(\mathrm{mean}(R), \epsilon_1) \qquad u = g / \max(\sqrt{\hat V}, \epsilon_1) \\
        \theta &\leftarrow (1 - lr\,\lambda)\,\theta - \gamma u / \max(1, \mathrm{RMS}(u) / d)

    where a matrix is the last two dimensions of a parameter; parameters of fewer than two dimensions keep the average
    of :math:`g^2` for each element as :math:`\hat V`.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: upper bound of the relative step and rate of the weight decay, 0 or larger; a number or one-element tensor.
        beta2_decay: exponent of the averages' memory, 0 or smaller; typically -0.8.
        eps: two numbers, 0 or larger: bound of the estimate's root, None for the resolution of the parameter's dtype;
            least scale of a parameter.
        d: the RMS of an update is brought down to this, 1 or larger.
        weight_decay: 0 or larger; the decay per step is ``lr * weight_decay``.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility; it chooses nothing here.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter: ``step`` (one fp32 number); ``row_var`` and ``col_var`` (a number for each row and column),
    for fewer than two dimensions ``variance`` (one for each element), in the parameter's dtype: for fp32, 4 bytes for
    each row and column, or for each element of a vector.

    Raises:
        ValueError, TypeError: an argument is out of range.
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) it is
            complex or a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.TorchAdafactor(model.parameters(), lr=1e-2, weight_decay=0.1)

    Follows ``torch.optim.Adafactor``, whose state_dict it shares. Differs: without an epsilon of one's own each
    parameter takes that of its dtype, whatever else is in its group; sums are in higher precision; empty parameters
    are fine. Paper: arXiv 1804.04235.
    """

    rule = "torch_adafactor"
    Hyper, Scalars, Finish = Hyper, Scalars, Finish
    spans: ClassVar = {"row_var": "row", "col_var": "column", "variance": "flat"}
    state_names = tuple(spans)
    variant_options = ("eps",)
    reduces = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        checks.check_pair("eps", group["eps"])
        eps1, eps2 = group["eps"]
        for label, value, least in (
            ("Learning rate", group["lr"], 0.0),
            ("epsilon1", 0.0 if eps1 is None else eps1, 0.0),
            ("epsilon2", eps2, 0.0),
            ("Clipping threshold d", group["d"], 1.0),
            ("weight_decay", group["weight_decay"], 0.0),
        ):
            checks.as_number(label, value)
            if not least <= value:
                raise ValueError(f"{label} should be >= {least:g} but is: {value}")
        checks.as_number("beta2_decay", group["beta2_decay"])
        if not 0.0 >= group["beta2_decay"]:
            raise ValueError(f"beta2_decay should be <= 0 but is: {group['beta2_decay']}")
        checks.check_flag("maximize", group["maximize"])

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names

    def state_shape(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> torch.Size | None:
        shape = param.shape
        if (len(shape) >= 2) == (key == "variance"):
            return None
        if key == "row_var":
            return torch.Size((*shape[:-1], 1))
        return torch.Size((*shape[:-2], 1, *shape[-1:])) if key == "col_var" else shape

    def init_state(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> Tensor:
        return self.zeros(key, group, name, param, param.dtype)

    matrix_dims = Adafactor.matrix_dims

    def variant_of(self, group: dict[str, Any], name: str | None, param: Tensor) -> float:
        """The bound of the estimate's root where the group has none."""
        if group["eps"][0] is not None or not param.is_floating_point():  # frozen weights of other dtypes
            return 0.0
        return torch.finfo(param.dtype).eps

    def hyper(self, group: dict[str, Any], variant: float) -> tuple[float | Tensor, ...]:
        eps1, eps2 = group["eps"]
        eps1 = variant if eps1 is None else eps1
        return group["lr"], group["beta2_decay"], eps1, eps2, group["d"], group["weight_decay"]

    @staticmethod
    def prepare(h, step):
        t = real(step)
        relative = divide(1.0, square_root(t))
        return Scalars(
            one_minus_beta2=real_power(t, h.beta2_decay),
            eps1=h.eps1,
            limit=reciprocal(h.eps1),
            rho=where(relative < h.lr, relative, h.lr),
            eps2=h.eps2,
            d=h.d,
            decay=where(h.weight_decay != 0, 1.0 - h.lr * h.weight_decay, 1.0),  # lr may be infinite
        )

    @staticmethod
    def square(grad, s):
        return grad * grad

    @staticmethod
    def line(mean, state, s):
        state = interpolate(state, mean, s.one_minus_beta2)
        return state, divide(1.0, square_root(state))

    @staticmethod
    def matrix(mean, s):
        return square_root(maximum(mean, s.eps1))

    @staticmethod
    def direction(grad, factor, s):
        return bounded(factor, s) * grad

    @staticmethod
    def finish(s, param_rms, update_rms):
        alpha = where(param_rms > s.eps2, param_rms, s.eps2) * s.rho
        excess = divide(update_rms, s.d)
        return Finish(step_size=divide(alpha, where(excess > 1.0, excess, 1.0)), decay=s.decay)

    @staticmethod
    def update(param, grad, factor, s, f, has):
        return (param * f.decay - f.step_size * (bounded(factor, s) * grad),)


def bounded(factor, s):
    """Torch divides by the larger of the estimate's root and eps1."""
    return where(s.limit < factor, s.limit, factor)
