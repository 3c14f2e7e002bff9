"""Four processes and their parts of tensors, on meshes of two, three and four of them: one start for all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

dist = pytest.importorskip("torch.distributed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

import ranks  # noqa: E402
import ranks_wrapped  # noqa: E402, F401 - whose scenarios it adds to the others


def results_of(script, folder):
    """What each scenario of a script ended with, in as many processes as it asks for."""
    command = [sys.executable, "-W", "error::UserWarning:fusedstep", script]
    # Each process has little to compute, and all of them share the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(folder / "log", "w") as log:
        started = [
            subprocess.Popen([*command, str(rank), str(ranks.SIZE), folder], stdout=log, stderr=log, env=environment)
            for rank in range(ranks.SIZE)
        ]
        try:
            codes = [process.wait(timeout=400) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
    if not all(code == 0 for code in codes):
        print((folder / "log").read_text())
    assert (folder / "results.json").exists(), codes
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
