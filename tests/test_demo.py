"""The demo trains, compares and writes; the model here is tiny and nothing looks at how long anything took."""

import json
import math
import sys

import pytest
import torch
from fusedstep.bench import optimizers, text, train_gpt

STEPS = 6
SIZE = train_gpt.Size(layers=1, width=16, heads=2, context=16, batch=4, steps=STEPS)
SMALL = [word for name, value in vars(SIZE).items() for word in (f"--{name}", str(value))]


def run(folder, *words):
    """The command with a tiny model, on the CPU."""
    return train_gpt.main(["--device", "cpu", "--output", str(folder), *SMALL, *words])


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The same without the picture, which takes longer than everything else."""
    monkeypatch.setattr(train_gpt, "draw", lambda found, path: None)
    return lambda *words: run(tmp_path, *words)


def test_the_command_prints_a_table_and_writes_curves_and_numbers(tmp_path, capsys):
    assert run(tmp_path / "out") == 0
    printed = capsys.readouterr().out
    for expected in ("fusedstep.AdamW", "torch.optim.AdamW", "fused=True", "kernel calls", torch.__version__):
        assert expected in printed
    picture, numbers = (tmp_path / "out" / f"train_gpt-AdamW.{ending}" for ending in ("png", "json"))
    assert f"written: {picture}" in printed
    assert f"written: {numbers}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    other, mine = found["runs"]
    assert (other["name"], other["implementation"]) == ("torch.optim.AdamW", "fused=True")
    assert mine["name"] == "fusedstep.AdamW"
    assert mine["backends"] == ["cpu"]
    assert mine["kernel_calls"] == 2  # as many as there are parameter groups
    assert found["parameters"] > found["tensors"] > 0
    assert found["comparison"]["max_train_difference"] <= 1e-4
    assert found["comparison"]["max_validation_difference"] <= 1e-4
    assert {"command", "device", "versions", "settings", "size", "text", "other_load"} <= set(found)
    assert found["rounding"]["steps"] == len(found["rounding"]["train_loss"]) == 2  # a quarter
    assert "from rounding alone" in " ".join(printed.split())
    for one in found["runs"]:
        assert len(one["train_loss"]) == len(one["step_seconds"]) == STEPS
        assert one["validation_steps"] == list(range(STEPS + 1))
        assert one["total_step_seconds"] >= one["median_step_seconds"] > 0
        assert all(map(math.isfinite, one["train_loss"] + one["validation_loss"]))


def test_json_is_all_that_is_printed(demo, capsys):
    assert demo("--json", "--steps", "2", "--optimizer", "SGD", "--seed", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["settings"]["optimizer"], found["settings"]["seed"], found["size"]["steps"]) == ("SGD", 3, 2)


@pytest.mark.parametrize("name", train_gpt.optimizers())
def test_every_optimizer_learns_like_what_it_is_compared_with(demo, capsys, name):
    assert demo("--json", "--optimizer", name) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["comparison"]["max_train_difference"] <= 1e-3
    losses = found["runs"][1]["validation_loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("precision", "dtype"), [("8-bit-states", torch.float32), ("split", torch.bfloat16)])
def test_precision_concerns_ours_alone(demo, capsys, tmp_path, monkeypatch, precision, dtype):
    dtypes = []
    monkeypatch.setattr(train_gpt.GPT, "loss", spy(train_gpt.GPT.loss, dtypes))
    assert demo("--json", "--precision", precision) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["implementation"] for run in found["runs"]] == ["fused=True", optimizers.PRECISIONS[precision]]
    assert list(dict.fromkeys(dtypes)) == list(dict.fromkeys((torch.float32, dtype)))
    assert (tmp_path / f"train_gpt-AdamW-{precision}.json").exists()


def spy(loss, dtypes):
    def noted(model, *args):
        dtypes.append(model.token.weight.dtype)
        return loss(model, *args)

    return noted


def test_an_optimizer_that_torch_lacks_is_compared_with_the_reference(demo, capsys, monkeypatch):
    monkeypatch.delattr(torch.optim, "AdamW")
    assert demo("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"][0]["backends"] == ["reference"]
    assert found["comparison"]["max_train_difference"] == 0.0  # the same bits


def test_the_seed_decides_everything():
    corpus, cpu = text.load(), torch.device("cpu")
    _, mine = train_gpt.contenders("AdamW", {}, cpu, "cpu")

    def losses(seed):
        return train_gpt.train(train_gpt.Training(corpus, SIZE, "AdamW", cpu, seed, False), mine, 2).train_loss

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_rounding_alone_is_a_run_from_weights_that_differ_in_their_last_bit(demo, capsys):
    assert demo("--json", "--steps", "200") == 0
    found = json.loads(capsys.readouterr().out)
    alone, (other, mine) = found["rounding"], found["runs"]
    assert alone["steps"] == 50  # a quarter
    between = [abs(a - b) for a, b in zip(other["train_loss"], alone["train_loss"], strict=False)]
    assert alone["max_train_difference"] == max(between) > 0.0
    ours = [abs(a - b) for a, b in zip(other["train_loss"][:50], mine["train_loss"][:50], strict=True)]
    assert alone["max_train_difference_of_ours"] == max(ours)
    assert max(ours) < 100 * max(between)  # the optimizers differ as roundings do


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_bit_of_every_weight_is_changed_up_or_down(dtype):
    model, changed = (train_gpt.GPT(50, SIZE).to(dtype) for _ in range(2))
    changed.load_state_dict(model.state_dict())
    train_gpt.change_last_bits(changed)
    for before, after in zip(model.parameters(), changed.parameters(), strict=True):
        assert (before != after).all()
        back = torch.nextafter(after, before)
        assert torch.equal(back, before)
    ups = torch.cat([(a > b).view(-1) for a, b in zip(changed.parameters(), model.parameters(), strict=True)])
    assert 0.4 < ups.float().mean() < 0.6


@pytest.mark.parametrize("outside", [False, True])
def test_kernels_are_deterministic_only_while_the_demo_runs(demo, monkeypatch, outside):
    seen = []
    loss = train_gpt.GPT.loss

    def noted(model, *args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return loss(model, *args)

    monkeypatch.setattr(train_gpt.GPT, "loss", noted)
    torch.use_deterministic_algorithms(outside)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    assert demo("--steps", "1") == 0
    assert set(seen) == {True}
    assert torch.are_deterministic_algorithms_enabled() == outside
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


def test_matrices_decay_and_nothing_else_does():
    model = train_gpt.GPT(50, SIZE)
    matrices, others = train_gpt.param_groups(model, "AdamW")
    assert "weight_decay" not in matrices  # that of the optimizer
    assert others["weight_decay"] == 0.0
    assert {param.dim() for param in matrices["params"]} == {2}
    assert {param.dim() for param in others["params"]} == {1}
    assert len(matrices["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_the_model_does_not_look_ahead():
    model = train_gpt.GPT(50, SIZE)
    tokens = torch.arange(2 * SIZE.context).reshape(2, -1)
    changed = tokens.clone()
    changed[:, -1] = 49
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_batches_are_followed_by_what_comes_next():
    corpus = text.load()
    assert len(corpus.train) > 8 * len(corpus.validation) > 10_000
    assert set(corpus.train.tolist()) <= set(range(len(corpus.characters)))
    random = text.random_windows(corpus.train, 4, 16, torch.Generator().manual_seed(0))
    for inputs, targets in (random, text.even_windows(corpus.validation, 4, 16)):
        assert inputs.shape == targets.shape == (4, 16)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_learning_rate_warms_up_and_falls():
    factors = [train_gpt.lr_factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert train_gpt.FINAL_LR < factors[-1] < 1.1 * train_gpt.FINAL_LR
    assert train_gpt.lr_factor(0, 1) == 1.0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(["--optimizer", "Nope"], "AdamW", id="optimizer"),
        pytest.param(["--optimizer", "FusedOptimizer"], "AdamW", id="base-class"),
        pytest.param(["--steps", "0"], "1 or larger", id="steps"),
        pytest.param(["--device", "nowhere"], "nowhere", id="no-device"),
        pytest.param(["--device", "meta"], "cpu and cuda", id="meta-device"),
        pytest.param(["--heads", "3"], "multiple", id="heads"),
        pytest.param(["--context", "10000000"], "too long", id="context"),
    ],
)
def test_a_bad_argument_is_explained_with_exit_code_2(demo, capsys, words, expected):
    with pytest.raises(SystemExit) as stop:
        demo(*words)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err.splitlines()[-1]


def test_a_backend_that_cannot_run_is_explained(demo, capsys):
    assert demo("--backend", "cuda") == 2
    assert "cuda" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(demo, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert demo() == 2
    error = capsys.readouterr().err
    assert package in error
    assert "pip install 'fusedstep[bench]'" in error
    assert len(error.splitlines()) == 1


def test_a_loss_that_is_not_finite_is_a_failure(demo, capsys):
    assert demo("--optimizer", "SGD", "--lr", "1e38") == 1
    assert "--lr" in capsys.readouterr().err


def test_a_busy_machine_is_mentioned(demo, capsys):
    assert demo("--json", "--steps", "1") == 0
    found = json.loads(capsys.readouterr().out)
    for load, mentioned in ((1.5, True), (0.0, False), (None, False)):
        train_gpt.show({**found, "other_load": load})
        assert ("other programs used" in capsys.readouterr().out) == mentioned
