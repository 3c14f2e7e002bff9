"""The demo trains, compares and writes; the model here is tiny and nothing looks at how long anything took."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from fusedstep.bench import train_gpt

import fusedstep

TINY = train_gpt.Shape(layers=1, heads=2, width=16, context=16, batch=4, steps=6)
CPU = torch.device("cpu")


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The command with a tiny model, on the CPU; what it writes goes to ``tmp_path``."""
    monkeypatch.setattr(train_gpt, "CPU_SHAPE", TINY)
    return lambda *words: train_gpt.main(["--device", "cpu", "--output", str(tmp_path / "out"), *words])


def test_the_command_prints_a_table_and_writes_curves_and_numbers(demo, tmp_path, capsys):
    assert demo() == 0
    printed = capsys.readouterr().out
    for expected in ("fusedstep.AdamW", "torch.optim.AdamW", "validation loss", "kernel calls", torch.__version__):
        assert expected in printed
    picture, numbers = (tmp_path / "out" / f"train_gpt_adamw.{ending}" for ending in ("png", "json"))
    assert str(picture) in printed
    assert str(numbers) in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    first, second = found["runs"]
    assert first["name"] == "torch.optim.AdamW(fused=True)"
    assert second["name"] == "fusedstep.AdamW"
    assert second["backends"] == ["cpu"]
    assert second["kernel_calls_per_step"] == 2  # as many as there are parameter groups
    assert found["parameters"] > 0
    assert found["largest_difference"] <= 1e-4
    for run in found["runs"]:
        assert len(run["train_loss"]) == TINY.steps
        assert [step for step, _ in run["validation_loss"]] == list(range(1, TINY.steps + 1))
        assert run["step_ms_total"] >= run["step_ms_median"] > 0


def test_json_is_all_that_is_printed(demo, capsys):
    assert demo("--json", "--steps", "2", "--optimizer", "SGD", "--seed", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["optimizer"], found["shape"]["steps"], found["seed"]) == ("SGD", 2, 3)


def test_another_seed_is_another_run_and_the_same_seed_the_same():
    def losses(seed):
        return train_gpt.compare("AdamW", dataclasses.replace(TINY, steps=2), CPU, seed)["runs"][1]["train_loss"]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


@pytest.mark.parametrize("name", train_gpt.optimizers())
def test_every_optimizer_learns_like_what_it_is_compared_with(name):
    found = train_gpt.compare(name, TINY, CPU)
    assert found["largest_difference"] <= 1e-3
    losses = found["runs"][1]["train_loss"]
    assert losses[-1] < losses[0]
    assert all(map(math.isfinite, losses))


def test_an_optimizer_that_torch_lacks_is_compared_with_the_reference(monkeypatch):
    monkeypatch.delattr(torch.optim, "AdamW")
    found = train_gpt.compare("AdamW", TINY, CPU)
    assert found["runs"][0]["name"] == "fusedstep.AdamW(backend='reference')"
    assert found["runs"][0]["backends"] == ["reference"]
    assert found["largest_difference"] == 0.0  # the same bits


def test_matrices_decay_and_nothing_else_does():
    model = train_gpt.GPT(TINY, 50)
    matrices, others = train_gpt.groups(model, 0.1)
    assert matrices["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert all(param.dim() == 2 for param in matrices["params"])
    assert all(param.dim() == 1 for param in others["params"])
    assert len(matrices["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_the_model_does_not_look_ahead():
    model = train_gpt.GPT(TINY, 50)
    tokens = torch.arange(2 * TINY.context).reshape(2, -1)
    changed = tokens.clone()
    changed[:, -1] = 0
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_batches_are_followed_by_what_comes_next():
    text = train_gpt.load_text(CPU)
    tokens, following = train_gpt.sample(text.train, 4, 16, torch.Generator().manual_seed(0))
    assert tokens.shape == following.shape == (4, 16)
    assert torch.equal(tokens[:, 1:], following[:, :-1])
    assert len(text.validation) > 10_000
    assert 0 <= text.train.min() <= text.train.max() < text.characters


def test_the_learning_rate_warms_up_and_falls():
    factor = train_gpt.schedule(100)
    factors = [factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.06
    assert train_gpt.schedule(1)(0) == 1.0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(["--optimizer", "Nope"], "AdamW", id="optimizer"),
        pytest.param(["--optimizer", "FusedOptimizer"], "no optimizer 'FusedOptimizer'", id="base-class"),
        pytest.param(["--steps", "0"], "1 or larger", id="steps"),
        pytest.param(["--device", "nowhere"], "nowhere", id="device"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(demo, capsys, words, expected):
    assert demo(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(demo, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert demo() == 2
    error = capsys.readouterr().err
    assert package in error
    assert "pip install 'fusedstep[bench]'" in error
    assert len(error.splitlines()) == 1


def test_a_python_without_the_text_says_so(demo, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert demo() == 2
    assert "lacks the text" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_a_failure(demo, capsys, monkeypatch):
    monkeypatch.setitem(train_gpt.RECIPES, "SGD", train_gpt.Recipe(1e30))
    assert demo("--optimizer", "SGD") == 1
    assert "not finite" in capsys.readouterr().err


def test_recipes_name_options_that_the_classes_take():
    for name, cls in train_gpt.optimizers().items():
        recipe = train_gpt.RECIPES.get(name, train_gpt.OTHERS)
        assert isinstance(cls([torch.nn.Parameter(torch.ones(1))], lr=recipe.lr, **recipe.options), cls)
    assert "FusedOptimizer" in fusedstep.__all__
