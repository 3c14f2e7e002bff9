"""How long device memory lives that kernel calls were given: streams and captured CUDA graphs use it after the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHANGED = "step() met new or changed tensors"


def is_capturing(device: torch.device) -> bool:
    """Whether kernel calls on ``device`` go into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str) -> None:
    """Raise RuntimeError if a CUDA graph is being captured, which ``what`` on ``device`` cannot be part of."""
    if is_capturing(device):
        raise RuntimeError(
            f"fusedstep: {what} while a CUDA graph is captured; "
            "run one step() with these parameters and gradients before capturing"
        )


def current_stream(device: torch.device) -> int | None:
    """A number for the stream that kernel calls on ``device`` go to; None for a CPU, which has none."""
    return torch._C._cuda_getCurrentRawStream(device.index or 0) if device.type == "cuda" else None


class Graphs:
    """What captured launches of an optimizer were given: a replay uses it whatever the optimizer does since."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}

    def keep(self, device: torch.device, *used: Any) -> None:
        """Keep objects as long as the optimizer lives, if a graph is being captured on ``device``."""
        if is_capturing(device):
            self.kept.update((id(thing), thing) for thing in used if thing is not None)

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()  # a copied or loaded optimizer has no graphs


class Streams:
    """Tells the allocator which streams use a plan's device memory, so that none of it is given away too early."""

    def __init__(self) -> None:
        self.stream: int | None = None
        self.tensors: Sequence[Tensor | None] = ()

    def use(self, device: torch.device, tensors: Sequence[Tensor | None]) -> None:
        """Note that the launch about to be queued uses ``tensors``: the same ones as before, or others at their place.

        The allocator makes nothing of the stream on which it allocated a tensor.
        """
        stream = current_stream(device)
        if stream is None:
            return
        known = self.tensors if stream == self.stream else ()
        for i, tensor in enumerate(tensors):
            if tensor is not None and not (i < len(known) and tensor is known[i]):
                tensor.record_stream(torch.cuda.current_stream(device))
        self.stream, self.tensors = stream, tensors
