"""Who takes part: for each optimizer the implementations to compare."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..cases import PRECISION
from . import chain
from .optimizers import BF16_STEPS, QUANTIZED_STEPS, Optimizer

BACKENDS = ("cuda", "triton", "cpu", "reference")
OURS = "fusedstep"  # how the names of our own contenders start
EAGER = f"{OURS} reference"  # an eager implementation, which stands in where nobody else has the optimizer
PLAIN = ", plain"  # how the names of those of ours end that have no precision options, to compare with those that have


@dataclass(frozen=True)
class Contender:
    """An implementation of one optimizer.

    ``build(params)`` makes it. ``reasons`` says why it cannot take part. ``tolerance`` is given where it is not meant
    to agree with the others to rounding error (see `check.error`). ``precision``: how it stores weights and states.
    """

    name: str
    build: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    reasons: tuple[str, ...] = ()
    tolerance: float | None = None
    precision: str = ""

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


def is_compared_with(name: str) -> bool:
    """Whether a contender is there to be compared with, not what is measured: all that are not ours, and some."""
    return not name.startswith(OURS) or name == EAGER or name.endswith(PLAIN)


# torch.optim

TORCH_VARIANTS: dict[str, dict[str, bool]] = {
    "torch for-loop": {"foreach": False, "fused": False},
    "torch foreach": {"foreach": True},
    "torch fused": {"fused": True},
}
FUSED = "torch fused"  # speed-ups refer to it, or where it does not exist to the fastest of the others


def torch_contenders(optimizer: Optimizer) -> list[Contender]:
    """The implementations inside torch.optim, as far as the class has them."""
    made = optimizer.torch_class
    if made is None:
        return []
    accepted = inspect.signature(made).parameters
    contenders = []
    for name, wanted in TORCH_VARIANTS.items():
        variant = {option: value for option, value in wanted.items() if value or option in accepted}
        missing = [option for option in variant if option not in accepted]
        reasons = tuple(f"torch.optim.{optimizer.class_name} has no option '{option}'" for option in missing)
        build = functools.partial(made, **optimizer.options, **variant)
        if optimizer.chain:
            build = chain.chained(build, optimizer.chain, ours=False)
        contenders.append(Contender(name, build, reasons, optimizer.others_tolerance))
    return contenders


# fusedstep


def backend_reasons(name: str, device: torch.device, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Why a backend of fusedstep cannot take part on ``device``; empty if it can."""
    if name == "triton" and device.type == "cpu":
        return ("on a CPU it runs in Triton's interpreter, whose speed says nothing",)
    if name not in backends.BACKENDS:
        return ("this build of fusedstep has no such backend",)
    return tuple(backends.BACKENDS[name].reasons(device, dtype))


def our_contenders(
    optimizer: Optimizer, device: torch.device, dtype: torch.dtype, names: Sequence[str]
) -> list[Contender]:
    """fusedstep on each of the backends ``names``."""
    made = optimizer.our_class
    contenders = []
    for name in names:
        if made is None:
            reasons: tuple[str, ...] = (f"fusedstep has no {optimizer.class_name}",)
            contenders.append(Contender(f"{OURS} {name}", _cannot_build, reasons))
        else:
            build = functools.partial(made, **optimizer.options, backend=name)
            if optimizer.chain:
                build = chain.chained(
                    functools.partial(build, max_grad_norm=chain.MAX_NORM), optimizer.chain, ours=True
                )
            reasons = backend_reasons(name, device, dtype)
            if optimizer.precision:
                contenders.append(Contender(f"{OURS} {name}{PLAIN}", build, reasons))
                build = functools.partial(build, **PRECISION[optimizer.precision])
            contenders.append(Contender(f"{OURS} {name}", build, reasons, optimizer.our_tolerance, optimizer.precision))
    return contenders


def _cannot_build(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """In place of a class that is not there. Its contender has reasons why, and is listed but never built."""
    raise NotImplementedError


# Other packages


@dataclass(frozen=True)
class Peer:
    """Another package's optimizers, compared where it is installed.

    ``classes`` maps our class names to (attribute of ``module``, options beside the optimizer's own). ``precision``:
    how weights and states are stored; it is compared with ours that does the same.
    """

    name: str
    distribution: str
    module: str
    devices: tuple[str, ...]
    classes: dict[str, tuple[str, dict[str, Any]]]
    tolerance: float | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    precision: str = ""

    @property
    def version(self) -> str | None:
        """The installed package's version; None if it is not installed."""
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return None
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


PEERS: tuple[Peer, ...] = (
    Peer(
        *("lion-pytorch", "lion-pytorch", "lion_pytorch", ("cpu", "cuda")),
        {"Lion": ("Lion", {})},
    ),
    Peer(
        *("lion-pytorch foreach", "lion-pytorch", "lion_pytorch.foreach", ("cpu", "cuda")),
        {"Lion": ("Lion", {})},
    ),
    Peer(
        *("adabelief-pytorch", "adabelief-pytorch", "adabelief_pytorch", ("cpu", "cuda")),
        {"AdaBelief": ("AdaBelief", {"print_change_log": False})},
    ),
    Peer(
        *("transformers", "transformers", "transformers.optimization", ("cpu", "cuda")),
        {"Adafactor": ("Adafactor", {})},
    ),
    Peer(
        *("apex", "apex", "apex.optimizers", ("cuda",)),
        {
            "SGD": ("FusedSGD", {}),
            "Adam": ("FusedAdam", {"adam_w_mode": False}),
            "AdamW": ("FusedAdam", {"adam_w_mode": True}),
        },
    ),
    # Its 32-bit Adam decays the parameter like AdamW, hence no row for Adam.
    Peer(
        *("bitsandbytes 32-bit", "bitsandbytes", "bitsandbytes.optim", ("cpu", "cuda")),
        {"AdamW": ("AdamW32bit", {})},
        tolerance=0.05,  # on a GPU the decay comes after the update instead of before it
    ),
    Peer(
        *("bitsandbytes 8-bit", "bitsandbytes", "bitsandbytes.optim", ("cuda",)),
        {"AdamW": ("AdamW8bit", {})},
        tolerance=QUANTIZED_STEPS[8],
        precision="8-bit states",
    ),
    Peer(
        *("torchao 8-bit", "torchao", "torchao.optim", ("cuda",)),
        {"AdamW": ("AdamW8bit", {})},
        tolerance=QUANTIZED_STEPS[8],
        precision="8-bit states",
    ),
    Peer(
        *("torchao 4-bit", "torchao", "torchao.optim", ("cuda",)),
        {"AdamW": ("AdamW4bit", {})},
        tolerance=QUANTIZED_STEPS[4],
        precision="4-bit states",
    ),
    Peer(
        *("torchao 8-bit stochastic", "torchao", "torchao.optim", ("cuda",)),
        {"AdamW": ("AdamW8bit", {"bf16_stochastic_round": True})},
        tolerance=QUANTIZED_STEPS[8],
        dtypes=(torch.bfloat16,),
        precision="stochastic, 8-bit states",
    ),
    Peer(
        *("torchao stochastic", "torchao", "torchao.optim", ("cuda",)),
        {"AdamW": ("_AdamW", {"bf16_stochastic_round": True})},
        tolerance=2 * BF16_STEPS,
        dtypes=(torch.bfloat16,),
        precision="stochastic",
    ),
    # With L2 decay or Kahan summation it writes into the gradients, which here serve for many steps.
    Peer(
        *("optimi", "torch-optimi", "optimi", ("cpu", "cuda")),
        {"AdamW": ("AdamW", {"kahan_sum": False})},
    ),
    Peer(
        *("flashoptim", "flashoptim", "flashoptim", ("cuda",)),  # which splits bf16 weights unless told otherwise
        {"AdamW": ("FlashAdamW", {})},
        tolerance=QUANTIZED_STEPS[8],
        dtypes=(torch.bfloat16,),
        precision="split, 8-bit states",
    ),
)


def peer_contenders(optimizer: Optimizer, device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """Installed packages that have this optimizer with its options."""
    contenders = []
    for peer in PEERS:
        if optimizer.class_name not in peer.classes or peer.precision != optimizer.precision or peer.version is None:
            continue
        attribute, extra = peer.classes[optimizer.class_name]
        options = {**optimizer.options, **extra}
        build: Callable[..., torch.optim.Optimizer] = _cannot_build
        reasons = []
        if device.type not in peer.devices:
            reasons.append(f"compared on {', '.join(peer.devices)} only")
        elif dtype not in peer.dtypes:
            reasons.append(f"does not take {dtype}")
        else:
            try:
                made = getattr(importlib.import_module(peer.module), attribute)
            except Exception as error:  # a package that is broken here must not end the benchmark
                reasons.append(f"cannot be imported ({error})")
            else:
                lacks = [option for option in options if option not in inspect.signature(made).parameters]
                reasons += [f"has no option '{option}'" for option in lacks]
                build = functools.partial(_quietly, made, options)
        tolerance = peer.tolerance or optimizer.others_tolerance
        contenders.append(Contender(peer.name, build, tuple(reasons), tolerance, peer.precision))
    return contenders


def _quietly(
    made: type[torch.optim.Optimizer], options: dict[str, Any], params: Sequence[Tensor]
) -> torch.optim.Optimizer:
    """Some packages print when an optimizer is made."""
    with contextlib.redirect_stdout(io.StringIO()):
        return made(params, **options)


def contenders(
    optimizer: Optimizer, device: torch.device, dtype: torch.dtype, backend_names: Sequence[str]
) -> list[Contender]:
    """Everybody who has this optimizer; those with `reasons` cannot run."""
    in_torch = torch_contenders(optimizer)
    in_others = [] if optimizer.chain else peer_contenders(optimizer, device, dtype)
    if not in_torch and not in_others and "reference" not in backend_names:
        backend_names = (*backend_names, "reference")  # an eager implementation to compare with
    return [*in_torch, *our_contenders(optimizer, device, dtype, backend_names), *in_others]


def peer_versions() -> dict[str, str | None]:
    """The version of every package that could be compared; None for those that are not installed."""
    return {peer.distribution: peer.version for peer in PEERS}
