"""What the tests of a GPU share: where they run, and how a step is captured.

With FUSEDSTEP_GPU_DRY=1 they run on the CPU, with its engine in the place of the kernels, as far as they need no CUDA:
`make gpu-dry` so finds the mistakes of tests, not of kernels.
"""

import contextlib
import os
import warnings

import pytest
import torch

DRY = os.environ.get("FUSEDSTEP_GPU_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda"
# Where a GPU is there to be tested, a test that cannot run is a failure.
REQUIRED = os.environ.get("FUSEDSTEP_REQUIRE_GPU") == "1"

needs_cuda = pytest.mark.skipif(DRY, reason="a dry run has no streams, graphs and device memory")


def running(name):
    """The backend under test for an engine on a GPU; the test ends if it cannot run."""
    from fusedstep.backends import BACKENDS

    name = "cpu" if DRY else name
    reasons = BACKENDS[name].reasons(torch.device(DEVICE))
    if reasons:
        (pytest.fail if REQUIRED else pytest.skip)("; ".join(reasons))
    return name


def on_device(values, dtype=torch.float32):
    return [v.to(DEVICE, dtype) for v in values]


def warmed_up(step):
    """Call ``step`` on another stream, as has to be done before it is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)


def captured(step):
    """The CUDA graph of a call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@contextlib.contextmanager
def no_waiting():
    """Whatever waits for the device raises."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
