"""Adafactor in the form of Hugging Face's transformers."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..counts import count_of
from ..numerics import Double, divide, real, real_power, square_root, where
from ..optimizer import FusedOptimizer
from ..options import Options


class Hyper(NamedTuple):
    lr: float
    eps1: float
    eps2: float
    clip_threshold: float
    decay_rate: float
    beta1: float
    weight_decay: float
    scale_parameter: float
    relative_step: float
    warmup_init: float


class Scalars(NamedTuple):
    beta2: float
    one_minus_beta2: float
    eps1: float
    beta1: float
    one_minus_beta1: float
    rel_step: Double
    eps2: Double
    clip_threshold: Double
    weight_decay: Double
    scale_parameter: bool


class Finish(NamedTuple):
    step_size: float
    decay: float


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
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) it is
            complex or a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)

    Follows ``transformers.Adafactor``, whose state_dict it shares and whose ``AdafactorSchedule`` it works with.
    Differs: sums and the scalars of a step are in higher precision. Paper: arXiv 1804.04235.
    """

    rule = "adafactor"
    Hyper, Scalars, Finish = Hyper, Scalars, Finish
    spans: ClassVar = {
        "exp_avg": "element",
        "exp_avg_sq_row": "row",
        "exp_avg_sq_col": "column",
        "exp_avg_sq": "flat",
        "RMS": "tensor",
    }
    state_names = tuple(spans)
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
        return self.zeros(key, group, name, param, dtype)

    def matrix_dims(self, group: dict[str, Any], name: str | None, param: Tensor) -> tuple[int, int] | None:
        return None if param.dim() < 2 else (param.dim() - 2, param.dim() - 1)

    def hyper(self, group: dict[str, Any], variant: Any) -> tuple[float | Tensor, ...]:
        lr = group["lr"]
        if group["relative_step"]:
            lr = 0.0
        elif lr is None:
            raise ValueError("Invalid learning rate: None (it must be a number unless relative_step=True)")
        beta1 = 0.0 if group["beta1"] is None else group["beta1"]
        flags = (group[name] for name in ("scale_parameter", "relative_step", "warmup_init"))
        return lr, *group["eps"], group["clip_threshold"], group["decay_rate"], beta1, group["weight_decay"], *flags

    @staticmethod
    def prepare(h, step):
        t = real(step)
        beta2 = 1.0 - real_power(t, h.decay_rate)
        min_step = where(h.warmup_init != 0, 1e-6 * t, 1e-2)
        relative = divide(1.0, square_root(t))
        rel_step = where(h.relative_step != 0, where(relative < min_step, relative, min_step), h.lr)
        return Scalars(
            beta2=beta2,
            one_minus_beta2=1.0 - beta2,
            eps1=h.eps1,
            beta1=h.beta1,
            one_minus_beta1=1.0 - h.beta1,
            rel_step=rel_step,
            eps2=h.eps2,
            clip_threshold=h.clip_threshold,
            weight_decay=h.weight_decay,
            scale_parameter=h.scale_parameter != 0,
        )

    @staticmethod
    def square(grad, s):
        return grad * grad

    @staticmethod
    def line(mean, state, s):
        state = s.beta2 * state + s.one_minus_beta2 * (mean + s.eps1)
        return state, divide(1.0, square_root(state))

    @staticmethod
    def matrix(mean, s):
        return square_root(mean)

    @staticmethod
    def direction(grad, factor, s):
        return factor * grad

    @staticmethod
    def finish(s, param_rms, update_rms):
        lr = where(s.scale_parameter, where(param_rms > s.eps2, param_rms, s.eps2), 1.0) * s.rel_step
        excess = divide(update_rms, s.clip_threshold)
        step_size = divide(lr, where(excess < 1.0, 1.0, excess))  # NaN stays
        decay = where(s.weight_decay != 0, 1.0 - s.weight_decay * lr, 1.0)  # lr may be infinite
        return Finish(step_size, decay)

    @staticmethod
    def update(param, grad, factor, exp_avg, s, f, has):
        update = f.step_size * (factor * grad)
        if has.exp_avg:
            exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * update
            update = exp_avg
        return param * f.decay - update, exp_avg

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
