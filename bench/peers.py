"""Who takes part: the optimizers, and for each of them the implementations to compare."""

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

import fusedstep

from .. import backends
from ..cases import PRECISION
from ..codecs import BLOCK, QUANTIZERS
from . import chain

BACKENDS = ("cuda", "triton", "cpu", "reference")
OURS = "fusedstep"  # how the names of our own contenders start
EAGER = f"{OURS} reference"  # an eager implementation, which stands in where nobody else has the optimizer
PLAIN = ", plain"  # how the names of those of ours end that have no precision options, to compare with those that have


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
