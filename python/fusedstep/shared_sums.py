"""The passes of rules that reduce over processes: all sums of a pass travel together, in one call for each group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import checks, exchange, layout, planning, shards
from .backends import lifetime
from .backends.parts import PARTS, has_parts
from .backends.reference_reducing import sum_of_squares
from .exchange import FAIL, SKIP, STOP
from .lines import Lines, Sum, crosses
from .record import Record

if TYPE_CHECKING:
    from .backends.parts import Passes
    from .backends.plan import Plan
    from .exchange import Exchange, Pack
    from .gradients import Gradients
    from .optimizer import FusedOptimizer
    from .record import Step

PASSES = 3
FROZEN = 2.0**20  # beside 1 for a gradient, what tells that a process has none and will have none


class Member(NamedTuple):
    """A parameter whose sums cross processes."""

    index: int  # among all parameters of the optimizer
    what: str
    param: Tensor
    lines: Lines
    passes: tuple[list[Sum], ...]
    sizes: tuple[list[int], ...]  # of each sum: how many numbers travel


class SharedSums:
    """Of one optimizer. Which numbers travel is known from its parameters: a process without gradients sends zeros."""

    def __init__(self, optimizer: FusedOptimizer, sharers: Exchange) -> None:
        self.sharers = sharers
        self.members = list(_members(optimizer))
        flags = [(exchange.over(member.param), 1) for member in self.members]
        self.packs: list[Pack] = [
            sharers.pack([*(() if number else flags), *self._kinds(number)], decides=number == 0)
            for number in range(PASSES)
        ]
        self.running: list[tuple[Passes, list[int]]] = []  # plans, with the index of the parameter of each record
        self.asked: dict[int, list[Tensor]] = {}  # of each parameter that takes part, its sums in this pass
        self.flags: dict[tuple[float, ...], Tensor] = {}  # that were sent

    def _kinds(self, number: int) -> Iterator[tuple[exchange.Over, int]]:
        for member in self.members:
            yield from ((s.over, n) for s, n in zip(member.passes[number], member.sizes[number], strict=True) if n)

    @torch.inference_mode()
    def begin(
        self,
        optimizer: FusedOptimizer,
        gradients: Gradients,
        steps: Sequence[tuple[Any, Step]],
        found_inf: Tensor | None,
    ) -> Tensor | None:
        """The first pass, before anything is written; returns the flag by which all processes skip the step or do not.

        Where numbers lie on a GPU, the host waits for them only if it must know: if this process has no gradient of a
        parameter of which others may have one, or a plan goes through torch's operations.

        Raises:
            RuntimeError: another process cannot make the step, or has a gradient where this one never will; or the step
                is to be captured in a CUDA graph. On a GPU processes that do not wait skip the step instead.
        """
        if lifetime.is_capturing(self.sharers.device):
            raise RuntimeError(
                f"{type(optimizer).__name__}: processes have parts of {self.members[0].what}, for whose sums the host "
                "may have to wait: a CUDA graph cannot hold such a step; capture the forward and backward pass without "
                "step()"
            )
        self.running, self.asked = [], {}
        places: dict[int, tuple[Any, int, Step]] = {}
        lines = {member.index: member.lines for member in self.members}
        host_decides = self.sharers.host_sees
        for plan, step in steps:
            if has_parts(plan):
                indices = [record.index for record in plan.records]
                places |= {index: (plan, i, step) for i, index in enumerate(indices)}
                asked = plan.begin(step, {i: lines[index] for i, index in enumerate(indices)})
                host_decides = host_decides or (plan.host_decides and len(asked) > 0)
                self._run(plan, indices, asked)
        numbers = self._packed(0)
        if found_inf is not None:
            numbers[STOP] = torch.where(found_inf.to(numbers.device).reshape(()) != 0, SKIP, 0.0)
        gradients.enter(numbers, self.packs[0])
        count, host_sees = len(self.members), self.sharers.host_sees
        if not host_sees:
            flags = numbers[:count]
            numbers[STOP] += torch.where(((flags % FROZEN != 0) & (flags >= FROZEN)).any(), FAIL, 0.0)
            found_inf = (numbers[STOP] != 0).to(torch.float32)
        if host_decides or any(member.index not in self.asked for member in self.members):
            *seen, stop = torch.cat([numbers[:count], numbers[STOP:]]).tolist()
            if not (stop and host_sees):
                self._refuse_frozen(optimizer, seen)
            if stop:
                self.running, self.asked = [], {}
                return numbers[STOP].to(torch.float32)
            for member, flag in zip(self.members, seen, strict=True):
                if flag % FROZEN and member.index not in self.asked:
                    self._run_without_gradient(optimizer, member, *places[member.index])
        self._take(0, numbers)
        return found_inf

    def _refuse_frozen(self, optimizer: FusedOptimizer, flags: list[float]) -> None:
        for member, flag in zip(self.members, flags, strict=True):
            if flag % FROZEN and flag >= FROZEN:
                raise RuntimeError(
                    f"{type(optimizer).__name__}: some processes have a gradient of {member.what}, in others it "
                    "does not require one; every process must train the same parameters"
                )

    def _run(self, plan: Passes, indices: list[int], asked: dict[int, list[Tensor]]) -> None:
        self.running.append((plan, indices))
        self.asked |= {indices[i]: sums for i, sums in asked.items()}

    def _run_without_gradient(self, optimizer: FusedOptimizer, member: Member, plan: Plan, i: int, step: Step) -> None:
        """Another process has a part of the gradient: this one's is zero, and what they share must stay the same."""
        entry = next(e for e in chain.from_iterable(planning.entries(optimizer)) if e.index == member.index)
        record = Record(entry.index, entry.name, entry.param)
        with torch.inference_mode(False), torch.no_grad():
            record = record._replace(**planning.fields(entry, PARTS, True))
            zero = torch.zeros_like(entry.param)
        alone = PARTS.plan(plan.optimizer, plan.group, plan.options, plan.variant, plan.states, [record])
        alone.gather([zero])
        alone.foresee(step.hyper)
        self._run(alone, [member.index], alone.begin(step, {0: member.lines}))

    @torch.inference_mode()
    def finish(self, gradients: Gradients, found_inf: Tensor | None) -> None:
        """The other passes; then everything is written, or is left to the plans' own steps."""
        for number in range(1, PASSES):
            self.asked = {}
            running, self.running = self.running, []
            for plan, indices in running:
                self._run(plan, indices, plan.advance(found_inf))
            if self.packs[number].members:
                numbers = self._packed(number)
                gradients.enter(numbers, self.packs[number])
                self._take(number, numbers)
        for plan, _ in self.running:
            plan.write()
        self.running, self.asked = [], {}

    def _packed(self, number: int) -> Tensor:
        """All numbers of a pass that travel."""
        device = self.sharers.device
        flags, pieces = [], []
        for member in self.members:
            own = self.asked.get(member.index)
            is_frozen = not member.param.requires_grad and own is None
            flags.append(FROZEN if is_frozen else float(own is not None))
            for place, (each, size) in enumerate(zip(member.passes[number], member.sizes[number], strict=True)):
                if size == 0:
                    continue
                if own is not None:
                    pieces.append(own[place].reshape(-1).to(device))
                elif number == 0 and each is member.lines.tensor and not is_frozen:
                    # Of the parameter, in the first pass.
                    pieces.append(sum_of_squares(layout.local(member.param)).reshape(-1).to(device))
                else:
                    pieces.append(torch.zeros(size, dtype=torch.float64, device=device))
        if number == 0:
            pieces = [self._sent(flags), *pieces, pieces[0].new_zeros(2)]
        return torch.cat(pieces)

    def _sent(self, flags: list[float]) -> Tensor:
        """On the device, where they stay: most steps send the same ones, and the way there is waited for."""
        key = tuple(flags)
        if key not in self.flags:
            if len(self.flags) > 8:
                self.flags.clear()
            self.flags[key] = torch.tensor(flags, dtype=torch.float64, device=self.sharers.device)
        return self.flags[key]

    def _take(self, number: int, numbers: Tensor) -> None:
        """Put the sums of whole tensors in the place of those of parts."""
        sizes = [size for member in self.members for size in member.sizes[number] if size]
        begin = 0 if number else len(self.members)
        pieces = iter(numbers[begin : begin + sum(sizes)].split(sizes) if sizes else ())
        into, totals = [], []
        for member in self.members:
            own = self.asked.get(member.index)
            for place, size in enumerate(member.sizes[number]):
                if size:
                    piece = next(pieces)
                    if own is not None:
                        into.append(own[place].reshape(-1))
                        totals.append(piece)
        if into:
            torch._foreach_copy_(into, totals)


def _members(optimizer: FusedOptimizer) -> Iterator[Member]:
    index, seen = 0, set()
    for group in optimizer.param_groups:
        for name, param in planning.named(group):
            if crosses(optimizer, group, name, param):
                what = checks.describe(index, name, param)
                if param in seen:
                    raise ValueError(
                        f"{type(optimizer).__name__}: {what} is given twice; where sums cross processes, give it once"
                    )
                seen.add(param)
                lines = Lines.of_part(optimizer, group, name, param)
                rule, _ = optimizer.rule_of(optimizer.variant_of(group, name, param))
                passes = lines.passes(optimizer.rule_named(rule))
                shape = shards.part_shape(param)
                sizes = tuple([each.lines(shape) if each.crosses else 0 for each in sums] for sums in passes)
                yield Member(index, what, param, lines, passes, sizes)
            index += 1


def shared_sums(optimizer: FusedOptimizer, sharers: Exchange) -> SharedSums | None:
    """None: no sum of a step crosses processes."""
    found = SharedSums(optimizer, sharers)
    return found if found.members else None
