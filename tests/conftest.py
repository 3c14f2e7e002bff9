"""Every test starts from the same seed, and uninitialised memory is full of NaN."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products need it to be deterministic


@pytest.fixture(autouse=True)
def _same_numbers_and_no_lucky_zeros():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """For little work a second one only adds waiting, above all where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch):
    monkeypatch.delenv("FUSEDSTEP_BACKEND", raising=False)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """Backends that run everywhere and work on CPU tensors."""
    return request.param


@pytest.fixture(scope="session")
def elementwise_library(tmp_path_factory):
    """The elementwise CUDA kernels, compiled for the host."""
    from host_plan import built

    return built(tmp_path_factory.mktemp("cuda_host") / "engine.so", "library.cpp", "cuda_table.cpp")


@pytest.fixture(params=["cpu", "reference", "triton", "cuda on the host"])
def engine(request, monkeypatch):
    """The name of a backend for CPU tensors; each way there is to run an elementwise step without a GPU."""
    from fusedstep import backends

    if request.param == "triton":
        reasons = backends.BACKENDS["triton"].reasons(torch.device("cpu"))
        if reasons:
            pytest.skip("; ".join(reasons))
    if request.param != "cuda on the host":
        return request.param
    from host_plan import ElementwiseHostBackend, HostPlan

    monkeypatch.setattr(HostPlan, "library", request.getfixturevalue("elementwise_library"))
    monkeypatch.setitem(backends.BACKENDS, "cpu", ElementwiseHostBackend())
    monkeypatch.setattr(backends, "_selected", {})
    return "cpu"


def pytest_collection_modifyitems(items):
    from fusedstep.backends import BACKENDS

    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    reasons = BACKENDS["cuda"].reasons(torch.device("cuda")) if "cuda" in BACKENDS else ["there is no cuda backend"]
    for item in marked if reasons else ():
        item.add_marker(pytest.mark.skip(reason="; ".join(reasons)))
