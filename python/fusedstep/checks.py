"""Argument errors, in torch's words where torch has them: what was given, what is accepted, what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import counts, exchange, layout, shards
from .options import Options

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

ARITHMETIC_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _number(label: str, value: Any, allowed: Callable[[Any], bool], rule: str) -> None:
    """Raise unless ``value`` is a real number (or a one-element tensor) for which ``allowed`` holds."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {label} must be 1-element, got shape {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"Invalid {label}: a complex tensor; it must be {rule}")
    elif not isinstance(value, Real):
        raise TypeError(f"Invalid {label}: {value!r} is a {type(value).__name__}; it must be a number, {rule}")
    if not allowed(value):
        raise ValueError(f"Invalid {label}: {value} (it must be {rule})")


def as_float(label: str, value: Any) -> float:
    """``value`` as the kernels take numbers; raises ValueError if it is larger than any of them, or a meta tensor."""
    if isinstance(value, Tensor) and value.is_meta:
        raise ValueError(f"Invalid {label}: a meta tensor, which has no value; it must be a number")
    try:
        return float(value)
    except OverflowError:
        kind = type(value).__name__
        raise ValueError(f"Invalid {label}: {kind} too large to convert to a floating-point number") from None


def as_number(label: str, value: Any) -> float | Tensor:
    """A hyperparameter as kernels take it: a float, or a one-element tensor of a device that is not waited for.

    Raises:
        ValueError, TypeError: it is no number, or one that a float cannot hold.
    """
    if type(value) is bool or type(value) is int:  # as most options are that are no floats: told apart quickly
        return as_float(label, value)
    if not isinstance(value, Tensor):
        if not isinstance(value, Real):
            raise TypeError(f"Invalid {label}: {value!r} is a {type(value).__name__}; it must be a number")
        return as_float(label, value)
    if value.numel() != 1:
        raise ValueError(f"Tensor {label} must be 1-element, got shape {tuple(value.shape)}")
    if value.is_complex():
        raise TypeError(f"Invalid {label}: a complex tensor; it must be a real number")
    value = value.detach()
    return as_float(label, value) if value.device.type in ("cpu", "meta") else value


def _numbers_of(group: dict[str, Any]) -> Iterator[tuple[str, float | Tensor]]:
    """Each number or flag among the options of a group, with the option's name."""
    for name, option in group.items():
        if name not in ("params", "param_names"):
            values = option.values() if isinstance(option, Mapping) else option
            several = isinstance(values, Iterable) and not isinstance(values, (str, Tensor))
            for value in values if several else (values,):
                if isinstance(value, (Real, Tensor)):
                    yield name, value


def check_values(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for an option of a group whose value no float can hold, or that has none."""
    for name, value in _numbers_of(group):
        if not isinstance(value, Tensor) or value.is_meta:
            as_float(f"{name} of {where}", value)


def check_options(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError or TypeError for an option of a group that cannot be the number or flag that it should be."""
    for index, group in enumerate(groups):
        for name, value in _numbers_of(group):
            as_number(f"{name} of parameter group {index}", value)


def check_lr(lr: float | Tensor) -> None:
    """Raise unless ``lr`` is a number >= 0 or a one-element tensor of such a number."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    _number("learning rate", lr, lambda x: 0.0 <= x, "0 or larger")


def check_non_negative(label: str, value: float) -> None:
    """Raise unless ``value`` is a number >= 0; ``label`` is torch's, as in "epsilon value"."""
    _number(label, value, lambda x: 0.0 <= x, "0 or larger")


def check_positive(label: str, value: float) -> None:
    """Raise unless ``value`` is a number > 0."""
    _number(label, value, lambda x: 0.0 < x, "larger than 0")


def check_non_positive(label: str, value: float) -> None:
    """Raise unless ``value`` is a number <= 0."""
    _number(label, value, lambda x: 0.0 >= x, "0 or smaller")


def check_pair(name: str, values: Any) -> None:
    """Raise unless ``values`` are two values in a list, a tuple or the like."""
    if isinstance(values, str) or not hasattr(values, "__getitem__"):
        raise TypeError(f"Invalid {name}: {values!r} is a {type(values).__name__}; it must be two numbers")
    if len(values) != 2:
        raise ValueError(f"Invalid {name}: {values!r} (it must be two numbers)")


def check_finite(label: str, value: float) -> None:
    """Raise unless ``value`` is a finite number."""
    _number(label, value, lambda x: float("-inf") < x < float("inf"), "finite")


def check_fraction(label: str, value: float, one_allowed: bool = True) -> None:
    """Raise unless ``value`` is a number in [0, 1], or in [0, 1) if one is not allowed."""
    _number(
        label,
        value,
        lambda x: 0.0 <= x < 1.0 or (one_allowed and x == 1.0),
        "in [0, 1]" if one_allowed else "in [0, 1)",
    )


def check_betas(betas: tuple[float | Tensor, float | Tensor], one_allowed: bool = False) -> None:
    """Raise unless ``betas`` are two numbers in [0, 1), or [0, 1] if one is allowed, both floats or both tensors."""
    interval = "[0, 1]" if one_allowed else "[0, 1)"
    if isinstance(betas, str) or not hasattr(betas, "__getitem__"):
        raise TypeError(f"Invalid betas: {betas!r} is a {type(betas).__name__}; they must be two numbers in {interval}")
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} (they must be two numbers in {interval})")
    for index, beta in enumerate(betas):
        check_fraction(f"beta parameter at index {index}", beta, one_allowed)
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")


def check_flag(name: str, value: Any) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, (bool, int)):
        raise TypeError(f"Invalid {name} value: {value!r} (it must be True or False)")


def check_implementation(group: dict[str, Any]) -> None:
    """Raise for torch's implementation options that cannot be honoured or contradict each other."""
    if group.get("differentiable"):
        raise ValueError(
            "differentiable=True is not supported: the kernels work in place and leave no autograd graph; "
            "use the torch.optim class for differentiating through step()"
        )
    if group.get("fused") and group.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_keywords(optimizer: str, options: dict[str, Any]) -> None:
    """Raise TypeError for an option that no optimizer takes."""
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(
                f"{optimizer}.__init__() got an unexpected keyword argument {name!r} (beside those of its rule, every "
                f"optimizer takes {', '.join(Options.__annotations__)})"
            )


def check_placement(group: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise ValueError for an option in a group that holds for all groups, where it would have no effect.

    ``options``: all of the optimizer's own; `ZeroRedundancyOptimizer` puts those that it was given into each group.
    """
    for name in Options.__annotations__:
        if name in group and group[name] != options[name]:
            raise ValueError(
                f"a parameter group has {name}={group[name]!r}, an option that holds for all groups: "
                "give it to the constructor, or use two optimizers"
            )


def describe(index: int, name: str | None, tensor: Tensor) -> str:
    """Name a parameter for an error text, like ``parameter 3 'emb.weight', shape (10, 4), torch.float32, cpu``."""
    label = f"parameter {index}" if name is None else f"parameter {index} '{name}'"
    return f"{label}, shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def check_param(cls: type[FusedOptimizer], reduces: bool, param: Tensor, memory: Tensor, what: str) -> None:
    """Raise unless ``param``, which is stored in ``memory``, can be updated in place; ``what`` is its `describe`."""
    if reduces and layout.is_wrapper(param) and not shards.is_sharded(param):
        raise RuntimeError(
            f"{cls.__name__} does not support {type(param).__name__} parameters ({what}): its sums would be those of "
            "the local part alone"
        )
    if reduces and shards.is_sharded(param):
        for placement in param.placements:
            if not (placement.is_replicate() or hasattr(placement, "dim")):
                raise RuntimeError(
                    f"{cls.__name__} takes sums over tensors that are sharded or replicated, not over one with "
                    f"placement {placement} ({what}): call .redistribute(placements=...) on it"
                )
    if param.layout != torch.strided:
        raise ValueError(f"{what}: a {param.layout} parameter cannot be updated; pass a dense one")
    if layout.overlaps_itself(memory):
        raise ValueError(f"{what}: several elements share one memory location; pass a .clone() of it")


def check_real(cls: type[FusedOptimizer], reduces: bool, param: Tensor, what: str) -> None:
    """Raise RuntimeError if ``param`` is complex and its rule has sums; the parents do so in ``step`` alone."""
    if reduces and param.is_complex():
        raise RuntimeError(f"{cls.__name__} does not support complex parameters ({what})")


def check_state(
    optimizer: str,
    name: str,
    state: Tensor,
    param: Tensor,
    shape: torch.Size,
    dtypes: tuple[torch.dtype, ...] | None,
    what: str,
) -> None:
    """Raise unless ``state``, found or loaded under ``name``, can go with ``param``; None allows every float dtype."""
    if state.shape != shape:
        expected = "that of" if shape == param.shape else f"{tuple(shape)} for"
        raise RuntimeError(f"{optimizer}: state '{name}' has shape {tuple(state.shape)}, it must be {expected} {what}")
    if state.layout != torch.strided:
        raise RuntimeError(f"{optimizer}: state '{name}' has layout {state.layout}, it must be dense for {what}")
    if state.is_complex() != param.is_complex():
        raise RuntimeError(f"{optimizer}: state '{name}' has dtype {state.dtype}, which cannot go with {what}")
    if state.dtype not in dtypes if dtypes else not (state.is_floating_point() or state.is_complex()):
        raise RuntimeError(f"{optimizer}: state '{name}' has dtype {state.dtype}, which cannot go with {what}")


def check_memory(optimizer: str, subject: str, tensor: Tensor) -> None:
    """Raise ValueError unless ``tensor``, which ``subject`` describes, lies in memory of its own."""
    memory = layout.local(tensor)
    if memory.layout == torch.strided and not memory._is_zerotensor() and not layout.has_memory(memory):
        raise ValueError(
            f"{optimizer}: {subject} has no memory of its own: it is a {type(tensor).__name__} that wraps other "
            "tensors, a meta tensor or one whose storage was freed; use a plain tensor"
        )


def check_loaded(label: str, value: Any, param: Tensor, shape: torch.Size, codes: Sequence[torch.dtype] = ()) -> None:
    """Raise ValueError unless a loaded ``value`` can be a state of ``param`` that has the ``shape``.

    ``codes``: dtypes of numbers that stand for others.
    """
    if isinstance(value, Tensor):
        if value.is_meta and not param.is_meta:
            raise ValueError(f"loaded state dict: {label} is on the meta device, which has no numbers")
        if value.layout not in (torch.strided, torch.sparse_coo):
            raise ValueError(f"loaded state dict: {label} has layout {value.layout}, expected torch.strided")
        if value.shape != shape:
            raise ValueError(f"loaded state dict: {label} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        number = value.is_floating_point() or value.is_complex()
        if value.dtype not in codes and not (number and value.is_complex() == param.is_complex()):
            expected = "a complex" if param.is_complex() else "a floating"
            raise ValueError(f"loaded state dict: {label} has dtype {value.dtype}, expected {expected} one")
    elif not (value is None or isinstance(value, Real)):  # a parent class may have those where it has not started
        raise ValueError(f"loaded state dict: {label} is {_kind(value)}, expected a tensor of shape {tuple(shape)}")


def loaded_count(label: str, value: Any) -> int:
    """A loaded number of steps; raises ValueError if it is none."""
    if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())):
        raise ValueError(f"loaded state dict: {label} is {_kind(value)}, expected a number")
    try:
        count = float(value)
    except (RuntimeError, OverflowError) as error:  # on the meta device, in a layout without numbers, too large
        raise ValueError(f"loaded state dict: {label} cannot be read as a number: {error}") from error
    if not (count.is_integer() and 0 <= count <= counts.MOST):
        raise ValueError(
            f"loaded state dict: {label} is {count:g}, expected a number of steps: whole, 0 to {counts.MOST}"
        )
    return int(count)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{value!r} of type {type(value).__name__}"


def check_no_decay(optimizer: str, weight_decay: float, what: str) -> None:
    """Raise unless ``weight_decay`` is 0, as the sparse gradient of the parameter that ``what`` describes needs it."""
    if weight_decay != 0:
        raise RuntimeError(
            f"{optimizer}: weight_decay option is not compatible with sparse gradients "
            f"(weight_decay={weight_decay}, {what})"
        )


def check_grad(cls: type[FusedOptimizer], group: dict[str, Any], param: Tensor, grad: Tensor, what: str) -> None:
    """Raise unless ``grad`` can update ``param``; ``what`` is `describe`'s name for the parameter."""
    optimizer = cls.__name__
    if grad.layout == torch.sparse_coo:
        cls.check_sparse(group, what)
    elif grad.layout != torch.strided:
        raise RuntimeError(f"{optimizer} does not support gradients of layout {grad.layout} ({what})")
    if grad.shape != param.shape:
        raise RuntimeError(f"{optimizer}: the gradient has shape {tuple(grad.shape)}, it must be that of {what}")
    exchange.refuse_other_parts(optimizer, "the gradient", grad, param, what)
    if grad.device != param.device:
        raise RuntimeError(f"{optimizer}: the gradient is on {grad.device}, it must be on the device of {what}")
    if grad.is_complex() != param.is_complex() or not (grad.is_floating_point() or grad.is_complex()):
        raise RuntimeError(f"{optimizer}: the gradient has dtype {grad.dtype}, it must be floating like {what}")
    check_memory(optimizer, f"the gradient of {what},", grad)


def check_norm_is_known(cls: type[FusedOptimizer], param: Tensor, what: str) -> None:
    """Raise if ``param`` wraps others in a way that is none of torch's: its gradient may be a part of another one."""
    if layout.is_wrapper(param) and not shards.is_sharded(param):
        raise RuntimeError(
            f"{cls.__name__}: the norm of gradients of {type(param).__name__} parameters ({what}) would be that of the "
            "local part alone; call torch.nn.utils.clip_grad_norm_ before step()"
        )
