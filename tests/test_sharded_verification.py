"""`fusedstep verify --distributed N`: what it compares, what it prints, and what it refuses."""

import json
import sys

import pytest
import torch

from fusedstep import cli, sharded_verification
from fusedstep.cases import Case
from fusedstep.sharded_comparison import MODEL, SAVED, Comparison, Configuration, ways

dist = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ADAMW = Case("AdamW", {"lr": 0.1})


def test_two_processes_are_compared_with_one(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    words = [
        "--distributed",
        "2",
        "--optimizer",
        "Lion",
        "--optimizer",
        "TorchAdafactor",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--json",
    ]
    assert cli.main(["verify", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert (found["processes"], found["device"], found["communication"]) == (2, "cpu", "gloo")
    rows = {row["case"]: row for row in found["rows"]}
    assert len(rows) == len(sharded_verification.configurations(["Lion", "TorchAdafactor"]))
    assert all(any(what in case for case in rows) for what in ("8bit", "stochastic", "max_grad_norm", SAVED, MODEL))
    assert all(row["tensors"] > 0 and (row["exact"] <= (row["different"] == 0)) for row in rows.values())


@pytest.fixture(params=[2, 4])
def processes(request):
    """The first of some processes, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def test_a_wrong_part_is_found(processes):
    comparison = Comparison(Configuration(ADAMW), torch.device("cpu"), "cpu", processes, "")
    comparison.step(odd=False)
    tensors, *found = comparison._compared()
    assert tensors == 4 * len(comparison.parts)
    assert found == [0, 0.0]
    part = comparison.parts[0].to_local().detach()
    largest = part.abs().max().item()
    part.view(-1)[part.abs().argmin()] += 1e-3 * largest
    tensors, different, largest = comparison._compared()
    assert different == 1
    assert largest == pytest.approx(1e-3, rel=1e-3)
    comparison.mine.state[comparison.parts[1]]["exp_avg"].to_local().fill_(torch.nan)
    assert comparison._compared()[1:] == (2, torch.inf)


def test_every_way_to_share_out_is_tried(processes):
    found = ways(processes, "cpu")
    placements = {str(placement) for _, _, some in found for placement in some}
    assert {"S(0)", "S(1)", "R"} <= placements or {"Shard(dim=0)", "Shard(dim=1)", "Replicate()"} <= placements
    assert any(mesh is None for _, mesh, _ in found)
    assert any(mesh is not None and mesh.ndim == 2 for _, mesh, _ in found) == (processes == 4)


@pytest.mark.parametrize(
    ("words", "expected"),
    {
        "1": "2 or larger",
        "0": "2 or larger",
        "1000": "at most",
        "2 --dtype fp32": "--dtype does not go with",
        "2 --backend cpu --backend reference": "one --backend",
        "2 --backend nope": "Invalid backend: 'nope'",
        "2 --optimizer Nope": "AdamW",
        "2 --steps 0": "Invalid steps: 0",
        "2 --device meta": "it must be cpu or cuda",
        "64 --device cuda": "each needs a GPU",
    }.items(),
)
def test_what_makes_no_sense_is_refused_in_one_line(words, expected, capsys):
    assert cli.main(["verify", "--distributed", *words.split()]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("is_missing", ["is_available", "is_gloo_available"])
def test_a_torch_without_communication_is_an_error(is_missing, capsys, monkeypatch):
    monkeypatch.setattr(dist, is_missing, lambda: False)
    assert cli.main(["verify", "--distributed", "2", "--device", "cpu"]) == 2
    assert "built without" in capsys.readouterr().err


def test_a_process_that_fails_is_a_row_that_is_wrong(capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError(
            "-- Process 1 terminated with the following error:\nTraceback ...\nValueError: no such thing"
        )

    monkeypatch.setattr(torch.multiprocessing, "spawn", fail)
    assert cli.main(["verify", "--distributed", "2", "--device", "cpu", "--optimizer", "Lion"]) == 1
    text = capsys.readouterr().out
    assert "WRONG" in text
    assert "0 of 1 rows as they should be" in text
    assert cli.main(["verify", "--distributed", "2", "--device", "cpu", "--optimizer", "Lion", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["error"] == "ValueError: no such thing"
