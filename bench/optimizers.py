"""What is measured: optimizers, with their options and what their steps must read and write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import fusedstep

from ..cases import PRECISION
from ..codecs import BLOCK, QUANTIZERS
from . import chain


def torch_class(class_name: str) -> type[torch.optim.Optimizer] | None:
    """The class of torch.optim that fusedstep's class of this name replaces."""
    # The two forms of Adafactor have one name in transformers and in torch.
    name = {"Adafactor": "", "TorchAdafactor": "Adafactor"}.get(class_name, class_name)
    return getattr(torch.optim, name, None)


@dataclass(frozen=True)
class Optimizer:
    """An optimizer with the options it is measured with.

    ``states`` is the number of states of the parameter's shape and ``grad_reads`` how often the gradient must be read;
    both count the bytes that a step has to move. ``elementwise``: no element's update depends on another element.
    ``chain``: what is done to the gradients before the step, a kind of `chain.Chain`. ``precision``: the options of
    ours beyond ``options``, a name of `cases.PRECISION`.
    ``every_case``: by default it is measured on every case, not only on those with `models.Case.every_optimizer`.
    ``others_tolerance``: what the implementations that are not ours are allowed, where it is more than ours.
    """

    name: str
    class_name: str  # in fusedstep and in torch.optim
    options: dict[str, Any]
    states: int
    grad_reads: int = 1
    elementwise: bool = True
    every_case: bool = False
    others_tolerance: float | None = None
    chain: str = ""
    precision: str = ""

    @property
    def torch_class(self) -> type[torch.optim.Optimizer] | None:
        return torch_class(self.class_name)

    @property
    def our_class(self) -> type[torch.optim.Optimizer] | None:
        return getattr(fusedstep, self.class_name, None)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the precision options mean something for parameters of ``dtype``."""
        options = PRECISION.get(self.precision, {})
        if set(options) <= {"state_dtype"}:
            return options.get("state_dtype") != dtype
        return dtype != torch.float32

    @property
    def our_tolerance(self) -> float | None:
        """What ours is allowed, where the precision options make it more."""
        options = PRECISION.get(self.precision, {})
        if options.get("state_dtype") in QUANTIZERS:
            return QUANTIZED_STEPS[QUANTIZERS[options["state_dtype"]].bits]
        if options.get("rounding") == "stochastic":
            return 2 * BF16_STEPS
        return BF16_STEPS if options.get("state_dtype") == torch.bfloat16 else None

    def bytes_per_parameter(self, dtype: torch.dtype, precision: str = "") -> float:
        """What one step must at least read and write, with parameter and gradient of ``dtype``.

        So are states, unless ``precision``, a name of `cases.PRECISION`, says otherwise.
        """
        options = PRECISION.get(precision, {})
        aux = {True: 4, "split": 2}.get(options.get("master_weights"), 2 * options.get("kahan", False))
        state_dtype = options.get("state_dtype") or (torch.float32 if "master_weights" in options else dtype)
        quantizer = QUANTIZERS.get(state_dtype)
        state = state_dtype.itemsize if quantizer is None else quantizer.bits / 8 + 4 / BLOCK
        return dtype.itemsize * (2 + self.grad_reads) + 2 * aux + 2 * self.states * state


# The precision options by names that are one word on a command line.
PRECISIONS = {name.replace(", ", "-").replace(" ", "-"): name for name in PRECISION}

# Learning rate and decay are large, so that an update without its decay, or by a wrong factor, is far from the right
# one even in bfloat16. They cost no time: the same arithmetic runs for any value.
_ADAM = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.5}
_SGD = {"lr": 0.1, "weight_decay": 0.5}

BF16_STEPS = 3 * 2.0**-7  # the error of three steps that round to bf16 once each
QUANTIZED_STEPS = {8: 0.1, 4: 0.4}  # and of those that keep states in so many bits

# A norm that is summed up in fp32, as torch does on the CPU, is off by this much for the 38 M elements of an embedding.
FP32_SUMS = 5e-3

OPTIMIZERS: tuple[Optimizer, ...] = (
    Optimizer("AdamW", "AdamW", _ADAM, states=2, every_case=True),
    Optimizer("clip+AdamW", "AdamW", _ADAM, states=2, grad_reads=2, every_case=True, chain=chain.CLIP),
    Optimizer("unscale+clip+AdamW", "AdamW", _ADAM, states=2, grad_reads=2, every_case=True, chain=chain.WHOLE),
    Optimizer("AdamW-amsgrad", "AdamW", {**_ADAM, "amsgrad": True}, states=3),
    Optimizer("Adam", "Adam", _ADAM, states=2),
    Optimizer("SGD", "SGD", _SGD, states=0),
    Optimizer("SGD-momentum", "SGD", {**_SGD, "momentum": 0.9}, states=1),
    Optimizer("RMSprop", "RMSprop", {"lr": 0.1, "alpha": 0.9, "weight_decay": 0.5}, states=1),
    Optimizer(
        "RMSprop-centered",
        "RMSprop",
        {"lr": 0.1, "alpha": 0.9, "momentum": 0.9, "centered": True} | {"weight_decay": 0.5},
        states=3,
    ),
    Optimizer("Adagrad", "Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.5}, states=1),
    Optimizer("Lion", "Lion", {"lr": 0.1, "betas": (0.9, 0.8), "weight_decay": 0.5}, states=1),
    Optimizer("AdaBelief", "AdaBelief", {**_ADAM, "rectify": False}, states=2),
    Optimizer("Amos", "Amos", {"lr": 0.1, "beta": 0.9, "extra_l2": 0.1}, states=2),
    Optimizer(
        *("Amos-rows", "Amos", {"lr": 0.1, "beta": 0.9, "extra_l2": 0.1, "reduce": (-1,)}),
        **{"states": 0, "grad_reads": 2, "elementwise": False},
    ),
    Optimizer(
        *("Adafactor", "Adafactor", {"lr": 0.1, "relative_step": False, "weight_decay": 0.5}),
        **{"states": 0, "grad_reads": 3, "elementwise": False, "others_tolerance": FP32_SUMS},
    ),
    Optimizer(
        *("TorchAdafactor", "TorchAdafactor", {"lr": 0.1, "eps": (1e-6, 1e-3), "weight_decay": 0.5}),
        **{"states": 0, "grad_reads": 3, "elementwise": False, "others_tolerance": FP32_SUMS},
    ),
    Optimizer("AdamWeightDecay", "AdamWeightDecay", {"learning_rate": 0.1, "weight_decay_rate": 0.5}, states=2),
    *(Optimizer(f"AdamW-{word}", "AdamW", _ADAM, states=2, precision=name) for word, name in PRECISIONS.items()),
)
