"""Sparse gradients: the rows that they name, as small dense tensors that any backend can update."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layout
from ..record import Record


class Rows:
    """The rows of a parameter and its states that a sparse gradient names, for one step."""

    def __init__(self, record: Record, index: int, grad: Tensor) -> None:
        grad = grad.coalesce()
        self.index = index  # of the record in its plan
        self.shape = grad.shape
        self.indices = tuple(grad.indices())
        self.targets = [layout.local(record.owner.detach()), *record.states]
        self.copies = [target[self.indices] for target in self.targets]
        self.grad = grad.values().clone(memory_format=torch.contiguous_format)  # which a step may write into
        rows, *states = self.copies
        self.record = Record(record.index, record.name, rows, rows, tuple(states), record.step)

    def grad_of_rows(self) -> Tensor:
        """The sparse gradient as the step has left it."""
        return torch.sparse_coo_tensor(
            torch.stack(self.indices), self.grad, self.shape, is_coalesced=True, check_invariants=False
        )

    @torch.inference_mode()  # so that inference tensors can be written too
    def write_back(self) -> None:
        """Put the rows back where they came from."""
        for target, copy in zip(self.targets, self.copies, strict=True):
            target.index_put_(self.indices, copy)
