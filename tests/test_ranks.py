"""Four processes and their parts of tensors, on meshes of two, three and four of them: one start for all of it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

dist = pytest.importorskip("torch.distributed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

import ranks  # noqa: E402
import ranks_elementwise  # noqa: E402, F401 - whose scenarios are run
import ranks_wrapped  # noqa: E402, F401 - and those of torch's wrappers


def results_of(script, folder):
    """What each scenario of a script ended with."""
    command = [sys.executable, "-W", "error::UserWarning:fusedstep", script, folder]
    # Each process has little to compute, and all of them share the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(folder / "log", "w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = first.wait(timeout=400)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)  # its forks too
            first.wait()
    if code:
        print((folder / "log").read_text())
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(Path(ranks.__file__).with_name("ranks_main.py"), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ranks.SCENARIOS)
def test_ranks(name, results):
    failed = results.get(name, "not run, because an earlier scenario failed")
    assert not failed, failed


def test_there_are_processes(results):
    assert results.keys() == ranks.SCENARIOS.keys()
    assert torch.Size(ranks.MESHES["FSDP and TP"][0]).numel() == ranks.SIZE
