"""The benchmark does what it says; no test here looks at how long anything took."""

import argparse
import json
import math
import subprocess
import sys

import pytest
import torch
from fusedstep.bench import (
    check,
    gpu_report,
    measurement,
    models,
    optimizers,
    peers,
    plot,
    precision,
    report,
    results,
    suite,
    timing,
)
from kinds import ALL

import fusedstep
from fusedstep.cases import PRECISION

CPU = torch.device("cpu")


def total(shapes):
    return len(shapes), sum(math.prod(shape) for shape in shapes)


@pytest.fixture(autouse=True, scope="module")
def _little_is_measured():
    """The times themselves are not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "cache_bytes", lambda device: 4 << 20)
        patch.setattr(timing, "WARM_STEPS", 1)
        patch.setattr(timing, "WARM_SAMPLES", 1)
        yield


def bench(*arguments, output=None):
    parser = argparse.ArgumentParser(prog="fusedstep bench")
    suite.add_arguments(parser)
    where = [] if output is None else ["--output", str(output)]
    return suite.run(parser.parse_args(["--device", "cpu", *arguments, *where]))


def optimizer_named(name):
    return next(optimizer for optimizer in optimizers.OPTIMIZERS if optimizer.name == name)


@pytest.mark.parametrize(
    ("shapes", "tensors", "elements"),
    [
        pytest.param(models.resnet50(), 161, 25_557_032, id="resnet50"),
        pytest.param(models.gpt2(), 148, 124_439_808, id="gpt2"),
        pytest.param(models.llama(), 291, 6_738_415_616, id="llama-7b"),
        pytest.param(models.llama_1b(), 201, 1_100_048_384, id="llama-1b"),
    ],
)
def test_parameter_lists_have_the_published_totals(shapes, tensors, elements):
    assert total(shapes) == (tensors, elements)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("1000x16", 1000, 16_000),
        ("1000x1024", 1000, 1_024_000),
        ("10000x64", 10_000, 640_000),
        ("50M", 1, 50_000_000),
        ("1000M", 1, 10**9),
        ("llama-1b", 18, 88_088_576),
        ("llama-7b", 73, 1_750_138_880),
    ],
)
def test_cases_have_the_totals_that_their_names_promise(name, tensors, elements):
    case = next(case for case in models.CASES if case.name == name)
    assert (case.tensors, case.elements) == (tensors, elements)


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    [("AdamW", 28, 14), ("AdamW-amsgrad", 36, 18), ("Adam", 28, 14), ("SGD", 12, 6), ("SGD-momentum", 20, 10)],
)
def test_bytes_per_parameter_are_the_least_that_the_algorithm_moves(name, fp32, bf16):
    optimizer = optimizer_named(name)
    assert optimizer.bytes_per_parameter(torch.float32) == fp32
    assert optimizer.bytes_per_parameter(torch.bfloat16) == bf16


def test_every_optimizer_is_measured_with_weight_decay_and_exists_in_fusedstep():
    for optimizer in optimizers.OPTIMIZERS:
        assert optimizer.options.keys() & {"weight_decay", "weight_decay_rate", "extra_l2"}, optimizer.name
        assert optimizer.our_class is not None, optimizer.name


def test_gradients_are_random_never_zero_and_the_same_in_every_run():
    params = check.make_parameters([(1000,), (3, 5)], torch.bfloat16, CPU)
    assert all((param.grad != 0).all() for param in params)
    assert params[0].grad.unique().numel() > 50
    assert (params[0].grad < 0).any()
    assert (params[0].grad > 0).any()
    before = params[0].grad.clone()
    params[0].grad.zero_()
    check.fill_grads(params)
    assert torch.equal(params[0].grad, before)


def dtypes_of(number, optimizer):
    """Those that it takes, one after the other from row to row."""
    taken = [(name, dtype) for name, dtype in measurement.DTYPES.items() if optimizer.takes(dtype)]
    return taken if ALL else [taken[number % len(taken)]]


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        pytest.param(optimizer, dtype, id=f"{optimizer.name}-{name}")
        for number, optimizer in enumerate(optimizers.OPTIMIZERS)
        for name, dtype in dtypes_of(number, optimizer)
    ],
)
def test_fusedstep_and_a_for_loop_pass_the_check_and_leave_the_gradients_alone(optimizer, dtype):
    shapes = [(1031,), (7, 9), (1,), *([(5000,)] if optimizer.precision else [])]  # large enough for 8 bits
    params = check.make_parameters(shapes, dtype, CPU)
    grads = [param.grad.clone() for param in params]
    start = [param.detach().clone() for param in params]
    right = check.expected(optimizer, params, dtype)
    tested = peers.contenders(optimizer, CPU, dtype, ["cpu", "reference"])
    if optimizer.torch_class is not None:
        tested = [contender for contender in tested if contender.ours or "loop" in contender.name]
        assert len(tested) == (5 if optimizer.precision else 3)
    for contender in tested:
        _, error = check.check(contender.build, params, start, right)
        assert error <= max(check.TOLERANCES[dtype], contender.tolerance or 0.0), contender.name
        assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True))


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.float32, {"weight_decay": 0.49}),
        (torch.float32, {"lr": 0.099}),
        (torch.float32, {"betas": (0.91, 0.95)}),
        (torch.float32, {"betas": (0.9, 0.94)}),
        (torch.float32, {"amsgrad": True}),
        (torch.bfloat16, {"weight_decay": 0.0}),
        (torch.bfloat16, {"lr": 0.09}),
        (torch.bfloat16, {"betas": (0.9, 0.8)}),
    ],
    ids=str,
)
def test_the_check_finds_an_option_that_is_ignored_or_wrong(dtype, change):
    optimizer = optimizer_named("AdamW")
    params = check.make_parameters([(4097,)], dtype, CPU)
    start = [param.detach().clone() for param in params]
    right = check.expected(optimizer, params, dtype)

    def build(params):
        return torch.optim.AdamW(params, **{**optimizer.options, **change})

    _, error = check.check(build, params, start, right)
    assert error > check.TOLERANCES[dtype]


def test_the_check_finds_one_element_that_was_not_written():
    before = torch.ones(10_000)
    right = before + 1
    wrong = right.clone()
    wrong[7_777] = before[7_777]
    assert check.error([right], [before], [right]) == 0
    assert check.error([wrong], [before], [right]) > 0.3
    wrong[7_777] = math.nan
    assert math.isnan(check.error([wrong], [before], [right]))


def test_contenders_take_turns():
    order = []

    def sampler(name):
        return lambda: order.append(name) or {"step": 1.0}

    samples = timing.interleaved({name: sampler(name) for name in "ABC"}, seconds=1.0, rounds=3)
    assert order[6:] == list("ABCABCABC")
    assert samples == {name: {"step": [1.0] * 3} for name in "ABC"}


def test_operators_are_counted_once_per_call():
    x = torch.ones(4)
    assert timing.operator_calls(lambda: x.add_(1).mul_(2)) == 2
    assert timing.operator_calls(lambda: torch._foreach_add_([x, x, x], 1)) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The content and the path of the results file of one small run."""
    folder = tmp_path_factory.mktemp("results")
    code = bench(
        "--optimizer", "adamw", "--optimizer", "sgd", "--case", "1000x16", "--rounds", "2", "--plot", output=folder
    )
    (path,) = folder.glob("*.json")
    return code, results.load(path), path


def test_a_run_measures_every_contender_and_succeeds(run):
    code, found, _ = run
    assert code == 0
    expected = {
        (o, d, c) for o in ("AdamW", "SGD") for d in measurement.DTYPES for c in (*report.TORCH, "fusedstep cpu")
    }
    rows = {(row["optimizer"], row["dtype"], row["contender"]): row for row in found["rows"]}
    assert expected <= set(rows)
    for key in expected:
        row = rows[key]
        if row["status"] == "ok":
            assert row["step_ms"]["rounds"] == 2
            assert 0 < row["step_ms"]["q25"] <= row["step_ms"]["median"] <= row["step_ms"]["q75"]
            assert row["host_us"]["median"] > 0
            assert row["host_fresh_us"]["median"] > 0
            assert row["warm_ms"]["median"] > 0
            assert row["speedup"] > 0
            assert row["gb_per_s"] > 0
            assert row["memory_share"] <= row["copy_share"]
        else:  # a version of torch may have a kernel that is wrong; ours may not
            assert not row["ours"]
            assert row["reason"]
    assert rows["AdamW", "fp32", "fusedstep cpu"]["calls"] == 1
    assert rows["AdamW", "fp32", "fusedstep cpu"]["calls_are"] == "engine calls"
    assert rows["AdamW", "fp32", "torch for-loop"]["calls"] > 1000
    assert rows["AdamW", "fp32", "torch fused"]["speedup"] == 1


def test_a_results_file_tells_what_was_run_where_and_with_what(run):
    _, found, path = run
    assert found["schema"] == results.SCHEMA
    assert found["command"] == (
        "fusedstep bench --optimizer AdamW --optimizer SGD --case 1000x16 --device cpu --rounds 2 --plot"
    )
    assert found["device"]["type"] == "cpu"
    assert found["device"]["cpu"]
    assert found["device"]["threads"] == torch.get_num_threads()
    assert set(found["versions"]) == {"python", "fusedstep", "torch", "cuda", "numpy", "triton"}
    assert found["versions"]["fusedstep"] == fusedstep.__version__
    assert set(found["git"]) == {"commit", "dirty"}
    assert set(found["peers"]) >= {"apex", "bitsandbytes"}
    keys = {
        *("optimizer", "case", "title", "dtype", "threads", "tensors", "elements", "contender", "ours", "status"),
        *("reason", "error", "tolerance", "bytes_per_parameter", *measurement.MEASURED),
    }
    assert all(set(row) == keys for row in found["rows"])
    assert path.name.startswith("cpu-")
    assert path.name.endswith(f"-adamw-sgd-{found['created'][:10]}.json")
    assert str(path.parent) not in path.read_text()


@pytest.mark.parametrize(
    ("name", "expected", "file"),
    [
        ("AMD EPYC", "AMD EPYC (family 25, model 1)", "cpu-amd-epyc-family-25-model-1-sgd-2026-01-31.json"),
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763 64-Core Processor", "cpu-amd-epyc-7763-sgd-2026-01-31.json"),
        (
            "Intel(R) Xeon(R) Processor @ 2.60GHz",
            "Intel(R) Xeon(R) Processor @ 2.60GHz (family 25, model 1)",
            "cpu-intel-xeon-family-25-model-1-sgd-2026-01-31.json",
        ),
    ],
)
def test_processors_whose_name_a_virtual_machine_hides_are_told_apart(name, expected, file, monkeypatch):
    text = f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: {name}\nstepping\t: 1\n" * 2
    monkeypatch.setattr(results.Path, "read_text", lambda path: text)
    assert results.cpu_model() == expected
    settings = {"all_optimizers": False, "optimizers": ["SGD"], "precision": False, "quick": False}
    found = {"device": {"type": "cpu", "cpu": expected}, "settings": settings, "created": "2026-01-31T00:00:00"}
    assert results.file_name(found) == file


def test_the_plot_is_written_beside_the_results(run, tmp_path):
    _, found, path = run
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    again = plot.draw(found, tmp_path / "folder" / "again.png", ["SGD"])
    assert again.stat().st_size > 1000


def test_the_report_is_a_markdown_table_of_the_medians(run):
    _, found, path = run
    text = report.markdown(found, ["AdamW"])
    lines = text.splitlines()
    assert lines[0].startswith("| AdamW | torch for-loop, ms |")
    assert len({line.count("|") for line in lines[:4]}) == 1
    row = next(
        r for r in found["rows"] if (r["optimizer"], r["dtype"], r["contender"]) == ("AdamW", "fp32", "torch fused")
    )
    assert lines[2].startswith("| 1,000 x 16, fp32 | ")
    assert f" {report.number(row['step_ms']['median'])} |" in lines[2]
    assert found["command"] in lines[-1]
    command = [sys.executable, "-m", "fusedstep.bench.report", str(path), "AdamW"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == text


def test_the_brief_report_has_a_line_for_each_optimizer_and_case(run):
    _, found, _ = run
    lines = report.markdown(found, brief=True).splitlines()
    ours = [row for row in found["rows"] if row["contender"] == "fusedstep cpu"]
    for row, line in zip(ours, lines[2:-2], strict=True):
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        assert len(cells) == lines[0].count("|") - 1
        assert cells[0] == row["optimizer"]
        assert cells[1].endswith(row["dtype"])
        assert cells[2] == row["baseline"]
        assert cells[4] == report.number(row["step_ms"]["median"])


@pytest.mark.parametrize("program", [report, gpu_report, plot], ids=lambda program: program.__name__.split(".")[-1])
def test_a_file_that_is_no_results_file_is_refused_in_one_line(program, tmp_path, capsys):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"schema": 0}')
    for path in (wrong, tmp_path / "missing.json"):
        assert program.main([str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_json_goes_alone_to_standard_output(tmp_path, capsys):
    arguments = ["--optimizer", "SGD", "--case", "1000x16", "--dtype", "fp32", "--rounds", "1", "--json"]
    arguments += ["--backend", "reference", "--backend", "cpu"]
    assert bench(*arguments, output=tmp_path) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fusedstep cpu", "fusedstep reference"} <= {row["contender"] for row in found["rows"]}
    assert found == results.load(next(tmp_path.glob("*.json")))


class ForgetsDecay(fusedstep.AdamW):
    def __init__(self, params, *, weight_decay, **options):
        super().__init__(params, weight_decay=0.0, **options)


class ReachesInfinity(fusedstep.AdamW):
    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][-1].fill_(math.inf)


class WritesGradients(fusedstep.AdamW):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            torch._foreach_zero_([param.grad for param in group["params"]])


class Raises(fusedstep.AdamW):
    def step(self, closure=None):
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("broken", "status"),
    [(ForgetsDecay, "wrong"), (WritesGradients, "wrong"), (ReachesInfinity, "wrong"), (Raises, "failed")],
)
def test_a_wrong_optimizer_is_not_timed_and_makes_the_exit_code_1(broken, status, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fusedstep, "AdamW", broken)
    assert bench("--optimizer", "AdamW", "--case", "1000x16", "--dtype", "fp32", "--rounds", "1", output=tmp_path) == 1
    assert status.upper() in capsys.readouterr().out
    rows = {row["contender"]: row for row in results.load(next(tmp_path.glob("*.json")))["rows"]}
    assert rows["fusedstep cpu"]["status"] == status
    assert rows["fusedstep cpu"]["step_ms"] is None
    assert rows["torch fused"]["step_ms"] is not None


WORDS = ("--optimizer", "SGD", "--optimizer", "Lion", "--case", "1000x16", "--json")  # in two dtypes


def measuring(monkeypatch, stop_before=None):
    """Rows without numbers in the place of measurements; what was measured, and Ctrl-C in the place of one of them."""
    measured = []

    def run(self, configuration, report):
        name = configuration.optimizer.name, configuration.dtype
        if name == stop_before:
            raise KeyboardInterrupt
        measured.append(name)
        row = {"optimizer": name[0], "case": configuration.case.name, "dtype": name[1], "ours": True, "status": "ok"}
        return [{**row, "threads": configuration.threads}]

    monkeypatch.setattr(measurement.Bench, "run", run)
    return measured


def test_a_run_that_was_stopped_loses_nothing_and_can_be_resumed(monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        measuring(patch, stop_before=("Lion", "bf16"))
        with pytest.raises(KeyboardInterrupt):
            bench(*WORDS, output=tmp_path)
    (path,) = tmp_path.iterdir()
    stopped = results.load(path)
    names = [("SGD", "fp32"), ("SGD", "bf16"), ("Lion", "fp32"), ("Lion", "bf16")]
    assert [(row["optimizer"], row["dtype"]) for row in stopped["rows"]] == names[:3]
    assert stopped["configurations_left"] == 1
    measured = measuring(monkeypatch)
    assert bench(*WORDS, "--resume", str(path), output=tmp_path) == 0
    assert measured == names[3:]
    assert list(tmp_path.iterdir()) == [path]
    found = results.load(path)
    assert [(row["optimizer"], row["dtype"]) for row in found["rows"]] == names
    assert found["created"] == stopped["created"]
    assert "configurations_left" not in found
    assert json.loads(capsys.readouterr().out) == found


def test_another_run_is_not_resumed(monkeypatch, tmp_path, capsys):
    measured = measuring(monkeypatch)
    assert bench(*WORDS, output=tmp_path) == 0
    (path,) = tmp_path.iterdir()
    measured.clear()
    assert bench(*WORDS, "--rounds", "3", "--resume", str(path), output=tmp_path) == 2
    assert "its command is fusedstep bench --optimizer SGD" in capsys.readouterr().err
    content = results.load(path)
    path.write_text(json.dumps({**content, "git": {"commit": "another", "dirty": False}}))
    assert bench(*WORDS, "--resume", str(path), output=tmp_path) == 2
    assert "its git is {'commit': 'another'" in capsys.readouterr().err
    assert bench(*WORDS, "--resume", str(tmp_path / "nothing.json"), output=tmp_path) == 2
    assert "is not a results file" in capsys.readouterr().err
    assert measured == []


def test_check_only_times_nothing_and_writes_nothing(tmp_path, capsys):
    assert bench("--optimizer", "SGD-momentum", "--case", "1000x16", "--check-only", output=tmp_path / "new") == 0
    assert not (tmp_path / "new").exists()
    assert "fusedstep cpu" in capsys.readouterr().out


def test_a_peer_with_its_own_options_is_compared_or_says_why_not(monkeypatch):
    peer = peers.Peer("mine", "numpy", "torch.optim", ("cpu",), {"AdamW": ("NAdam", {}), "SGD": ("ASGD", {})})
    monkeypatch.setattr(peers, "PEERS", (peer,))
    (found,) = peers.peer_contenders(optimizer_named("AdamW"), CPU, torch.float32)
    assert found.reasons == ()
    (found,) = peers.peer_contenders(optimizer_named("SGD-momentum"), CPU, torch.float32)
    assert found.reasons == ("has no option 'momentum'",)
    assert peers.peer_contenders(optimizer_named("Adam"), CPU, torch.float32) == []
    monkeypatch.setattr(peers, "PEERS", (peers.Peer("absent", "no-such", "no_such_module", ("cpu",), peer.classes),))
    assert peers.peer_contenders(optimizer_named("AdamW"), CPU, torch.float32) == []
    assert peers.peer_versions() == {"no-such": None}


def test_a_case_that_does_not_fit_into_memory_is_left_out_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(measurement, "available_bytes", lambda device: 1000)
    assert bench("--optimizer", "SGD", "--case", "1000x16", "--dtype", "fp32", output=tmp_path) == 0
    rows = results.load(next(tmp_path.glob("*.json")))["rows"]
    assert {row["status"] for row in rows} == {"unavailable"}
    assert "GiB" in rows[0]["reason"]


def test_contenders_share_the_memory_of_their_states():
    params = check.make_parameters([(5,), (2, 3)], torch.float32, CPU)
    made = [torch.optim.AdamW(params), fusedstep.AdamW(params, backend="cpu"), torch.optim.AdamW(params, amsgrad=True)]
    for optimizer in made:
        optimizer.step()
        measurement.park_states(optimizer, params)
        assert all(optimizer.state[param]["exp_avg"].is_meta for param in params)
    pool = {}
    for optimizer in made:
        measurement.share_states(optimizer, params, pool)
    assert len(pool) == 3 * len(params)
    for param in params:
        assert len({optimizer.state[param]["exp_avg"].data_ptr() for optimizer in made}) == 1
        assert len({optimizer.state[param]["step"].data_ptr() for optimizer in made}) == len(made)
    for optimizer in made:
        before = made[0].state[params[0]]["exp_avg"].clone()
        optimizer.step()
        assert not torch.equal(made[0].state[params[0]]["exp_avg"], before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer", "Sophia"], ["Sophia", "AdamW", "SGD-momentum"]),
        (["--case", "alexnet"], ["alexnet", "resnet50", "gpt2"]),
        (["--dtype", "fp8"], ["fp8", "fp32", "bf16"]),
        (["--backend", "opencl"], ["opencl", "cuda", "triton", "cpu", "reference"]),
        (["--device", "tpu"], ["tpu", "cpu", "cuda"]),
        (["--threads", "0"], ["0", "1 or more"]),
        (["--rounds", "many"], ["many", "1 or more"]),
    ],
    ids=lambda value: value[0],
)
def test_a_bad_option_value_is_refused_with_the_allowed_ones(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        bench(*arguments)
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(word in message for word in words)


def test_a_backend_that_cannot_run_here_is_refused_with_its_reasons(capsys):
    assert bench("--backend", "triton") == 2
    assert "interpreter" in capsys.readouterr().err


def test_missing_packages_are_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    assert bench("--plot") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rich and matplotlib" in line
    assert "pip install 'fusedstep[bench]'" in line


def test_one_thread_is_measured_too_where_the_case_asks_for_it():
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        todo = suite.configurations(parser.parse_args(["--optimizer", "AdamW", "--case", "50M"]), CPU)
        assert [(c.dtype, c.threads) for c in todo] == [("fp32", 2), ("fp32", 1), ("bf16", 2)]
        todo = suite.configurations(parser.parse_args(["--case", "50M", "--threads", "1", "--dtype", "fp32"]), CPU)
        assert {(c.dtype, c.threads) for c in todo} == {("fp32", 1)}
    finally:
        torch.set_num_threads(before)


def test_precision_checks_times_and_counts_the_bytes_of_each_option(tmp_path, capsys):
    arguments = ["--precision", "--quick", "--json", "--rounds", "1", "--threads", "1", "--case", "1000x16"]
    chosen = ["AdamW-8-bit-states", "AdamW-split-bf16-states"]
    assert bench(*arguments, *(f"--optimizer={name}" for name in chosen), output=tmp_path) == 0
    found = json.loads(capsys.readouterr().out)
    (written,) = tmp_path.iterdir()
    assert "precision" in written.name
    ours = [row for row in found["rows"] if row["ours"]]
    assert {row["status"] for row in ours} == {"ok"}
    modes = [(row["optimizer"], row["dtype"]) for row in ours if not peers.is_compared_with(row["contender"])]
    assert modes == [(chosen[0], "fp32"), (chosen[0], "bf16"), (chosen[1], "bf16")]
    assert all(name in report.markdown(found) for name in chosen)
    rows = {(row["dtype"], row["mode"]): row for row in found["bytes"]}
    # 2 million parameters, so that the interpreter's own pages are below a byte for each.
    expected = {  # read, written, kept
        ("float32", "plain"): (16, 12, 12),
        ("float32", "8-bit states"): (10, 6, 6),
        ("bfloat16", "split"): (14, 12, 12),
        ("bfloat16", "kahan"): (10, 8, 8),
        ("bfloat16", "stochastic, 8-bit states"): (6, 4, 4),
    }
    for key, (_, written, kept) in expected.items():
        row = rows[key]
        assert row["written"] == pytest.approx(written, abs=2.5), key
        assert row["memory"] == pytest.approx(kept, abs=0.5), key
        assert f"| {key[0]} | {key[1]} |" in report.markdown(found)


def test_bytes_of_the_precision_options_are_those_of_their_tensors():
    for optimizer in (o for o in optimizers.OPTIMIZERS if o.precision):
        for dtype in filter(optimizer.takes, measurement.DTYPES.values()):
            (param,) = check.make_parameters([(256, 256)], dtype, CPU)
            made = fusedstep.AdamW([param], **PRECISION[optimizer.precision])
            made.step()
            kept = sum(t.nbytes for name, t in made.state[param].items() if name != "step") + param.nbytes
            moved = optimizer.bytes_per_parameter(dtype, optimizer.precision)
            assert param.numel() * moved == 2 * kept + param.grad.nbytes


def test_bytes_cannot_be_counted_on_a_gpu():
    assert not precision.can_count(torch.device("cuda"))
