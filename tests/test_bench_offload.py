"""The benchmark of offloaded weights: it counts bytes, refuses to time what is wrong, and prints what it wrote."""

import json

import pytest
import torch
from fusedstep.bench import offload

import fusedstep

dist = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch):
    def once(samplers, seconds):
        assert all(sampler()["step"] > 0 for sampler in samplers.values())
        return {name: {"step": [1e-3]} for name in samplers}

    monkeypatch.setattr(offload, "gpt2", lambda layers: [(8, 16), (5,), (3, 7)][:layers])
    monkeypatch.setattr(offload, "interleaved", once)
    monkeypatch.setattr("fusedstep.bench.timing.cache_bytes", lambda device: 1 << 12)


def test_it_measures_and_prints(tmp_path, capsys):
    assert offload.main(["--layers", "3", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-offload-*.jsonl")
    header, *rows = map(json.loads, path.read_text().splitlines())
    assert header["command"].startswith("python -m fusedstep.bench.offload --layers 3")
    found = {(row["contender"], row["dtype"]): (row["kept"], row["moved"]) for row in rows}
    assert found.keys() == {(name, str(dtype).removeprefix("torch.")) for name, dtype in offload.CONTENDERS}
    assert found["torch fused", "float32"] == found["fusedstep", "float32"] == (12, 28)
    assert found[offload.SPLIT, "bfloat16"] == (8, 18)
    assert all(row["elements"] == 8 * 16 + 5 + 3 * 7 for row in rows)
    printed = capsys.readouterr().out
    assert f"| {offload.SPLIT} | bf16 | 8.0 | 18.0 | 1.00 | 0.0 | 1.00x |" in printed
    assert offload.main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == offload.text([str(path)])
    assert offload.text([str(path)]) in printed


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    name, dtype = offload.SPLIT, torch.bfloat16
    wrong = (lambda params, lr: fusedstep.AdamW(params, lr=2 * lr, master_weights="split"), False)
    monkeypatch.setitem(offload.CONTENDERS, (name, dtype), wrong)
    assert offload.main(["--layers", "1", "--output", str(tmp_path)]) == 2
    assert f"{name} is " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_file_is_refused(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    for given in (path, tmp_path / "none.jsonl"):
        assert offload.main([str(given)]) == 2
        assert "is no results file of fusedstep.bench.offload" in capsys.readouterr().err
