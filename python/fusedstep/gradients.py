"""What becomes of gradients in a step: their norm, clipping, the finite check, and what is left in `.grad`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import layout, shards
from .backends.norm import Limits, Norm, sums
from .backends.plan import SharedGrads
from .exchange import FAIL, ODD, SKIP, STOP, Exchange, Over, Pack, disagreement, over
from .gradient_options import GradientOptions

if TYPE_CHECKING:
    from .backends import Backend
    from .backends.plan import Plan
    from .optimizer import FusedOptimizer

ONE = -5  # where the three numbers begin by which processes see that they have the same limits


class Gradients:
    """What an optimizer does with its gradients; the numbers stay where they are from step to step."""

    def __init__(self, options: GradientOptions) -> None:
        self.options = options
        self.writes = options.zero_grads or options.write_grads  # whether a step leaves something else in gradients
        self.norms: dict[torch.device, Norm] = {}
        self.last: Norm | None = None  # of the last step that needed it
        self.any_seen = False  # whether that step had gradients
        self.shared = SharedGrads()
        self.sharers: Exchange | None = None  # the processes that have parts of the same tensors; None: no others
        self.takes_norm = False  # whether each step takes a norm, as those know
        self.agreed: set[Limits | None] = set()  # that those were found to have too
        self.marks: dict[Limits, Tensor] = {}  # by which it is found; on the device, which is not waited for
        self.to_come: list[tuple[bool, Sequence[Over] | Pack | None]] = []  # of this step, what those will wait in

    def __getstate__(self) -> tuple[GradientOptions, Norm | None]:
        return self.options, self.last

    def __setstate__(self, state: tuple[GradientOptions, Norm | None]) -> None:
        options, last = state
        self.__init__(options)
        if last is not None:
            self.last = self.norms[last.device] = last

    def norm(self, groups: list[dict[str, Any]]) -> Tensor | None:
        """A copy of the last norm; in fp64 if all parameters are."""
        if self.last is None:
            return None
        fp64 = all(param.dtype in (torch.float64, torch.complex128) for param in _params(groups))
        return self.last.norm.to(torch.float64 if fp64 else torch.float32, copy=True)

    def look_for_sharers(self, optimizer: FusedOptimizer, limits: Limits | None, check: Callable[[], object]) -> None:
        """Find the other processes, of a new or changed optimizer; raise in all if they differ or ``check`` raises."""
        found = Exchange(_params(optimizer.param_groups))
        if not found.groups:
            self.sharers = None
        elif self.sharers is None or found.kinds != self.sharers.kinds:
            found.check_agreement(optimizer, shown(limits), check)
            self.sharers, self.takes_norm, self.agreed, self.marks = found, limits is not None, {limits}, {}

    def for_all(self, cls: str, limits: Limits | None) -> Limits | None:
        """The limits of a step in which other processes take a norm, or do not, as in the first one.

        Raises:
            RuntimeError: they would take none, and this one would wait for them for ever.
        """
        if self.sharers is None or self.takes_norm == (limits is not None):
            return limits
        if limits is None:
            return self.options.limits(math.inf, False)
        raise RuntimeError(
            f"{cls}: other processes have parts of the parameters and expect no norm of gradients, as the first step "
            "took none; for step(max_grad_norm=...), an edited global_clipnorm or a fusedstep.GradScaler that come "
            "later, make the optimizer with a limit (max_grad_norm=math.inf clips nothing): then every step takes it"
        )

    @staticmethod
    def can_sum(optimizer: FusedOptimizer) -> bool:
        """Whether it is known of which tensors the parameters are parts."""
        return not any(layout.is_wrapper(p) and not shards.is_sharded(p) for p in _params(optimizer.param_groups))

    def expect(self, exchanges: list[tuple[bool, Sequence[Over] | Pack | None]]) -> None:
        """Before anything of a step can fail: what other processes will enter, as `Exchange.share` takes it."""
        self.to_come = [] if self.sharers is None else exchanges

    def give_up(self, cls: str, error: Exception) -> None:
        """After an error: enter what other processes wait in, so that they can raise too, or skip the step."""
        to_come, self.to_come, sharers = self.to_come, [], self.sharers
        for by_max_abs, kinds in to_come:
            kinds = self._kinds_of_norm() if kinds is None else kinds
            numbers = sharers.numbers(kinds)
            if not isinstance(kinds, Pack) or kinds.decides:
                numbers[STOP] = FAIL
            sharers.share(numbers, by_max_abs, kinds)
            if sharers.host_sees:
                return sharers.raise_failure(cls, error)
            # There the others do not wait for the device, and go on as in a step that is skipped.

    def _at(self, device: torch.device) -> Norm:
        if device not in self.norms:
            with torch.inference_mode(False):
                self.norms[device] = Norm(device)
        return self.norms[device]

    @torch.no_grad()
    def reduce(
        self, plans: Sequence[Plan], limits: Limits, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[int, Tensor | None, Tensor | None]:
        """Take the norm of what all plans have gathered, before any of them writes.

        Args:
            found_inf: the step is skipped if it is not 0; if the limits say that a step finds that out by itself, this
                is where it is left.

        Returns:
            The number of kernel calls; what gradients are to be multiplied by; by which flag the step is skipped.

        Raises:
            RuntimeError: a parameter's memory is spread over processes, or the norm is not finite.
        """
        calls = self._reduce(plans, limits, grad_scale, found_inf)
        last = self.last
        self._check_finite()
        coefficient = None if limits.max_norm == math.inf else last.coefficient
        if not limits.skips and self.sharers is None:
            return calls, coefficient, found_inf
        if limits.find_nonfinite:
            found_inf.copy_(last.found_inf, non_blocking=found_inf.is_cuda)
        return calls, coefficient, last.found_inf

    def _reduce(
        self, plans: Sequence[Plan], limits: Limits, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> int:
        by_device: dict[tuple[Backend, torch.device, Over], list[Plan]] = {}
        for plan in plans:
            for part in (plan, plan.rows_plan):
                if part is not None and (device := part.norm_device()) is not None:
                    by_device.setdefault((part.backend, device, part.over), []).append(part)
        self.any_seen = bool(by_device) or self.sharers is not None
        if self.sharers is None:
            if not by_device:
                self._take_sums([], limits, grad_scale, found_inf)
                return 0
            ((backend, device, _), members), *others = by_device.items()
            self.last = self._at(device)
            if not others:
                return backend.norm(members, self.last, limits, grad_scale, found_inf)
        calls, parts = 0, []
        for (backend, device, kind), members in by_device.items():
            part = self._at(device)
            calls += backend.norm(members, part, None, grad_scale, None)
            parts.append((kind, part.sum_of_squares.clone(), part.max_abs.clone()))
        self._take_sums(parts, limits, grad_scale, found_inf)
        return calls

    def _take_sums(
        self,
        parts: list[tuple[Over, Tensor, Tensor]],
        limits: Limits,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Add up the sums over parts of the gradients, on the device of the first part."""
        if self.sharers is not None:
            return self._share_sums(self.sharers, parts, limits, grad_scale, found_inf)
        if self.last is None or parts:
            self.last = self._at(parts[0][1].device if parts else torch.device("cpu"))
        self.last.numbers.zero_()
        for _, *part in parts:
            self.last.add(*part)
        self.last.finish(limits, grad_scale, found_inf)

    def _share_sums(
        self,
        sharers: Exchange,
        parts: list[tuple[Over, Tensor, Tensor]],
        limits: Limits,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """The same where other processes have parts too: they skip a step if this one does."""
        kinds = self._kinds_of_norm()
        numbers = sharers.numbers(kinds)
        for part in parts:
            sharers.add(numbers, *part, limits.by_max_abs)
        if found_inf is not None:
            numbers[STOP] = torch.where(found_inf.to(numbers.device).reshape(()) != 0, SKIP, 0.0)
        if limits not in self.marks:
            if len(self.marks) > 8:  # limits of each step's own
                self.marks.clear()
                self.agreed.clear()
            mark = mark_of(limits)
            sent = [1.0, mark, -mark if limits.by_max_abs else mark * mark]
            self.marks[limits] = torch.tensor(sent, dtype=torch.float64, device=sharers.device)
        mark = self.marks[limits]
        numbers[ONE:ODD] = mark
        self._enter(sharers, numbers, limits.by_max_abs, kinds)
        self._check_limits(sharers, numbers, limits, mark)
        self.last = self._at(sharers.device)
        self.last.numbers.zero_()
        if limits.by_max_abs:
            self.last.max_abs.copy_(torch.where(numbers[ODD] > 0, math.nan, numbers[:ONE].amax()))
        else:
            self.last.sum_of_squares.copy_(numbers[:ONE].sum())
            self.last.max_abs.copy_(torch.where(numbers[ODD] > 0, math.inf, 0.0))
        self.last.finish(limits, grad_scale, numbers[STOP])

    def _kinds_of_norm(self) -> tuple[Over, ...]:
        """Of the numbers that a norm sends: the last three, from `ONE` on, show whether all have the same limits."""
        groups = self.sharers.groups
        return (*self.sharers.kinds, groups, groups, groups)

    def _check_limits(self, sharers: Exchange, numbers: Tensor, limits: Limits, mark: Tensor) -> None:
        """Raise RuntimeError if other processes have sent the marks of other limits; on a GPU, skip the step."""
        # Numbers are all equal if their mean is one of them and their mean square its square; or if the largest is, and
        # the largest of the negative ones.
        found, times = numbers[ONE:ODD], 1.0 if limits.by_max_abs else numbers[ONE]
        differ = (found != times * mark).any()
        if not sharers.host_sees:
            numbers[STOP] += torch.where(differ, FAIL, 0.0)
            if limits in self.agreed:
                return  # without waiting for the device
        if not differ:
            self.agreed.add(limits)
            return
        own = shown(limits)
        if not sharers.host_sees:  # where the others do not wait either
            raise RuntimeError(f"processes differ in what step() was given: this one has {own}")
        self.to_come = []
        (first, mine), *others = sharers.tell(own)
        rank, theirs = next((rank, theirs) for rank, theirs in others if theirs != mine)
        raise disagreement(first, ("step()", mine), rank, ("step()", theirs))

    def _enter(
        self, sharers: Exchange, numbers: Tensor, by_max_abs: bool, kinds: Sequence[Over] | Pack | None = None
    ) -> None:
        """Share numbers; raise RuntimeError if another process cannot make the step."""
        del self.to_come[:1]
        sharers.share(numbers, by_max_abs, kinds)
        decides = not isinstance(kinds, Pack) or kinds.decides
        if sharers.host_sees and decides and numbers[STOP] >= FAIL:
            self.to_come = []
            sharers.raise_failure("step()", None)

    def enter(self, numbers: Tensor, pack: Pack) -> None:
        """Share sums that a rule takes, where others of `expect` do.

        Raises:
            RuntimeError: another process cannot make the step; not from sums after which it is too late to know.
        """
        self._enter(self.sharers, numbers, False, pack)

    def single_norms(self, grads: Sequence[tuple[int, Tensor]], kinds: Sequence[Over]) -> list[Tensor]:
        """The norm of each of some whole gradients, of which this process has these parts.

        Args:
            grads: each with the index of its parameter.
            kinds: of all parameters.
        """
        parts = {
            index: torch.linalg.vector_norm(grad, dtype=torch.float64 if kinds[index] else None)
            for index, grad in grads
        }
        if self.sharers is not None:
            numbers = self.sharers.numbers(kinds)
            for index, norm in parts.items():
                numbers[index] = norm.square()
            self._enter(self.sharers, numbers, False, kinds)
            parts |= {index: numbers[index].sqrt() for index in parts if kinds[index]}
        return [parts[index].to(grad) for index, grad in grads]

    @torch.no_grad()
    def measure(
        self, optimizer: FusedOptimizer, limits: Limits, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Take the norm where there are no plans, as `reduce` does."""
        if not self.can_sum(optimizer):
            return
        params = [param for param in _params(optimizer.param_groups) if param.grad is not None]
        self.any_seen = bool(params) or self.sharers is not None
        parts = [(over(param), *sums([layout.local(param.grad)], grad_scale, param.device)) for param in params]
        self._take_sums(parts, limits, grad_scale, found_inf)

    @torch.no_grad()
    def skip_unplanned(
        self, optimizer: FusedOptimizer, limits: Limits, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> bool:
        """Whether the step is to be skipped, found out before any state is created; a GPU is asked only if it must be.

        What is done in a skipped step has then been done.

        Raises:
            RuntimeError: the norm is not finite, with ``error_if_nonfinite``.
        """
        raises = self.options.error_if_nonfinite
        if not (raises or limits.skips) or self.sharers is not None or not self.can_sum(optimizer):
            return False  # other processes may have plans, and enter the exchange once
        if not raises and any(grad.is_cuda for grad in _grads(optimizer.param_groups)):
            return False
        self.measure(optimizer, limits, grad_scale, found_inf)
        self._check_finite()
        if not limits.skips or self.last.found_inf.item() == 0:
            return False
        if limits.find_nonfinite:
            found_inf.fill_(1)
        self.skip(optimizer.param_groups)
        return True

    def _check_finite(self) -> None:
        """Raise if the norm is not finite, which is an error, unless the step is skipped; this waits for the device."""
        last = self.last
        if self.options.error_if_nonfinite and last.found_inf.item() == 0 and not math.isfinite(last.norm.item()):
            raise_nonfinite(self.options.norm_type)

    @torch.inference_mode()  # in which inference tensors can be written, and any other one as always
    def skip(self, groups: list[dict[str, Any]]) -> None:
        """What is done to gradients in a step that is known to be skipped."""
        if self.options.zero_grads:
            for grad in _grads(groups):
                layout.zero(grad)


def _params(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    return (param for group in groups for param in group["params"])


def _grads(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [param.grad for param in _params(groups) if param.grad is not None]


def shown(limits: Limits | None) -> dict[str, str]:
    """What of the limits of a step a user gives it."""
    return {
        "max_grad_norm": str(None if limits is None or limits.max_norm == math.inf else limits.max_norm),
        "fusedstep.GradScaler": str(limits is not None and limits.find_nonfinite),
    }


def mark_of(limits: Limits) -> float:
    """A number by which limits can be told from others; so small that sums of its squares are exact in any cluster."""
    return float(int.from_bytes(hashlib.sha256(repr(limits).encode()).digest()[:2], "big"))


def raise_nonfinite(norm_type: float) -> None:
    raise RuntimeError(
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
        "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
        "`error_if_nonfinite=False`"
    )
