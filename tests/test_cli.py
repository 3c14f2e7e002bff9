"""The command line: what is printed, and the exit codes."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fusedstep
from fusedstep import backends, cli, verification

INSTALL = "pip install 'fusedstep[bench]'"


def test_info_says_what_can_run_and_why_not(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in (fusedstep.__version__, torch.__version__, "CPU engine", "CUDA engine", "instruction set"):
        assert expected in text
    lines = [line.strip() for line in text.splitlines()]
    assert any(line.startswith("cpu ") and line.endswith("can run (default)") for line in lines)
    for name, backend in backends.BACKENDS.items():
        for reason in backend.reasons(torch.device("cpu")):
            assert any(line.startswith(name) and reason in line for line in lines)
    assert "\x1b" not in text  # plain, so that it can be pasted


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "cpu", "gpus", "extension", "backends", "choice", "default"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert list(found["backends"]["cpu"]) == list(backends.BACKENDS)
    assert found["backends"]["cpu"]["cpu"] == []
    assert found["default"]["cpu"] == "cpu"
    assert found["extension"]["cpu_isa"] in found["extension"]["cpu_isas"]


def run_info(isa):
    command = [sys.executable, "-m", "fusedstep.cli", "info", "--json"]
    environ = {**os.environ, "FUSEDSTEP_ISA": isa}
    return json.loads(subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("isa", ["", *fusedstep._C.cpu_isas()])
def test_the_environment_names_the_instruction_set(isa):
    assert run_info(isa)["extension"]["cpu_isa"] == (isa or fusedstep._C.cpu_isas()[-1])


def test_an_instruction_set_that_is_none_is_an_error_that_names_it():
    error = run_info("v9")["extension"]["error"]
    assert "FUSEDSTEP_ISA: instruction set 'v9' is not available on this processor; available: " in error


def test_info_works_without_rich_and_without_the_extension(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "fusedstep._C", None)
    monkeypatch.delattr(fusedstep, "_C", raising=False)
    assert cli.main(["info"]) == 0
    assert "cannot be imported" in capsys.readouterr().out


def test_info_shows_the_choice_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("FUSEDSTEP_BACKEND", "reference")
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["choice"], found["default"]["cpu"]) == ("reference", "reference")


def test_info_reports_a_bad_choice_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("FUSEDSTEP_BACKEND", "nope")
    assert cli.main(["info"]) == 0
    assert "Invalid FUSEDSTEP_BACKEND: 'nope'" in capsys.readouterr().out


def test_info_lists_the_kernels_of_the_cuda_engine(capsys):
    assert cli.main(["info", "--kernels", "--json"]) == 0
    found = {row["format"]: row for row in json.loads(capsys.readouterr().out)}
    assert "adam (exp_avg, exp_avg_sq)" in found["split, 8-bit states"]["rules"]
    assert "amos (exp_avg_sq, decay)" in found["bf16"]["with_averages_and_copies"]
    assert "amos (exp_avg_sq, decay)" not in found["kahan"]["rules"]
    assert "accumulate" in found["fp32, bf16 gradients"]["rules"]
    assert found["fp32"]["rules"] == found["bf16"]["rules"]
    assert len(found["fp32"]["rules"]) == 15
    assert cli.main(["info", "--kernels"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in found)
    assert "every rule" in text


def test_info_describes_gpus():
    found = cli.info()
    found["versions"] = {**found["versions"], "cuda": "13.0"}
    found["gpus"] = [{"index": 0, "name": "A GPU", "compute_capability": "9.0", "memory_bytes": 80 * 2**30}]
    found["extension"] = {**found["extension"], "with_cuda": True, "cuda_archs": [80, 90]}
    text = cli.info_text(found)
    assert "A GPU, compute capability 9.0, 80 GiB" in text
    assert "compiled for sm_80, sm_90" in text
    assert "13.0" in text


def test_verify_prints_a_table_and_succeeds(capsys):
    assert cli.main(["verify", "--optimizer", "SGD", "--dtype", "fp32", "--backend", "cpu", "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "rows as they should be" in text
    assert "WRONG" not in text


def test_verify_as_json_needs_no_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    words = ["--optimizer", "AdamW", "--dtype", "bf16", "--backend", "cpu", "--steps", "1", "--json"]
    assert cli.main(["verify", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["rows"]


def test_verify_fails_if_a_result_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(verification, "same_bits", lambda a, b: False)
    assert cli.main(["verify", "--optimizer", "SGD", "--dtype", "fp32", "--backend", "cpu", "--steps", "1"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_verify_refuses_an_unknown_optimizer(capsys):
    assert cli.main(["verify", "--optimizer", "Nope"]) == 2
    assert "AdamW" in capsys.readouterr().err


def test_bench_runs_through(capsys):
    words = ["--optimizer", "AdamW", "--case", "1000x16", "--dtype", "fp32", "--device", "cpu", "--check-only"]
    assert cli.main(["bench", *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert any(row["ours"] and row["status"] == "ok" for row in rows)


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_without_rich_one_line_says_what_to_install(capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main([command]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rich" in captured.err
    assert INSTALL in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("words", [["--help"], ["info", "--help"], ["verify", "--help"], ["bench", "--help"]])
def test_help(capsys, words):
    assert cli.main(words) == 0
    assert "usage: fusedstep" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["nope"], ["info", "--nope"]])
def test_what_it_does_not_understand_gets_the_usage(capsys, words):
    assert cli.main(words) == 2
    assert "usage: fusedstep" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"fusedstep {fusedstep.__version__}"


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "fusedstep.cli", "info", "--json"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "versions" in json.loads(result.stdout)
