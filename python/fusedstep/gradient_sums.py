"""The running sums of gradients: a buffer for each parameter, and the plans by which kernels add to the buffers.

When a round begins, what its weights are and what becomes of the sums is `accumulate`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, layout
from .backends.lifetime import Graphs, refuse_capture
from .backends.plan import Plan, SharedGrads
from .record import Record
from .rule import Rule

BUCKET = 1 << 23  # elements that `GradientSums.all_reduce` sends at a time


class GradientSums:
    """The sums of one accumulator, and what they are made with.

    Args:
        rule: the rule that adds, of the accumulator's class.
        backend: the name of the chosen backend, or "auto".
    """

    def __init__(self, rule: type[Rule], backend: str) -> None:
        self.rule = rule
        self.backend = backend
        self.params: dict[Tensor, str | None] = {}  # with their names
        self.buffers: dict[Tensor, Tensor] = {}
        self.seen: set[Tensor] = set()  # parameters with a gradient since `begin_anew`
        self.plans: list[tuple[Plan, Tensor]] | None = None  # with the counters of each plan's parameters
        self.graphs = Graphs()
        self.shared = SharedGrads()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": None}

    def follow(self, params: dict[Tensor, str | None]) -> None:
        """Go on with these parameters; what is kept for others is dropped."""
        self.params = params
        self.plans = None
        self.shared.apart = None
        self.seen &= params.keys()
        for param in self.buffers.keys() - params.keys():
            del self.buffers[param]

    def begin_anew(self) -> None:
        """Let the next gradient of each parameter overwrite its sum."""
        self.seen.clear()
        for _, counters in self.plans or ():
            counters.zero_()

    def load(self, sums: Sequence[Tensor | None]) -> None:
        """Take copies of other sums, one or None for each parameter, in place of these."""
        with torch.no_grad():
            copies = {
                param: layout.dense_like(param, _sum_dtype(param.dtype)).copy_(value)
                for param, value in zip(self.params, sums, strict=True)
                if value is not None
            }
        self.buffers = copies
        self.seen = set(copies)
        self.plans = None

    def totals(self) -> list[Tensor | None]:
        """Each parameter's sum, None where it had no gradient since `begin_anew`."""
        return [self.buffers[param] if param in self.seen else None for param in self.params]

    def backend_of(self, param: Tensor) -> backends.Backend:
        """The backend that adds up a parameter's gradients; raises RuntimeError if there is none."""
        return backends.select(self.backend, param.device, _sum_dtype(param.dtype))

    def buffer(self, param: Tensor, grad: Tensor | None = None) -> Tensor:
        """The parameter's buffer, on its device and in the layout of its first gradient."""
        dtype = _sum_dtype(param.dtype)
        buffer = self.buffers.get(param)
        if buffer is None or buffer.shape != param.shape:
            plain = grad is not None and not layout.is_wrapper(param) and not layout.overlaps_itself(grad)
            buffer = layout.dense_like(grad if plain else param, dtype).detach()
        self.buffers[param] = buffer = buffer.to(param.device, dtype)
        return buffer

    def add(self, gradients: list[Tensor | None] | None, weight: float, zero: bool = False, anew: bool = False) -> int:
        """Add gradients to the buffers, or (``anew``) put them there; returns the number of kernel calls.

        Args:
            gradients: one or None for each parameter; None: the parameters' own.
            weight: what they are multiplied by.
            zero: set each gradient to zero as it is read.
        """
        if self.plans is None or not self._gather(gradients, zero):
            with torch.inference_mode(False), torch.no_grad():
                self.plans = self._build(gradients)
            if not self._gather(gradients, zero):
                raise RuntimeError("a parameter or gradient changed in another thread during accumulation")
        if zero:
            self.shared.copy([plan for plan, _ in self.plans])
        calls = 0
        for plan, counters in self.plans:
            if anew:
                counters.zero_()
            if len(self.seen) < len(self.params):
                self.seen.update(plan.records[i].owner for i, _ in plan.grads_in_use())
            calls += plan.step(plan.step_with((weight,)))
        return calls

    def scale(self, factor: float) -> None:
        """Multiply the sums, in place."""
        if factor != 1.0:
            self.add(self.totals(), factor, anew=True)

    def all_reduce(self, group: Any) -> None:
        """Add up the sums of the processes of a group; a parameter that has one in any process gets one in all."""
        import torch.distributed as dist

        device = next(iter(self.params)).device
        seen = torch.tensor([param in self.seen for param in self.params], dtype=torch.int32, device=device)
        dist.all_reduce(seen, dist.ReduceOp.MAX, group)
        buckets: dict[Any, list[Tensor]] = {}
        with torch.no_grad():
            for param, anywhere in zip(list(self.params), seen.tolist(), strict=True):
                if anywhere and param not in self.seen:
                    self.buffer(param).zero_()
                    self.seen.add(param)
                    self.plans = None
                if anywhere:
                    buffer = layout.as_real(self.buffer(param))
                    buckets.setdefault((buffer.device, buffer.dtype), []).append(buffer)
            for buffers in buckets.values():
                for bucket in _bucketed(buffers):
                    flat = torch.cat([buffer.reshape(-1) for buffer in bucket])
                    dist.all_reduce(flat, group=group)
                    for buffer, part in zip(bucket, flat.split([b.numel() for b in bucket]), strict=True):
                        buffer.copy_(part.view(buffer.shape))

    def _gather(self, gradients: list[Tensor | None] | None, zero: bool) -> bool:
        try:
            for plan, _ in self.plans:
                plan.zero_grads = plan.grads_change = zero
                if not plan.gather(None if gradients is None else [gradients[record.index] for record in plan.records]):
                    return False
        except BaseException:
            self.plans = None  # and with the plans their references to the gradients
            raise
        return True

    def _build(self, gradients: list[Tensor | None] | None) -> list[tuple[Plan, Tensor]]:
        """Plan one kernel call for each device and backend; raises before any buffer is created."""
        name_of_rule = self.rule.__name__
        for device in {param.device for param in self.params}:
            refuse_capture(device, f"{name_of_rule} met new or changed tensors")
        grads = [param.grad for param in self.params] if gradients is None else gradients
        for index, ((param, name), grad) in enumerate(zip(self.params.items(), grads, strict=True)):
            if grad is not None:
                what = checks.describe(index, name, param)
                checks.check_grad(self.rule, {}, param, grad, what)
                if param in self.seen and self.buffers[param].shape != param.shape:
                    raise RuntimeError(f"{name_of_rule}: the shape changed since the last reset() of {what}")
        buckets: dict[Any, list[Record]] = {}
        for index, ((param, name), grad) in enumerate(zip(self.params.items(), grads, strict=True)):
            backend = self.backend_of(param)
            if grad is None and param not in self.seen:
                record = Record(index, name, param)
            else:
                buffer = self.buffer(param, grad)
                record = Record(index, name, param, backend.memory(buffer), into=buffer)
            buckets.setdefault((backend, param.device, backend.bucket(param)), []).append(record)
        plans = []
        for (backend, device, _), records in buckets.items():
            # Only whether a buffer has begun matters to the rule.
            begun = [float(record.owner in self.seen) for record in records]
            counters = torch.tensor(begun, dtype=torch.float32, device=device)
            records = [
                record._replace(step=counter) for record, counter in zip(records, counters.unbind(), strict=True)
            ]
            plan = backend.plan(self.rule, 0, {}, None, (), records)
            plan.graphs = self.graphs
            plans.append((plan, counters))
        return plans


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients of ``dtype`` are added up in."""
    if dtype.is_complex:
        return torch.complex128 if dtype == torch.complex128 else torch.complex64
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bucketed(buffers: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours together, up to `BUCKET` elements or one tensor."""
    buckets: list[list[Tensor]] = []
    size = BUCKET
    for buffer in buffers:
        if size + buffer.numel() > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(buffer)
        size += buffer.numel()
    return buckets
