"""`make gpu` without a GPU: time limits, results that survive, the report, and tests that must not be skipped."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def stages():
    spec = importlib.util.spec_from_file_location("gpu_stages", ROOT / "bench" / "gpu" / "stages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def run(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "DRY_PATIENCE", 1)
    return stages.Run(tmp_path, True, tmp_path / "gpu.tar.gz", sys.executable, None)


def stage(stages, *commands, seconds=20, name="first"):
    return stages.Stage(name, seconds, "", lambda run: [stages.Command(list(words), {}) for words in commands])


def test_a_stage_passes_if_all_of_its_commands_do(stages, run):
    row = stages.execute(stage(stages, ["echo", "one"], ["echo", "two"]), run)
    assert (row["outcome"], row["why"]) == ("passed", None)
    assert run.result("first.log").read_text() == "$ echo one\none\n$ echo two\ntwo\n"


def test_what_follows_a_failed_command_runs_all_the_same(stages, run):
    row = stages.execute(stage(stages, ["sh", "-c", "exit 3"], ["echo", "two"]), run)
    assert (row["outcome"], row["why"]) == ("failed", "exit status 3")
    assert "two" in run.result("first.log").read_text()


def test_nothing_that_a_stopped_stage_started_goes_on(stages, run, tmp_path):
    script = f"trap '' INT; sleep 60 & echo $! > {tmp_path}/pid; echo begun; wait"
    begin = time.monotonic()
    row = stages.execute(stage(stages, ["sh", "-c", script], seconds=1), run)
    assert row["outcome"] == "stopped"
    assert time.monotonic() - begin < 8
    assert "begun" in run.result("first.log").read_text()
    status = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/status")
    while status.exists() and "Z (zombie)" not in status.read_text():  # it was sent a signal that it has yet to meet
        assert time.monotonic() - begin < 30
        time.sleep(0.05)


def test_a_stage_that_is_stopped_may_write_its_results_first(stages, run, tmp_path):
    script = "trap 'echo written; exit 1' INT; echo begun; while :; do sleep 0.1; done"
    assert stages.execute(stage(stages, ["bash", "-c", script], seconds=2), run)["outcome"] == "stopped"
    assert run.result("first.log").read_text().endswith("written\n")


def test_a_long_log_keeps_its_beginning_and_its_end(stages, run, monkeypatch):
    monkeypatch.setattr(stages, "LOG_BYTES", 3000)
    stages.execute(stage(stages, ["seq", "10000"]), run)
    text = run.result("first.log").read_text()
    assert len(text) < 3100
    assert text.startswith("$ seq 10000\n1\n2\n")
    assert "left out" in text
    assert text.endswith("9999\n10000\n")


def test_the_archive_holds_everything_but_itself(stages, run):
    run.result("bench").mkdir()
    run.result("bench/results.json").write_text("{}")
    stages.execute(stage(stages, ["echo", "one"]), run)
    for _ in range(2):
        stages.archive(run)
    with tarfile.open(run.archive) as tar:
        assert sorted(tar.getnames()) == ["bench/results.json", "first.log"]


def test_the_report_has_failures_and_numbers_in_20_lines(stages, run):
    tests = [{"test": f"test_{i}", "outcome": "failed" if i < 5 else "passed"} for i in range(9)]
    number = {"ms": 1.5, "copy_share": 0.9}
    numbers = [
        {**number, "case": f"case {i}", "contender": name, "goal": i == 0}
        for i in range(30)
        for name in ("ours", "theirs")
    ]
    for name, rows in {
        "cuda.jsonl": tests,
        "first.jsonl": [{"copy_gb_per_s": 1.0}, *numbers],
        "stages.jsonl": [{"stage": "cuda", "outcome": "failed", "why": "exit status 1", "seconds": 44.4}],
    }.items():
        run.result(name).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut off')
    lines = stages.report(run)
    assert len(lines) == 20
    assert "cuda      failed (exit status 1), 44 s, 4 passed, 5 failed, 0 skipped" in lines
    assert "triton    not run, 0 s, 0 passed, 0 failed, 0 skipped" in lines
    assert [line for line in lines if line.startswith("FAILED")] == ["FAILED test_0", "FAILED test_1", "FAILED test_2"]
    assert "and 2 more" in lines
    assert "case 0, ms: ours 1.5 (90%); theirs 1.5 (90%), goal 97% of copy" in lines


def test_an_unknown_stage_is_named(stages, capsys):
    with pytest.raises(SystemExit):
        stages.main(["nope"])
    assert "there is no stage 'nope'; there are build, first" in capsys.readouterr().err


def test_all_stages_fit_into_12_minutes(stages):
    assert sum(stage.seconds for stage in stages.STAGES) <= 12 * 60


def test_the_makefile_has_every_stage(stages):
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("STAGES :="))
    assert line.split()[2:] == [stage.name for stage in stages.STAGES]


def test_a_backend_that_is_missing_where_a_gpu_is_to_be_tested_is_a_failure(tmp_path):
    """As a run without FUSEDSTEP_REQUIRE_GPU skips it; results are written as they come."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_cuda_chain.py"]
    words += ["-k", "does_not_wait"]
    for required, outcome, code in (("0", "skipped", 0), ("1", "failed", 1)):
        results = tmp_path / f"{required}.jsonl"
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "FUSEDSTEP_REQUIRE_GPU": required}
        environ.pop("PYTEST_XDIST_WORKER", None)  # this run's own
        environ |= {"FUSEDSTEP_TEST_RESULTS": str(results), "TRITON_INTERPRET": "1"}
        done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == code, done.stdout
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        assert [row["outcome"] for row in rows] == [outcome] * 2
        assert all(row["why"] for row in rows)


def test_the_main_numbers_in_a_dry_run(tmp_path):
    path = tmp_path / "first.jsonl"
    words = [sys.executable, "bench/gpu/first.py", str(path), "--dry", "--seconds", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    head, *rows, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["copy_gb_per_s"] > 0
    assert head["versions"]["torch"]
    assert {"fusedstep cpu", "torch fused", "torch foreach"} <= {row["contender"] for row in rows}
    assert not any("error" in row for row in rows)
    assert all(row["ms"] > 0 for row in rows)
    assert last["cases_left_out"] > 0
