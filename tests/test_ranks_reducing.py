"""Rules that reduce, in four processes that have parts of tensors: one start for all of it."""

from pathlib import Path

import pytest
from test_ranks import results_of

ranks_reducing = pytest.importorskip("ranks_reducing")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(Path(ranks_reducing.__file__), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ranks_reducing.SCENARIOS)
def test_ranks(name, results):
    failed = results.get(name, "not run, because an earlier scenario failed")
    assert not failed, failed


def test_no_scenario_is_left_out(results):
    assert results.keys() == ranks_reducing.SCENARIOS.keys()
