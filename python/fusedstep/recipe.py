"""Hugging Face's training recipe: AdamWeightDecay, warm-up and polynomial decay, in one call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from . import checks
from .optimizers.adam_weight_decay import AdamWeightDecay
from .schedules import PolyScheduler, Schedule, ScheduleLR, WarmUp
from .schedules.schedule import check_lr, check_power, check_steps

EXCLUDED = ("LayerNorm", "layer_norm", "bias")  # the original's, found anywhere in a name
NORMALISATION = re.compile(r"Norm([123]d|Gated)?$")  # classes: LayerNorm, LlamaRMSNorm, BatchNorm2d, MambaRMSNormGated


def create_optimizer(
    model_or_named_params: torch.nn.Module | Iterable[tuple[str, Tensor]],
    init_lr: float,
    num_train_steps: int,
    num_warmup_steps: int,
    min_lr_ratio: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
    adam_clipnorm: float | None = None,
    adam_global_clipnorm: float | None = None,
    weight_decay_rate: float = 0.0,
    power: float = 1.0,
    include_in_weight_decay: Sequence[str] | None = None,
    *,
    backend: str | None = None,
) -> tuple[AdamWeightDecay, ScheduleLR]:
    r"""An optimizer and its learning-rate schedule: linear warm-up, polynomial decay, decay of matrices only.

    With :math:`w` warm-up and :math:`T` train steps, update :math:`t` (from 0) has the learning rate
    :math:`\gamma t / w` if :math:`t < w`, then :math:`\gamma_T + (\gamma - \gamma_T)(1 - \frac{t - w}{T - w})^p`, and
    :math:`\gamma_T = \gamma \cdot` ``min_lr_ratio`` from :math:`T` on.

    Weights do not decay if their name contains "LayerNorm", "layer_norm" or "bias", or if they belong to a module of a
    class that ends in "Norm" (``BatchNorm2d``, ``RMSNormGated`` and the like too) or is derived from one, which needs
    the model: torch's names, such as ``norm1.weight``, do not tell.

    Args:
        model_or_named_params: a model, or ``(name, parameter)`` pairs.
        init_lr: :math:`\gamma`, the learning rate after the warm-up, 0 or larger.
        num_train_steps: :math:`T`, of the whole training, larger than ``num_warmup_steps``.
        num_warmup_steps: :math:`w`, 0 or more.
        min_lr_ratio: the last learning rate over ``init_lr``, 0 or larger.
        adam_beta1, adam_beta2: decay rates of the two running averages, each in [0, 1).
        adam_epsilon: 0 or larger; added to the root of the uncorrected second moment, as Keras does.
        adam_clipnorm: limit of the 2-norm of each gradient, larger than 0.
        adam_global_clipnorm: limit of the 2-norm of all gradients together, larger than 0.
        weight_decay_rate: 0 or larger.
        power: :math:`p`, larger than 0; 1 is linear decay.
        include_in_weight_decay: regular expressions; a parameter decays if one is found in its name, whatever excludes
            it.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        The optimizer, and the scheduler whose ``step()`` is to be called after each of the optimizer's.

    Raises:
        ValueError, TypeError: an argument is out of range, or parameters have no names.
        RuntimeError: ``backend`` cannot run for these parameters.

    Example:
        >>> optimizer, scheduler = fusedstep.create_optimizer(
        ...     model, init_lr=5e-5, num_train_steps=10_000, num_warmup_steps=500, weight_decay_rate=0.01
        ... )

    Follows the function of that name in Hugging Face transformers 4 (``optimization_tf.py``). Differs: normalisation
    layers are found by their class too; the schedule is a torch scheduler; without weight decay the optimizer is of the
    same class, whose arithmetic is then that of Keras' Adam.
    """
    check_lr("init_lr", init_lr)
    check_lr("min_lr_ratio", min_lr_ratio)
    check_power("power", power)
    steps, warmup = (
        check_steps("num_train_steps", num_train_steps, 1),
        check_steps("num_warmup_steps", num_warmup_steps),
    )
    if warmup >= steps:
        raise ValueError(f"Invalid num_warmup_steps: {warmup} (it must be smaller than num_train_steps, {steps})")
    checks.check_non_negative("weight_decay_rate value", weight_decay_rate)
    schedule: Schedule = PolyScheduler(
        max_update=steps - warmup, base_lr=init_lr, pwr=power, final_lr=init_lr * min_lr_ratio
    )
    if warmup:
        schedule = WarmUp(schedule, warmup_steps=warmup)

    excluded = list(EXCLUDED)
    if isinstance(model_or_named_params, torch.nn.Module):
        named = list(model_or_named_params.named_parameters())
        names = list(_normalisation_params(model_or_named_params))
        excluded += [f"^{re.escape(name)}$" for name in names if not any(part in name for part in EXCLUDED)]
    else:
        named = list(model_or_named_params)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in named):
        raise TypeError(
            "create_optimizer takes a model or (name, parameter) pairs, as of model.named_parameters(): "
            "names decide which parameters decay"
        )
    optimizer = AdamWeightDecay(
        named,
        learning_rate=init_lr,
        beta_1=adam_beta1,
        beta_2=adam_beta2,
        epsilon=adam_epsilon,
        weight_decay_rate=weight_decay_rate,
        include_in_weight_decay=include_in_weight_decay,
        exclude_from_weight_decay=excluded,
        clipnorm=adam_clipnorm,
        global_clipnorm=adam_global_clipnorm,
        backend=backend,
    )
    return optimizer, ScheduleLR(optimizer, schedule)


def _normalisation_params(model: torch.nn.Module) -> Iterator[str]:
    """Names of the parameters that normalisation layers have themselves."""
    for path, module in model.named_modules():
        if any(NORMALISATION.search(cls.__name__) for cls in type(module).__mro__):
            for name, _ in module.named_parameters(path, recurse=False):
                yield name
