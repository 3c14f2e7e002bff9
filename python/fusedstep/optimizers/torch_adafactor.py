"""Adafactor in the form of torch.optim."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..numerics import square_root
from ..optimizer import FusedOptimizer
from ..options import Options
from .adafactor import Adafactor, root_mean_square


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
        RuntimeError: ``backend`` cannot run for these parameters, a parameter is a DTensor, or (from ``step``) it is
            complex or a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.TorchAdafactor(model.parameters(), lr=1e-2, weight_decay=0.1)

    Follows ``torch.optim.Adafactor``, whose state_dict it shares. Differs: without an epsilon of one's own each
    parameter takes that of its dtype, whatever else is in its group; sums are in higher precision; empty parameters
    are fine. Paper: arXiv 1804.04235.
    """

    rule = "torch_adafactor"
    hyper_names = ("lr", "beta2_decay", "eps1", "eps2", "d", "weight_decay")
    state_names = ("row_var", "col_var", "variance")
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
        return torch.zeros(self.state_shape(key, group, name, param), dtype=param.dtype, device=param.device)

    matrices = Adafactor.matrices

    def variant_of(self, group: dict[str, Any], name: str | None, param: Tensor) -> float:
        """The bound of the estimate's root where the group has none."""
        if group["eps"][0] is not None or not param.is_floating_point():  # frozen weights of other dtypes
            return 0.0
        return torch.finfo(param.dtype).eps

    def hyper(self, group: dict[str, Any], variant: float) -> tuple[float | Tensor, ...]:
        eps1, eps2 = group["eps"]
        eps1 = variant if eps1 is None else eps1
        return group["lr"], group["beta2_decay"], eps1, eps2, group["d"], group["weight_decay"]

    class Scalars(NamedTuple):
        one_minus_beta2: float
        eps1: float
        limit: float
        rho: float
        eps2: float
        d: float
        decay: float

    @classmethod
    def prepare(cls, hyper: tuple[float, ...], step: int) -> Scalars:
        lr, beta2_decay, eps1, eps2, d, weight_decay = hyper
        return cls.Scalars(
            one_minus_beta2=math.pow(step, beta2_decay),
            eps1=eps1,
            limit=1.0 / eps1 if eps1 != 0 else math.inf,
            rho=min(lr, 1.0 / math.sqrt(step)),
            eps2=eps2,
            d=d,
            decay=1.0 - lr * weight_decay if weight_decay != 0 else 1.0,  # lr may be infinite
        )

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        row_var: Tensor | None,
        col_var: Tensor | None,
        variance: Tensor | None,
        s: Scalars,
    ) -> tuple[Tensor | None, ...]:
        grad_sq = grad * grad
        if variance is None:
            row_var = torch.lerp(row_var, grad_sq.mean(dim=-1, keepdim=True), s.one_minus_beta2)
            col_var = torch.lerp(col_var, grad_sq.mean(dim=-2, keepdim=True), s.one_minus_beta2)
            row_factor = square_root(row_var.mean(dim=-2, keepdim=True).clamp(min=s.eps1)) / square_root(row_var)
            factor = row_factor / square_root(col_var)
        else:
            variance = torch.lerp(variance, grad_sq, s.one_minus_beta2)
            factor = 1.0 / square_root(variance)
        direction = factor.clamp(max=s.limit) * grad
        rms, excess = root_mean_square(param), root_mean_square(direction) / s.d
        step_size = max(s.eps2, rms) * s.rho
        param = param * s.decay - (step_size / excess if excess > 1.0 else step_size) * direction
        return param, row_var, col_var, variance
