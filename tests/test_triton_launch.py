"""The host's part of a Triton launch, on the installed Triton: what it costs, what it is given, where it goes."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def launches(what):
    """What triton_launches.py prints, which needs a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_launches.py")
    done = subprocess.run(
        [sys.executable, str(script), what], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_compiled_or_looked_up_again_from_step_to_step():
    found = launches("twenty_steps")
    assert set(found) == {"AdamW", "SGD", "TorchAdafactor"}
    for name, steps in found.items():
        assert steps["loaded"][0] > 0
        assert steps["loaded"][1:] == [0] * 19, name
        update = ["sums_kernel", "update_kernel", "apply_kernel"] if name == "TorchAdafactor" else ["step_kernel"]
        assert steps["launched"] == [["norm_kernel", *update]] * 20
        assert steps["looked_up"][1:] == [0] * 19, name


def test_every_launch_is_given_the_memory_of_its_plan():
    assert launches("arguments") == [True] * 6


def test_a_launch_costs_less_than_half_of_tritons_own():
    cost = launches("cost")
    assert cost["ours"]["least"] < cost["triton's"]["least"] / 2, cost
    # All of a step is six such launches long; if Triton launched it, it would be nine long or more. What Triton's own
    # takes is no measure of it: that depends on Triton's version, and on how many constants the kernel has.
    assert cost["step"]["least"] < 8 * cost["ours"]["least"], cost


class Kernel:
    """In the place of one that the interpreter runs."""

    arg_names = ("a", "n", "BLOCK")

    def __init__(self, note):
        self.note = note

    def __getitem__(self, grid):
        return lambda *args, **constants: self.note((grid, args, constants))


@pytest.mark.parametrize("index", [0, 1])
def test_a_launch_goes_to_the_device_of_the_parameters(monkeypatch, index):
    from fusedstep.triton_kernels.launching import Prepared

    seen, current = [], [0]

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = Prepared(Kernel(lambda launch: seen.append((current[0], launch))), {"BLOCK": 8}, num_warps=2)
    kernel(torch.device("cuda", index), 3, "memory", 7)
    options = {"BLOCK": 8, "num_warps": 2, "enable_fp_fusion": False}
    assert seen == [(index, ((3,), ("memory", 7), options))]
    assert current == [0]
