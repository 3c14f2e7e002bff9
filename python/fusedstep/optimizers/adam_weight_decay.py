"""Adam with decoupled weight decay for parameters chosen by name: the recipe of BERT."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..gradient_options import GradientOptions
from ..optimizer import FusedOptimizer
from ..options import Options
from .adam import Adam


class AdamWeightDecay(Adam):
    r"""Adam in its epsilon-hat form, with weight decay for parameters chosen by name, and gradient clipping.

    With gradient :math:`g` (after clipping), learning rate :math:`\gamma`, weight decay rate :math:`\lambda`, step
    :math:`t`:

    .. math::
        \theta &\leftarrow \theta - \gamma \lambda \theta \quad (\text{where it decays}) \\
        m &\leftarrow m + (1 - \beta_1)(g - m) \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m}{\sqrt v + \hat\epsilon}

    Args:
        params: parameters, ``(name, parameter)`` pairs (``model.named_parameters()``), or dicts that define groups.
        learning_rate: 0 or larger; a number or a one-element tensor. The group's option is ``lr``.
        beta_1, beta_2: decay rates of the two running averages, each in [0, 1).
        epsilon: 0 or larger; added to the root of the uncorrected second moment.
        amsgrad: divide by the largest second moment so far.
        weight_decay_rate: 0 or larger.
        include_in_weight_decay: regular expressions; a parameter decays if one is found in its name.
        exclude_from_weight_decay: regular expressions; a parameter with one of them in its name does not decay, unless
            it is included. Any other parameter decays.
        name: accepted for compatibility; it names nothing here.
        clipvalue: limit of the size of each element of a gradient, larger than 0.
        clipnorm: limit of the 2-norm of each gradient by itself, larger than 0.
        global_clipnorm: limit of the 2-norm of all gradients together, larger than 0; not together with ``clipnorm``.
        decay: 0 or larger; the learning rate of step t is ``learning_rate / (1 + decay * (t - 1))``.
        lr: another name of ``learning_rate``, which it overrides.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility; it chooses nothing here.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter: ``step`` (one fp32 number), ``exp_avg``, ``exp_avg_sq`` and with amsgrad
    ``max_exp_avg_sq``, in the parameter's dtype and layout: 8 (12) bytes per fp32 parameter. ``clipvalue`` and
    ``clipnorm`` make copies of the gradients for the time of a step; ``.grad`` is not written.

    Raises:
        ValueError, TypeError: an argument is out of range, or there are patterns but no names.
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.AdamWeightDecay(
        ...     model.named_parameters(), 1e-4, weight_decay_rate=0.01, exclude_from_weight_decay=["norm", "bias"]
        ... )

    Follows the TensorFlow class of that name in Hugging Face transformers 4 and the Keras Adam below it. Papers: arXiv
    1412.6980 (epsilon-hat: section 2), 1711.05101.
    """

    variant_options = ("include_in_weight_decay", "exclude_from_weight_decay", "param_names")

    def __init__(
        self,
        params: ParamsT,
        learning_rate: float | Tensor = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        weight_decay_rate: float = 0.0,
        include_in_weight_decay: Sequence[str] | None = None,
        exclude_from_weight_decay: Sequence[str] | None = None,
        name: str = "AdamWeightDecay",
        *,
        clipvalue: float | None = None,
        clipnorm: float | None = None,
        global_clipnorm: float | None = None,
        decay: float = 0.0,
        lr: float | Tensor | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": learning_rate if lr is None else lr,
            "betas": (beta_1, beta_2),
            "eps": epsilon,
            "amsgrad": amsgrad,
            "weight_decay_rate": weight_decay_rate,
            "include_in_weight_decay": _patterns("include_in_weight_decay", include_in_weight_decay),
            "exclude_from_weight_decay": _patterns("exclude_from_weight_decay", exclude_from_weight_decay),
            "clipvalue": clipvalue,
            "clipnorm": clipnorm,
            "global_clipnorm": global_clipnorm,
            "decay": decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        _refuse_two_norms(defaults)
        FusedOptimizer.__init__(self, params, defaults, **options)
        self._clip_globally(global_clipnorm)

    def _clip_globally(self, limit: float | None) -> None:
        """Limit the norm of all gradients, without torch's 1e-6, and with TensorFlow's answer to an infinite norm."""
        self.stepper.gradients.options = dataclasses.replace(
            self.stepper.gradients.options,
            max_grad_norm=self.stepper.options["max_grad_norm"] if limit is None else limit,
            epsilon=GradientOptions.epsilon if limit is None else 0.0,
            nan_if_nonfinite=limit is not None,
        )
        self.defaults["global_clipnorm"] = limit

    def check_call(self, max_grad_norm: float | None) -> None:
        """Raise if a step cannot be made now, or not so; see to what the user may have put into the groups since."""
        super().check_call(max_grad_norm)
        if self.param_groups and (limit := self.param_groups[0]["global_clipnorm"]) != self.defaults["global_clipnorm"]:
            self._clip_globally(limit)
        for group in self.param_groups:
            self._check_clipping(group)

    def _check_clipping(self, group: dict[str, Any]) -> None:
        """Raise ValueError if what a group clips by contradicts the options of the optimizer."""
        limit = group["global_clipnorm"]
        if limit != self.defaults["global_clipnorm"]:
            raise ValueError(
                f"global_clipnorm={limit} of a group: it is the norm of all groups together; give it to the "
                "constructor, or set it in every group"
            )
        _refuse_two_norms(group)
        own = {key: group[key] for key in _CLIPS if group[key] is not None}
        for key, value in own.items():
            checks.check_positive(f"{key} value", value)
            checks.as_number(f"{key} value", value)
        given = self.stepper.options["max_grad_norm"]
        if own and given is not None:
            raise ValueError(
                f"max_grad_norm={given} and {', '.join(f'{k}={v}' for k, v in own.items())} contradict each other: "
                "clip in one way"
            )
        if self.stepper.gradients.options.write_grads and own.keys() - {"global_clipnorm"}:
            raise ValueError("write_grads=True cannot go with clipvalue or clipnorm, which work on copies of gradients")

    def check_group(self, group: dict[str, Any]) -> None:
        checks.check_lr(group["lr"])
        checks.check_non_negative("epsilon value", group["eps"])
        checks.check_betas(group["betas"])
        checks.check_non_negative("weight_decay_rate value", group["weight_decay_rate"])
        checks.check_non_negative("decay value", group["decay"])
        for option in _CLIPS:
            if group[option] is not None:
                checks.check_positive(f"{option} value", group[option])
        for option in ("include_in_weight_decay", "exclude_from_weight_decay"):
            _patterns(option, group[option])
        for flag in ("amsgrad", "maximize"):
            checks.check_flag(flag, group[flag])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does.

        Raises:
            ValueError, TypeError: an option is out of range, or there are patterns but no names.
            RuntimeError: the backend that was asked for cannot run, with its reasons.
        """
        if isinstance(param_group, dict):
            self._check_clipping({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def variant_of(self, group: dict[str, Any], name: str | None, param: Tensor) -> bool:
        """Whether a parameter decays."""
        if name is None:
            patterns = group["include_in_weight_decay"] or group["exclude_from_weight_decay"]
            if patterns and "param_names" not in group:
                raise ValueError(
                    f"Invalid weight decay patterns: {list(patterns)} need the parameters' names; "
                    "pass model.named_parameters() instead of model.parameters()"
                )
            return True
        if any(re.search(pattern, name) for pattern in group["include_in_weight_decay"] or ()):
            return True
        return not any(re.search(pattern, name) for pattern in group["exclude_from_weight_decay"] or ())

    def hyper(self, group: dict[str, Any], variant: bool) -> tuple[float | Tensor, ...]:
        rate = group["weight_decay_rate"] if variant else 0.0
        return group["lr"], *group["betas"], group["eps"], rate, True, True, group["decay"]

    def clips(self) -> bool:
        return any(group[limit] is not None for group in self.param_groups for limit in ("clipvalue", "clipnorm"))

    def clips_by_norm(self, group: dict[str, Any]) -> bool:
        return group["clipnorm"] is not None

    def clip(
        self, grads: list[tuple[dict[str, Any], Tensor]], norms: Callable[[list[Tensor | None]], list[Tensor | None]]
    ) -> list[Tensor]:
        limits = [group["clipnorm"] for group, _ in grads]
        # The norm may be infinite too.
        limits = [limit if isinstance(limit, Tensor) or limit != math.inf else None for limit in limits]
        clipped = [_clamped(grad, group["clipvalue"]) for group, grad in grads]
        if any(map(self.clips_by_norm, self.param_groups)):
            by_norm = [grad if limit is not None else None for grad, limit in zip(clipped, limits, strict=True)]
            for i, norm in enumerate(norms(by_norm)):
                if norm is not None:
                    clipped[i] = clipped[i] * (limits[i] / norm).clamp(max=1)
        return clipped


def _clamped(grad: Tensor, limit: float | None) -> Tensor:
    return grad if limit is None else grad.clamp(-limit, limit)


def _refuse_two_norms(group: dict[str, Any]) -> None:
    """Raise ValueError if a group's options limit two norms."""
    one, all_ = group["clipnorm"], group["global_clipnorm"]
    if one is not None and all_ is not None:
        raise ValueError(
            "Cannot accept both `clipnorm` and `global_clipnorm`, "
            f"received `clipnorm` = {one}, `global_clipnorm` = {all_}"
        )


_CLIPS = ("clipvalue", "clipnorm", "global_clipnorm")


def _patterns(option: str, patterns: Sequence[str] | None) -> list[str] | None:
    """The patterns as a list.

    Raises:
        TypeError, ValueError: they are not a sequence of regular expressions.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"Invalid {option}: {patterns!r} (it must be a list of regular expressions)")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"Invalid {option}: {pattern!r} is not a regular expression ({error})") from None
    return list(patterns)
