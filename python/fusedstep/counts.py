"""Step counters: one fp32 number for each parameter, as in torch's states, which goes on counting above 2^24.

There adding 1 would change the number no more. The counter then moves to the next fp32 number instead, and the count is
2^24 and as many as the numbers passed. `csrc/table.h` and `triton_kernels/numeric.py` hold the same functions. What a
`state_dict` shows is the count itself.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

EXACT = 2**24
EXACT_BITS, LAST_BITS = 0x4B800000, 0x7F7FFFFF  # of 2^24, and of the largest fp32 number
MOST = EXACT + LAST_BITS - EXACT_BITS


def count_of(counter: float | Tensor) -> int:
    """The count for which a counter stands."""
    value = float(counter)
    if value <= EXACT:
        return int(value)
    return EXACT + struct.unpack("<i", struct.pack("<f", value))[0] - EXACT_BITS


def counter_value(count: int) -> float:
    """The number in a counter that stands for ``count``."""
    if count <= EXACT:
        return float(count)
    return struct.unpack("<f", struct.pack("<i", min(count, MOST) - EXACT + EXACT_BITS))[0]


def new_counter(count: float, device: torch.device) -> Tensor:
    """A counter of its own."""
    return torch.full((), counter_value(int(count)), dtype=torch.float32, device=device)


def as_counts(counters: Sequence[Tensor]) -> list[Tensor]:
    """The counts as fp32 numbers, without waiting for a device; those on the host that are so already as they are."""
    found = list(counters)
    by_device: dict[torch.device, list[int]] = {}
    for index, counter in enumerate(found):
        if counter.dtype == torch.float32 and not (counter.device.type == "cpu" and counter.item() <= EXACT):
            by_device.setdefault(counter.device, []).append(index)
    for indices in by_device.values():
        together = torch.stack([found[index].detach().reshape(()) for index in indices])
        passed = together.view(torch.int32) - EXACT_BITS
        decoded = torch.where(together > EXACT, (passed + EXACT).to(torch.float32), together)
        for index, count in zip(indices, decoded.unbind(), strict=True):
            found[index] = count
    return found
