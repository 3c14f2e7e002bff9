"""Every test starts from the same seed, and uninitialised memory is full of NaN; what runs on a GPU."""

import gc
import json
import os

import pytest
import torch
from on_gpu import DRY, REQUIRED, running

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


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """For little work a second one only adds waiting, above all where tests run side by side.

    What several threads do is the subject of tests that ask for them.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _what_is_imported_stays():
    """The cycle collector need not look through all modules and test items again and again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch):
    """Backends are chosen anew, and warn anew of what they cannot do: not as another test has left them."""
    monkeypatch.delenv("FUSEDSTEP_BACKEND", raising=False)
    monkeypatch.setattr("fusedstep.backends._selected", {})


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """Backends that run everywhere and work on CPU tensors."""
    return request.param


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
    from host_plan import run_on_the_host

    run_on_the_host(monkeypatch)
    return "cpu"


ENGINES = [
    pytest.param("cuda", marks=pytest.mark.cuda_engine),
    pytest.param("triton", marks=pytest.mark.triton_engine),
]


@pytest.fixture(params=ENGINES)
def kernel(request):
    """The backends that run on a GPU."""
    return running(request.param)


def once_on_the_reference(items):
    """The items without those that show the same on the reference once more.

    All that surrounds a plan is one text for the engines and the reference, and is shown with all values on an engine:
    on the reference a module shows it once. A plan of the reference is another one than that of an engine: a module
    marked ``plans``, which is about what a plan itself does, shows each function's statement on it once.
    What the reference does by itself is the subject of tests that list backends themselves: all of those stay.
    """
    kept, seen = [], set()
    for item in reversed(items):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        listed = " ".join(str(mark.args[0]) for mark in item.iter_markers("parametrize"))
        if any(value == "reference" and name not in listed for name, value in params.items() if isinstance(value, str)):
            shown = item.path, item.get_closest_marker("plans") and item.originalname
            if shown in seen:
                continue
            seen.add(shown)
        kept.append(item)
    return kept[::-1]


def pytest_collection_modifyitems(config, items):
    from kinds import ALL  # which imports the package, and so Triton

    if not ALL:
        kept = once_on_the_reference(items)
        config.hook.pytest_deselected(items=[*{*items} - {*kept}])
        items[:] = kept
    if REQUIRED or DRY or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no GPU to be seen"))


def pytest_runtest_logreport(report):
    """Append each result to the file that FUSEDSTEP_TEST_RESULTS names, at once: a run that is stopped keeps them."""
    path = os.environ.get("FUSEDSTEP_TEST_RESULTS")
    if not path or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if not report.passed:
        row["why"] = report.longreprtext[-3000:] if report.failed else report.longrepr[-1]
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
