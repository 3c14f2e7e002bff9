"""`make bench-check`: rows of two runs are matched by name, ratios compared, and only runs that can be compared are."""

import copy
import json

import pytest
from fusedstep.bench import compare, results

DEVICE = {"type": "cpu", "cpu": "Processor", "threads": 2, "instruction_set": "AVX2", "cpu_isa": "v3"}


def row(contender="fusedstep cpu", ours=True, status="ok", speedup=2.0, warm=4.0, case="50M"):
    return {
        **{"optimizer": "AdamW", "case": case, "dtype": "fp32", "threads": 2, "contender": contender},
        **{"ours": ours, "status": status, "speedup": speedup, "warm_speedup": warm},
    }


def run(*rows, created="2026-01-01T00:00:00+00:00", command="fusedstep bench", **device):
    return {
        **{"schema": results.SCHEMA, "created": created, "command": command},
        **{"device": {**DEVICE, **device}, "rows": list(rows)},
    }


def test_a_row_fell_if_its_ratio_is_below_the_tolerance():
    before = run(row(), row("torch fused", ours=False, speedup=1.0), row(case="gpt2", warm=None))
    after = run(row(speedup=1.91, warm=3.7), row("torch fused", ours=False, speedup=0.1), row(case="gpt2", warm=9.0))
    found = list(compare.changes(before, after))
    assert [(c.case, c.caches, c.before, c.after) for c in found] == [
        ("50M", "flushed", 2.0, 1.91),
        ("50M", "warm", 4.0, 3.7),
        ("gpt2", "flushed", 2.0, 2.0),
    ]
    assert [c.fell(0.05) for c in found] == [False, True, False]
    assert [c.fell(0.01) for c in found] == [True, True, False]


@pytest.mark.parametrize("after", [run(), run(row(status="wrong"))], ids=["missing", "wrong"])
def test_a_row_that_is_missing_or_wrong_fell(after, capsys):
    assert compare.report(list(compare.changes(run(row()), after)), 0.05) == 1
    assert capsys.readouterr().out.count("missing or wrong") == 2


@pytest.mark.parametrize("key", ["cpu", "threads", "instruction_set", "cpu_isa"])
def test_runs_of_different_machines_are_not_compared(key):
    with pytest.raises(ValueError, match=f"cannot be compared: {key} is"):
        list(compare.changes(run(row()), run(row(), **{key: "another"})))


def test_two_files_are_compared(tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, speedup in zip(files, (2.0, 1.0), strict=True):
        file.write_text(json.dumps(run(row(speedup=speedup))))
    assert compare.main([*map(str, files)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "fell: AdamW, 50M, fp32, 2 threads, fusedstep cpu, caches flushed: 2.00x -> 1.00x",
        "2 ratios compared, 1 fell by more than 5%",
    ]
    assert compare.main([str(files[1]), str(files[0])]) == 0


def test_what_is_committed_of_this_processor_is_measured_again(tmp_path, monkeypatch, capsys):
    runs = {
        "old": run(row(speedup=9.0), created="2025-01-01T00:00:00+00:00"),
        "new": run(row(), created="2026-01-01T00:00:00+00:00"),
        "other": run(row(), command="fusedstep bench --precision"),
        "elsewhere": run(row(speedup=9.0), cpu="another", command="fusedstep bench --quick"),
    }
    for name, content in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    measured = []

    def main(arguments):
        *words, flag, folder = arguments
        measured.append(words)
        assert flag == "--output"
        (results.Path(folder) / "result.json").write_text(json.dumps(run(row(speedup=1.0 if words else 2.0))))
        return 0

    monkeypatch.setattr(results, "device_facts", lambda device: copy.copy(DEVICE))
    monkeypatch.setattr(compare.suite, "main", main)
    assert compare.main(["--results", str(tmp_path)]) == 1
    assert sorted(measured) == [[], ["--precision"]]
    assert capsys.readouterr().out.splitlines()[-1] == "4 ratios compared, 1 fell by more than 5%"

    monkeypatch.setattr(compare.suite, "main", lambda arguments: 1)
    assert compare.main(["--results", str(tmp_path)]) == 2
    assert "ended with 1" in capsys.readouterr().err


def test_a_processor_without_results_is_said(tmp_path, capsys):
    assert compare.main(["--results", str(tmp_path)]) == 2
    assert "has no results of this processor" in capsys.readouterr().out


def test_one_file_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "one.json")])
