"""Learning rates that follow schedules on the device: counted and evaluated there after each step, without the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.lifetime import Graphs, Streams, refuse_capture
from .schedule import POWER, Schedule, WarmUp, check_steps

Group = dict[str, Any]
# In the groups of a state_dict:
COUNT = "schedule_step"  # the number of steps so far, by which the schedule goes
STEPS = "optimizer_step"  # the largest number of steps of a parameter at that time


def at_the_beginning(group: Group) -> Group:
    """The options of a group with a number in the place of a schedule, for the checks.

    Raises:
        ValueError: the schedule cannot be evaluated on a device.
    """
    schedule = group.get("lr")
    if not isinstance(schedule, Schedule):
        return group
    reason = why_not(schedule)
    if reason is not None:
        raise ValueError(
            f"Invalid learning rate: {schedule!r} cannot be evaluated on the device, because {reason}; "
            "use fusedstep.schedules.ScheduleLR with it"
        )
    return {**group, "lr": schedule(0)}


def why_not(schedule: Schedule) -> str | None:
    """Why a schedule cannot be evaluated with the same bits on every device; None if it can."""
    inner = schedule.innermost if isinstance(schedule, WarmUp) else schedule
    if not isinstance(inner, Schedule):
        return f"{inner!r} is a function"
    for _, kind, *_, exponent in schedule.pieces:
        if kind == POWER and not exponent.is_integer():
            return f"its power {exponent / 2:g} is not a multiple of 0.5"
    return None


class DeviceSchedules:
    """The schedules of some groups on one device.

    Args:
        schedules: one for each group.
        count: the number of steps so far.
        device: where the kernels read them.
        backend: which evaluates them.
    """

    def __init__(self, schedules: list[Schedule], count: int, device: torch.device, backend: backends.Backend) -> None:
        self.schedules = schedules
        self.backend = backend
        self.device = device
        self.values = torch.empty((2, len(schedules)), dtype=torch.float64, device=device)  # counts, learning rates
        self.lrs = list(self.values[1].unbind())
        begins, rows = [], []
        for schedule in schedules:
            begins.append(float(len(schedules) + len(rows)))
            rows += [float(len(schedule.pieces)), *(number for piece in schedule.pieces for number in piece)]
        self.table = torch.tensor(begins + rows, dtype=torch.float64, device=device)
        self.streams = Streams()
        self.set_count(count)

    @property
    def count(self) -> int:
        """The number of steps so far; waits for the device."""
        return int(self.values[0, 0].item())

    def set_count(self, count: int) -> None:
        """Go on as if ``count`` steps had been done, in place: a captured CUDA graph goes on from there too."""
        counts = [float(count)] * len(self.schedules)
        rates = [schedule(count) for schedule in self.schedules]
        self.values.copy_(torch.tensor([counts, rates], dtype=torch.float64, device="cpu"))


def device_of(group: Group) -> torch.device:
    """Where the learning rate of a group is read: the first GPU of its parameters, else the host."""
    return next((param.device for param in group["params"] if param.is_cuda), torch.device("cpu"))


class LearningRates:
    """All learning rates of an optimizer that follow schedules.

    A group follows a schedule while its ``lr`` is the tensor that was put there; the user may replace that by a number.

    Args:
        choice: the backend that was asked for.
    """

    def __init__(self, choice: str) -> None:
        self.choice = choice
        self.parts: list[DeviceSchedules] = []
        self.followed_by: dict[int, tuple[Tensor, Schedule, DeviceSchedules]] = {}  # of each learning rate, by its id
        self.graphs = Graphs()

    def __getstate__(self) -> dict[str, Any]:
        followed = [(lr, schedule) for lr, schedule, _ in self.followed_by.values()]
        return {"choice": self.choice, "count": self.count, "followed": followed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["choice"])
        self._copied = state["count"], state["followed"]

    def renew(self, groups: list[Group]) -> None:
        """Make memory for a copy of the groups, if this is the copy that came with it."""
        count, followed = self.__dict__.pop("_copied", (0, ()))
        by_id = {id(lr): schedule for lr, schedule in followed}
        self._add([(group, by_id[id(group["lr"])]) for group in groups if id(group["lr"]) in by_id], count)

    def _add(self, pairs: list[tuple[Group, Schedule]], count: int) -> None:
        by_device: dict[torch.device, list[tuple[Group, Schedule]]] = {}
        for group, schedule in pairs:
            by_device.setdefault(device_of(group), []).append((group, schedule))
        for device in by_device:
            refuse_capture(device, "a learning rate began to follow a schedule")
        for device, members in by_device.items():
            backend = backends.BACKENDS.get(self.choice)
            if backend is None or backend.reasons(device, torch.float64):
                backend = backends.select("auto", device, torch.float64)
            part = DeviceSchedules([schedule for _, schedule in members], count, device, backend)
            for (group, schedule), lr in zip(members, part.lrs, strict=True):
                group["lr"] = lr
                self.followed_by[id(lr)] = lr, schedule, part
            self.parts.append(part)

    def follow(self, groups: list[Group], most_steps: Callable[[], int]) -> None:
        """Let the learning rates that are schedules follow them, from the number of steps so far on.

        ``most_steps``: the largest number of steps of a parameter, which is all that was counted if none did so before.
        """
        pairs = [(group, group["lr"]) for group in groups if isinstance(group["lr"], Schedule)]
        for group, _ in pairs:
            at_the_beginning(group)  # raises
        if pairs:
            self._add(pairs, self.count if self.parts else most_steps())

    def followers(self, groups: list[Group]) -> Iterator[tuple[Group, Schedule, DeviceSchedules]]:
        """The groups that follow a schedule, with it and where it is evaluated."""
        if not self.followed_by:
            return
        for group in groups:
            if id(group["lr"]) in self.followed_by:
                _, schedule, part = self.followed_by[id(group["lr"])]
                yield group, schedule, part

    def begin_step(self, groups: list[Group], most_steps: Callable[[], int]) -> None:
        """`follow` what the user has set since; raise RuntimeError if a group has a torch scheduler besides."""
        for group in groups:
            if isinstance(group["lr"], Schedule):
                self.follow(groups, most_steps)
                break
        for group, schedule, _ in self.followers(groups):
            if "initial_lr" in group:  # which they put there
                raise RuntimeError(
                    f"the learning rate follows {schedule!r} by itself, and a torch scheduler was made for the same "
                    "group: either give the optimizer a number as lr, or make no scheduler"
                )

    def move_schedules(self, groups: list[Group]) -> None:
        """Go where the parameters are, which may have moved to another device."""
        found = list(self.followers(groups))
        moved = [(group, schedule) for group, schedule, part in found if part.device != device_of(group)]
        if moved:
            self._add(moved, self.count)
            used = {id(part) for _, _, part in self.followers(groups)}
            self.parts = [part for part in self.parts if id(part) in used]
            self.followed_by = {key: entry for key, entry in self.followed_by.items() if id(entry[2]) in used}

    def end_step(self, found_inf: Tensor | None) -> int:
        """Count a step, unless it was skipped, and go on to the next learning rates; returns the kernel calls."""
        calls = 0
        for part in self.parts:
            part.streams.use(part.device, (part.values, part.table))
            self.graphs.keep(part.device, part, found_inf)
            calls += part.backend.advance_schedules(part, found_inf)
        return calls

    @property
    def count(self) -> int | None:
        """The number of steps so far; None if no learning rate follows a schedule."""
        return self.parts[0].count if self.parts else None

    @count.setter
    def count(self, count: int) -> None:
        count = check_steps("schedule_step", count)
        for part in self.parts:
            part.set_count(count)

    def write_numbers(self, groups: list[Group], packed: list[Group], most_steps: Callable[[], int]) -> None:
        """Put numbers in the place of the learning rates that follow schedules, as a torch class would have them."""
        self.follow(groups, most_steps)
        steps = most_steps() if self.parts else 0
        for group, row in zip(groups, packed, strict=True):
            for _, _, part in self.followers([group]):
                row["lr"] = float(group["lr"])
                row[COUNT], row[STEPS] = part.count, steps

    def followed(self, groups: list[Group]) -> list[Tensor | None]:
        """For each group its learning rate, if that follows a schedule."""
        return [next((group["lr"] for _ in self.followers([group])), None) for group in groups]

    def read_numbers(self, groups: list[Group], followed: list[Tensor | None], most_steps: Callable[[], int]) -> None:
        """Undo `write_numbers` in loaded groups, which follow the schedules that they followed before.

        ``most_steps``: the largest number of steps of a parameter, which is all that a torch class counts: one that
        took the state over has added its own steps to that, and carried the count along as it was.
        """
        counts = [(group.pop(COUNT, None), group.pop(STEPS, None)) for group in groups]
        for group, lr in zip(groups, followed, strict=True):
            if lr is not None:
                group["lr"] = lr
                group.pop("initial_lr", None)  # of a torch scheduler that is no more
        if self.parts:
            steps = most_steps()
            written = [
                max(count, steps) if before is None else count + max(steps - before, 0)
                for count, before in counts
                if count is not None
            ]
            self.count = max(written, default=steps)
