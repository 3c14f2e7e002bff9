"""What the demos' commands have in common: the type of an option, and bars that show how far they are."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence


def positive(value: str) -> int:
    """An option's number, 1 or larger."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or larger")
    return number


@contextlib.contextmanager
def progress(names: Sequence[str], total: int, wanted: bool) -> Iterator[Callable[[str, int, str], None]]:
    """``report(name, done, found)`` tells how far a run is and what it found; bars on a terminal's standard error."""
    if not wanted:
        yield lambda name, done, found: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[found]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {name: bars.add_task(name, total=total, found="", start=False) for name in names}

        def report(name: str, done: int, found: str) -> None:
            if done == 1:
                bars.start_task(tasks[name])
            bars.update(tasks[name], completed=done, found=found)

        yield report
