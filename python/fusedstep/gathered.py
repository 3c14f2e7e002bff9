"""Whole weights that FSDP has gathered from the parts that an optimizer has, and that do not follow these.

After a backward pass FSDP drops them. After a forward pass without one, as in an evaluation, it keeps those of the root
module, or of all modules that are not resharded after their forward pass, for the next pass.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable

from torch import Tensor

from . import shards


def drop(params: Iterable[Tensor]) -> None:
    """Have the whole weights of parameters gathered anew when they are needed next."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    params = list(params)
    if any(map(shards.is_sharded, params)):
        _drop_those_of_fully_shard()
    if any(map(shards.is_flattened, params)):
        _drop_those_of_the_wrapper_class()


def _drop_those_of_fully_shard() -> None:
    # A parameter knows no module, and `fully_shard` lists its modules only here.
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in [*_module_state_mapping]:
        if isinstance(module, FSDPModule):
            module.reshard()


def _drop_those_of_the_wrapper_class() -> None:
    """The same of `FullyShardedDataParallel`, whose modules nobody lists."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._runtime_utils import _reshard

    for module in gc.get_objects():
        # What an object says of its class may be another one's word, or raise.
        if not issubclass(type(module), FullyShardedDataParallel):
            continue
        handle = module._handle
        has_run = handle is not None and hasattr(handle.flat_param, "_full_param_padded")
        if has_run and handle.uses_sharded_strategy and not handle.needs_unshard():
            _reshard(module, handle, True)
