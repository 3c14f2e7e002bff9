"""Adafactor in the form of Hugging Face's transformers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..counts import count_of
from ..numerics import square_root
from ..optimizer import FusedOptimizer
from ..options import Options


def root_mean_square(tensor: Tensor) -> float:
    """The root of the mean of squares, summed in float64; not a number for an empty tensor."""
    return math.sqrt(tensor.double().square().sum().item() / tensor.numel()) if tensor.numel() else math.nan


class Adafactor(FusedOptimizer):
    r"""Adafactor: the second moments of a matrix kept as row and column averages; one kernel call per group.

    With gradient :math:`g`, step :math:`t`, :math:`\hat\beta = 1 - t^{\tau}` (:math:`\tau` is ``decay_rate``), and the
    root mean square :math:`\mathrm{RMS}`:

    .. math::
        R &\leftarrow \hat\beta R + (1 - \hat\beta)\,\mathrm{mean}_{columns}(g^2 + \epsilon_1) \\
        C &\leftarrow \hat\beta C + (1 - \hat\beta)\,\mathrm{mean}_{rows}(g^2 + \epsilon_1) \\
        u &= g \,\Big/ \sqrt{R\,C / \mathrm{mean}(R)} \qquad
             u \leftarrow u \,/ \max(1, \mathrm{RMS}(u) / d) \\
        \gamma &= \max(\epsilon_2, \mathrm{RMS}(\theta))\,\rho_t \\
        \theta &\leftarrow (1 - \gamma\lambda)\,\theta - \gamma u

    where a matrix is the last two dimensions of a parameter, :math:`d` is ``clip_threshold``, :math:`\lambda` is
    ``weight_decay`` and :math:`\rho_t` is :math:`\min(10^{-2}, 1/\sqrt t)`, with ``warmup_init``
    :math:`\min(10^{-6} t, 1/\sqrt t)`, without ``relative_step`` ``lr``. Parameters of fewer than two dimensions keep
    the average of :math:`g^2 + \epsilon_1` for each element. With ``beta1`` the running average of :math:`\gamma u`
    takes its place in the last line.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: learning rate, 0 or larger; None with ``relative_step``. A number or a one-element tensor.
        eps: two numbers, 0 or larger: added to the squared gradient; least scale of a parameter.
        clip_threshold: the RMS of an update is brought down to this, larger than 0; typically 1.
        decay_rate: exponent of the averages' memory, 0 or smaller; typically -0.8.
        beta1: decay rate of the average of updates, in [0, 1]; None keeps none.
        weight_decay: 0 or larger.
        scale_parameter: multiply the learning rate by the parameter's RMS; otherwise :math:`\gamma = \rho_t`.
        relative_step: take the learning rate from the step number instead of ``lr``.
        warmup_init: let a relative step begin small.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility; it chooses nothing here.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter: ``step``; ``exp_avg_sq_row`` and ``exp_avg_sq_col`` (a number for each row and column), for
    fewer than two dimensions ``exp_avg_sq`` (one for each element); ``RMS`` of the parameter (one number); with
    ``beta1`` ``exp_avg`` (one for each element). All in fp32, for fp64 parameters in fp64: about 4 bytes for each row
    and column, 4 (8) bytes for each element of a vector.

    Raises:
        ValueError, TypeError: an argument is out of range, or ``lr`` and ``relative_step`` contradict each other.
        RuntimeError: ``backend`` cannot run for these parameters, a parameter is a DTensor, or (from ``step``) it is
            complex or a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)

    Follows ``transformers.Adafactor``, whose state_dict it shares and whose ``AdafactorSchedule`` it works with.
    Differs: sums and the scalars of a step are in higher precision. Paper: arXiv 1804.04235.
    """

    rule = "adafactor"
    hyper_names = (
        *("lr", "eps1", "eps2", "clip_threshold", "decay_rate", "beta1", "weight_decay"),
        *("scale_parameter", "relative_step", "warmup_init"),
    )
    state_names = ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "RMS")
    step_form = "int"
    reduces = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        if lr is not None and relative_step:
            raise ValueError("Cannot combine manual `lr` and `relative_step=True` options")
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        if group["warmup_init"] and not group["relative_step"]:
            raise ValueError("`warmup_init=True` requires `relative_step=True`")
        if group["lr"] is not None:
            checks.check_lr(group["lr"])
        checks.check_pair("eps", group["eps"])
        for index, eps in enumerate(group["eps"]):
            checks.check_non_negative(f"epsilon value at index {index}", eps)
        checks.check_positive("clip_threshold value", group["clip_threshold"])
        checks.check_non_positive("decay_rate value", group["decay_rate"])
        if group["beta1"] is not None:
            checks.check_fraction("beta1 value", group["beta1"])
        checks.check_non_negative("weight_decay value", group["weight_decay"])
        for flag in ("scale_parameter", "relative_step", "warmup_init", "maximize"):
            checks.check_flag(flag, group[flag])

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names[group["beta1"] is None :]

    def state_shape(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> torch.Size | None:
        if key == "RMS":
            return torch.Size()
        if key == "exp_avg":
            return param.shape
        if (param.dim() >= 2) == (key == "exp_avg_sq"):
            return None
        shape = param.shape
        return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:], "exp_avg_sq": shape}[key]

    def init_state(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> Tensor:
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        return torch.zeros(self.state_shape(key, group, name, param), dtype=dtype, device=param.device)

    def matrices(self, group: dict[str, Any], name: str | None, param: Tensor) -> tuple[int, int, int] | None:
        if param.dim() < 2:
            return None
        return math.prod(param.shape[:-2]), param.shape[-2], param.shape[-1]

    def hyper(self, group: dict[str, Any], variant: Any) -> tuple[float | Tensor, ...]:
        lr = group["lr"]
        if group["relative_step"]:
            lr = 0.0
        elif lr is None:
            raise ValueError("Invalid learning rate: None (it must be a number unless relative_step=True)")
        beta1 = 0.0 if group["beta1"] is None else group["beta1"]
        flags = (group[name] for name in ("scale_parameter", "relative_step", "warmup_init"))
        return lr, *group["eps"], group["clip_threshold"], group["decay_rate"], beta1, group["weight_decay"], *flags

    class Scalars(NamedTuple):
        beta2: float
        one_minus_beta2: float
        eps1: float
        beta1: float
        one_minus_beta1: float
        rel_step: float
        eps2: float
        clip_threshold: float
        weight_decay: float
        scale_parameter: bool

    @classmethod
    def prepare(cls, hyper: tuple[float, ...], step: int) -> Scalars:
        lr, eps1, eps2, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, relative, warmup = hyper
        beta2 = 1.0 - math.pow(step, decay_rate)
        min_step = 1e-6 * step if warmup else 1e-2
        return cls.Scalars(
            beta2=beta2,
            one_minus_beta2=1.0 - beta2,
            eps1=eps1,
            beta1=beta1,
            one_minus_beta1=1.0 - beta1,
            rel_step=min(min_step, 1.0 / math.sqrt(step)) if relative else lr,
            eps2=eps2,
            clip_threshold=clip_threshold,
            weight_decay=weight_decay,
            scale_parameter=scale_parameter != 0,
        )

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor | None,
        exp_avg_sq_row: Tensor | None,
        exp_avg_sq_col: Tensor | None,
        exp_avg_sq: Tensor | None,
        RMS: Tensor,
        s: Scalars,
    ) -> tuple[Tensor | None, ...]:
        grad_sq = grad * grad
        if exp_avg_sq is None:
            exp_avg_sq_row = s.beta2 * exp_avg_sq_row + s.one_minus_beta2 * (grad_sq.mean(dim=-1) + s.eps1)
            exp_avg_sq_col = s.beta2 * exp_avg_sq_col + s.one_minus_beta2 * (grad_sq.mean(dim=-2) + s.eps1)
            row_factor = square_root(exp_avg_sq_row.mean(dim=-1, keepdim=True)) / square_root(exp_avg_sq_row)
            direction = row_factor.unsqueeze(-1) / square_root(exp_avg_sq_col).unsqueeze(-2) * grad
        else:
            exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * (grad_sq + s.eps1)
            direction = grad / square_root(exp_avg_sq)
        rms = root_mean_square(param)
        lr = max(s.eps2, rms) * s.rel_step if s.scale_parameter else s.rel_step
        excess = root_mean_square(direction) / s.clip_threshold
        update = (lr if excess < 1.0 else lr / excess) * direction
        if exp_avg is not None:
            exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * update
            update = exp_avg
        decay = 1.0 - s.weight_decay * lr if s.weight_decay != 0 else 1.0  # lr may be infinite
        return param * decay - update, exp_avg, exp_avg_sq_row, exp_avg_sq_col, exp_avg_sq, torch.full_like(RMS, rms)

    @staticmethod
    def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
        """The learning rate of a parameter's last step, which ``transformers.AdafactorSchedule`` asks for."""
        step = count_of(param_state["step"])
        rel_step = param_group["lr"]
        if param_group["relative_step"]:
            min_step = 1e-6 * step if param_group["warmup_init"] else 1e-2
            rel_step = min(min_step, 1.0 / math.sqrt(step))
        if param_group["scale_parameter"]:
            rel_step = max(param_group["eps"][1], float(param_state["RMS"])) * rel_step
        return rel_step
