"""One row for each optimizer and set of options: what the tests, `fusedstep verify` and the benchmark go through.

Options are those that the class of the same name in torch.optim takes too, and none is left at a value that would hide
an error: weight decay is not zero, betas are not the defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """An optimizer class by its name in fusedstep, and options for it."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [key if value is True else f"{key}={value}" for key, value in self.options.items() if key != "lr"]
        return "-".join([self.optimizer, *parts]).replace(" ", "")


CASES: tuple[Case, ...] = (
    Case("SGD", {"lr": 0.1}),
    Case("SGD", {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    Case("SGD", {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05, "nesterov": True}),
    Case("Adam", {"lr": 0.01}),
    Case("Adam", {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.05}),
    Case("Adam", {"lr": 0.01, "weight_decay": 0.05, "amsgrad": True, "maximize": True}),
    Case("Adam", {"lr": 0.01, "weight_decay": 0.05, "decoupled_weight_decay": True}),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    Case("AdamW", {"lr": 0.01, "betas": (0.0, 0.95), "eps": 1e-6, "weight_decay": 0.1, "maximize": True}),
    Case("AdamW", {"lr": 0.01, "betas": (0.85, 0.9), "weight_decay": 0.1, "amsgrad": True}),
    Case("RMSprop", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.05, "maximize": True}),
    Case("RMSprop", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.05, "momentum": 0.8}),
    Case("RMSprop", {"lr": 0.01, "alpha": 0.95, "eps": 1e-3, "centered": True}),
    Case("RMSprop", {"lr": 0.01, "alpha": 0.95, "eps": 1e-3, "weight_decay": 0.05, "momentum": 0.8, "centered": True}),
    Case("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.05, "initial_accumulator_value": 0.25}),
    Case("Adagrad", {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.05, "maximize": True}),
    Case("Lion", {"lr": 0.01, "weight_decay": 0.1}),
    Case("Lion", {"lr": 0.01, "betas": (0.5, 0.8), "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("AdaBelief", {"lr": 0.01, "betas": (0.9, 0.7), "weight_decay": 0.1}),
    Case("AdaBelief", {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1, "rectify": False}),
    Case(
        "AdaBelief",
        {"lr": 0.01, "betas": (0.9, 0.8), "weight_decay": 0.1, "degenerated_to_sgd": False, "fixed_decay": True},
    ),
    Case(
        "AdaBelief",
        {
            "lr": 0.01,
            "betas": (0.8, 0.9),
            "amsgrad": True,
            "rectify": False,
            "weight_decouple": False,
            "weight_decay": 0.1,
        },
    ),
    Case("AdaBelief", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "amsgrad": True, "weight_decay": 0.1}),
    Case("Amos", {"lr": 0.01, "eta": 0.5, "beta": 0.9}),
    Case("Amos", {"lr": 0.02, "beta": 0.8, "momentum": 0.7, "clip_value": 0.9, "extra_l2": 0.01, "d_coef": 0.5}),
    Case("AdamWeightDecay", {"lr": 0.01, "epsilon": 1e-3, "weight_decay_rate": 0.1}),
    Case(
        "AdamWeightDecay",
        {"lr": 0.01, "beta_1": 0.8, "beta_2": 0.9, "weight_decay_rate": 0.1, "amsgrad": True, "decay": 0.1},
    ),
)

# Rules that reduce: backends agree to rounding. Their epsilon is not left to the dtype, which is another in float64.
REDUCING: tuple[Case, ...] = (
    Case("Adafactor"),
    Case("Adafactor", {"warmup_init": True, "beta1": 0.9, "weight_decay": 0.1}),
    Case("Adafactor", {"lr": 0.1, "relative_step": False, "eps": (0.1, 0.5), "clip_threshold": 0.5}),
    Case(
        "Adafactor",
        {
            **{"lr": 0.05, "relative_step": False, "scale_parameter": False, "decay_rate": -0.5, "beta1": 0.5},
            **{"weight_decay": 0.1, "maximize": True},
        },
    ),
    Case("TorchAdafactor", {"lr": 0.2, "eps": (1e-4, 0.1), "weight_decay": 0.1}),
    Case("TorchAdafactor", {"lr": 0.5, "eps": (0.7, 0.5), "beta2_decay": -0.5, "d": 1.5, "maximize": True}),
    Case("Amos", {"lr": 0.1, "eta": 0.5, "beta": 0.9, "reduce": (-1,), "clip_value": 1.5, "extra_l2": 1e-3}),
    Case("Amos", {"lr": 0.2, "beta": 0.95, "reduce": (0,), "momentum": 0.5, "c_coef": 0.5, "eps": 1e-8}),
    Case("Amos", {"lr": 0.2, "eta": 0.3, "reduce": (-1,), "momentum": 0.9, "d_coef": 0.5, "maximize": True}),
)


# The precision options, by the names that the benchmark gives them.
PRECISION: dict[str, dict[str, Any]] = {
    "fp32 states": {"state_dtype": torch.float32},
    "bf16 states": {"state_dtype": torch.bfloat16},
    "8-bit states": {"state_dtype": "8bit"},
    "4-bit states": {"state_dtype": "4bit"},
    "master": {"master_weights": True},
    "split": {"master_weights": "split"},
    "split, bf16 states": {"master_weights": "split", "state_dtype": torch.bfloat16},
    "split, 8-bit states": {"master_weights": "split", "state_dtype": "8bit"},
    "split, 4-bit states": {"master_weights": "split", "state_dtype": "4bit"},
    "kahan": {"kahan": True},
    "stochastic": {"rounding": "stochastic", "rounding_seed": 1},
    "stochastic, 8-bit states": {"rounding": "stochastic", "rounding_seed": 1, "state_dtype": "8bit"},
}


def precision_cases() -> list[tuple[Case, str]]:
    """The last row of each elementwise optimizer with each of the precision options, and a dtype that it takes."""
    last = {case.optimizer: case for case in CASES}.values()
    return [
        (Case(case.optimizer, {**case.options, **options}), dtype)
        for case in last
        for options in PRECISION.values()
        for dtype in ("fp32", "bf16", "fp16")
        if dtype == "bf16" or options.get("master_weights") != "split"
        if dtype != "fp32" or "state_dtype" in options
    ]


# What a step does around the update, all in one. Of the norms it is the one that has no order of summation; the limit
# is no power of two, so that every rounding of what it is divided by shows.
CHAIN = {"max_grad_norm": 0.3, "norm_type": float("inf"), "zero_grads": True, "ema_decay": 0.9}


def chain_cases() -> list[tuple[Case, str]]:
    """The last row of each optimizer with `CHAIN`, and a dtype.

    Not that of a narrow parameter of `REDUCING`: its average follows the rounded numbers, which are far from float64.
    """
    last = {case.optimizer: case for case in (*REDUCING, *CASES)}.values()
    return [
        (Case(case.optimizer, {**case.options, **CHAIN}), dtype)
        for case in last
        for dtype in (("fp32", "fp64") if reduces(case) else ("fp32", "bf16", "fp16", "fp64"))
    ]


def reduces(case: Case) -> bool:
    """Whether a case is one of `REDUCING`, with whatever other options."""
    return any(case.optimizer == row.optimizer and case.options.items() >= row.options.items() for row in REDUCING)


def layouts(dtype: torch.dtype, device: torch.device | str, generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters of every memory layout, by name, filled with normal numbers in ``dtype``."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return {
        "scalar": normal(),
        "empty": normal(0, 3),
        "one": normal(1),
        "odd": normal(1025),
        "matrix": normal(33, 17),
        "transposed": normal(17, 9).t(),
        "channels_last": normal(2, 3, 5, 7).to(memory_format=torch.channels_last),
        "permuted": normal(3, 4, 5).permute(2, 0, 1),
        "offset_1": normal(70)[1:],
        "offset_3": normal(70)[3:],
        "rows_of_a_larger": normal(12, 10)[::2, 1:8],
        "column": normal(40, 3)[:, 1],
        "large_matrix": normal(131, 67),
    }


def gradient(param: Tensor, dtype: torch.dtype, generator: torch.Generator, other_layout: bool = False) -> Tensor:
    """A gradient for ``param`` in ``dtype``, in its layout or (``other_layout``) with dimensions in reverse order."""
    values = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.device, dtype)
    if other_layout:
        reverse = tuple(reversed(range(values.dim())))
        return values.permute(reverse).contiguous().permute(reverse)
    grad = torch.empty_like(param, dtype=dtype)
    return grad.copy_(values)


def select_cases(optimizers: Sequence[str] | None = None) -> list[Case]:
    """The rows of the optimizers named, all if None.

    Raises:
        ValueError: there is no row of that name.
    """
    cases = (*CASES, *REDUCING)
    names = {case.optimizer for case in cases}
    for name in optimizers or ():
        if name not in names:
            raise ValueError(f"Invalid optimizer: {name!r} (it must be one of {', '.join(sorted(names))})")
    return [case for case in cases if not optimizers or case.optimizer in optimizers]
