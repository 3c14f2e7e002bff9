"""Whether an optimizer holds all gradients of a model: where processes share them out, it knows no sum over them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import shards
from .caller import level_of_the_user
from .schedules.schedule import Schedule

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


def maker_shares_out() -> bool:
    """Whether the optimizer that is being made gets one process's share, from `ZeroRedundancyOptimizer`.

    It hands a class that it was given groups and options, in which there is no trace of itself.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = None if module is None else sys._getframe(1)
    while frame is not None:
        # Only of that module's frames: what f_locals has shown lives as long as its frame.
        maker: Any = frame.f_locals.get("self") if frame.f_globals is vars(module) else None
        if isinstance(maker, module.ZeroRedundancyOptimizer):
            return maker.world_size > 1
        frame = frame.f_back
    return False


def has_pieces(params: Iterable[Tensor]) -> bool:
    """Whether some of the parameters are pieces of `FullyShardedDataParallel`'s flat ones."""
    whole, unknown = set(), set()
    for param in params:
        if not shards.is_flattened(param):
            continue
        size = getattr(param, "_unpadded_unsharded_size", None)  # of a flat parameter itself
        if size is not None:
            if param.numel() < size.numel():
                return True
        elif param.requires_grad or param.grad is not None:
            # Pieces are flat. Without sharding parameters have their shapes, and lie in the flat one as pieces do.
            (unknown if param.dim() == 1 else whole).add(param.untyped_storage().data_ptr())
    return bool(unknown - whole)


def check_learning_rate(optimizer: FusedOptimizer, group: dict[str, Any]) -> None:
    """Raise ValueError if the learning rate of a group would stop to follow its schedule once a state is loaded."""
    if optimizer.stepper.shared_out and isinstance(group.get("lr"), Schedule):
        raise ValueError(
            f"Invalid learning rate: {group['lr']!r} under ZeroRedundancyOptimizer, which loads a number in its place; "
            "give it a number as lr, and the schedule to fusedstep.schedules.ScheduleLR"
        )


def check(optimizer: FusedOptimizer, norm: bool, norm_of_each: bool, sums: bool) -> None:
    """Raise RuntimeError, or warn once, if what a step needs would be known of one process's gradients alone.

    The checks of parameters and gradients see the same of a DTensor.

    Args:
        norm: a step takes the norm of all gradients together.
        norm_of_each: or that of each gradient by itself.
        sums: its rule sums over rows, columns or tensors.
    """
    if norm and optimizer.stepper.shared_out:
        raise RuntimeError(
            f"{type(optimizer).__name__}: ZeroRedundancyOptimizer gives each process a share of the parameters, and "
            "the norm of gradients would be that of this process's share alone; call torch.nn.utils.clip_grad_norm_ "
            "on all parameters before step() instead"
        )
    if optimizer.stepper.warned_of_pieces or not (norm or norm_of_each or sums):
        return
    if has_pieces(param for group in optimizer.param_groups for param in group["params"]):
        needed = {
            "the norm of all gradients (clip by the model's own clip_grad_norm_() before step(), scale by torch's "
            "ShardedGradScaler)": norm,
            "the norm of each gradient": norm_of_each,
            "the rule's sums over rows, columns or tensors": sums,
        }
        warnings.warn(
            f"{type(optimizer).__name__}: FullyShardedDataParallel shares the parameters out in pieces. Taken of this "
            f"process's pieces alone: {'; '.join(what for what, is_needed in needed.items() if is_needed)}",
            stacklevel=level_of_the_user(),
        )
        optimizer.stepper.warned_of_pieces = True
