"""Four processes that do not wait for the numbers they share: one start for all of it."""

from pathlib import Path

import pytest
from host_plan import reducing_library
from test_ranks import results_of

ranks_device = pytest.importorskip("ranks_device")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    reducing_library()  # compiled before anybody waits for it
    return results_of(Path(ranks_device.__file__), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ranks_device.SCENARIOS)
def test_ranks(name, results):
    failed = results.get(name, "not run, because an earlier scenario failed")
    assert not failed, failed


def test_no_scenario_is_left_out(results):
    assert results.keys() == ranks_device.SCENARIOS.keys()
