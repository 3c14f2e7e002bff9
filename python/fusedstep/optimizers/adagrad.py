"""Adagrad."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import checks
from ..numerics import divide, real, square_root
from ..optimizer import FusedOptimizer
from ..options import Options


class Hyper(NamedTuple):
    lr: float
    lr_decay: float
    weight_decay: float
    eps: float


_values_of = itemgetter(*Hyper._fields)


class Scalars(NamedTuple):
    step_size: float
    weight_decay: float
    eps: float


class Adagrad(FusedOptimizer):
    r"""Adagrad, with dense or sparse gradients, in one kernel call per group.

    With gradient :math:`g`, learning rate :math:`\gamma`, its decay :math:`\eta`, weight decay :math:`\lambda`, step
    :math:`t`:

    .. math::
        g &\leftarrow g + \lambda \theta \\
        s &\leftarrow s + g^2 \\
        \theta &\leftarrow \theta - \frac{\gamma}{1 + (t - 1) \eta} \frac{g}{\sqrt{s} + \epsilon}

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: learning rate, 0 or larger; a number or a one-element tensor (read on its device in every step).
        lr_decay: 0 or larger.
        weight_decay: 0 or larger; must be 0 for sparse gradients.
        initial_accumulator_value: what the sum of squares begins with, 0 or larger.
        eps: added to the root, 0 or larger.
        maximize: ascend instead of descend.
        foreach, fused: accepted for compatibility; they choose nothing here.
        differentiable: must be False.
        **options: ``backend`` and all else that :class:`fusedstep.Options` names.

    State of each parameter, made when the parameter joins: ``step`` (one fp32 number) and ``sum`` in the parameter's
    dtype and layout: 4 bytes per fp32 parameter.

    Sparse gradients (of ``torch.nn.Embedding(..., sparse=True)``) change the rows that they name, and nothing else.

    Raises:
        ValueError, TypeError: an argument is out of range.
        RuntimeError: ``backend`` cannot run for these parameters, or (from ``step``) a gradient cannot be used.

    Example:
        >>> optimizer = fusedstep.Adagrad(model.parameters(), lr=0.01)

    Follows ``torch.optim.Adagrad``, whose state_dict it shares. Paper: Duchi, Hazan and Singer, JMLR 12 (2011).
    """

    rule = "adagrad"
    Hyper, Scalars = Hyper, Scalars
    state_names = ("sum",)
    non_negative = ("sum",)
    state_at_construction = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.check_lr(group["lr"])
        for name in ("lr_decay", "weight_decay", "initial_accumulator_value"):
            checks.check_non_negative(f"{name} value", group[name])
        checks.check_non_negative("epsilon value", group["eps"])
        checks.check_flag("maximize", group["maximize"])

    def share_memory(self) -> None:
        """Move the sums into shared memory, as torch's class does."""
        for state in self.state.values():
            state["sum"].share_memory_()

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names

    @classmethod
    def check_sparse(cls, group: dict[str, Any], what: str) -> None:
        checks.check_no_decay(cls.__name__, group["weight_decay"], what)

    def init_state(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> Tensor:
        value = group["initial_accumulator_value"]
        value = complex(value, value) if param.is_complex() else value
        return torch.full_like(param, value, memory_format=torch.preserve_format, requires_grad=False)

    def hyper(self, group: dict[str, Any], variant: None) -> tuple[float | Tensor, ...]:
        return _values_of(group)

    @staticmethod
    def prepare(h, step):
        return Scalars(divide(h.lr, 1.0 + real(step - 1) * h.lr_decay), h.weight_decay, h.eps)

    @staticmethod
    def update(param, grad, sum, s, has):
        if s.weight_decay != 0:
            grad = grad + s.weight_decay * param
        sum = sum + grad * grad
        return param - divide(s.step_size * grad, square_root(sum) + s.eps), sum
