"""The README's Python examples run as they stand, and what it names exists."""

import re
from pathlib import Path

import pytest

import fusedstep

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_examples():
    assert BLOCKS


@pytest.mark.parametrize("code", BLOCKS)
def test_example_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_every_optimizer_is_in_the_table():
    table = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    classes = {name: getattr(fusedstep, name) for name in fusedstep.__all__}
    exported = {n for n, c in classes.items() if isinstance(c, type) and issubclass(c, fusedstep.FusedOptimizer)}
    assert table == exported - {"FusedOptimizer"}
