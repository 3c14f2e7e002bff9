"""The command `fusedstep schedule`."""

import json
import sys
from pathlib import Path

import pytest

from fusedstep import cli
from fusedstep.schedules import picture

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
NEEDED = {
    "warmup_stable_decay": ["--set", "num_decay_steps=3"],
    "cosine_with_min_lr": ["--set", "min_lr=0.1"],
    "cosine_warmup_with_min_lr": ["--set", "min_lr_rate=0.1"],
    "MultiFactorScheduler": ["--set", "step=[3, 5]"],
}


def rates_of(capsys, name, *words):
    assert cli.main(["schedule", name, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["learning_rates"][name]


def test_every_schedule_is_printed(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in picture.NAMES:
        words = ["--warmup", "2", "--steps", "10", "--lr", "0.5", *NEEDED.get(name, [])]
        assert cli.main(["schedule", name, *words, "--until", "12"]) == 0, name
        lines = capsys.readouterr().out.splitlines()
        assert [int(line.split()[0]) for line in lines] == list(range(13)), name
        rates = rates_of(capsys, name, *words, "--until", "12")
        assert [float(line.split()[1]) for line in lines] == pytest.approx(rates, rel=1e-5), name
        assert max(rates) == pytest.approx(0.5, rel=0.3), name


def test_numbers_that_are_known(capsys):
    assert rates_of(capsys, "linear", "--warmup", "2", "--steps", "4") == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert rates_of(capsys, "LinearScheduler", "--warmup", "2", "--steps", "4") == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert rates_of(capsys, "MultiFactorScheduler", "--steps", "3", "--set", "step=[1]", "--set", "factor=0.5") == [
        *(1.0, 1.0, 0.5, 0.5)
    ]
    assert rates_of(capsys, "ConstantScheduler", "--warmup", "2", "--steps", "3", "--lr", "3") == [0.0, 1.5, 3.0, 3.0]
    words = ["--steps", "9", "--set", "num_decay_steps=3", "--set", "decay_type=linear"]
    assert rates_of(capsys, "warmup_stable_decay", *words)[5:] == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])


def test_a_long_table_is_short(capsys):
    assert cli.main(["schedule", "cosine", "--warmup", "100", "--steps", "100000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= picture.ROWS + 1
    assert lines[-1].split()[0] == "100000"


@pytest.mark.parametrize("words", [["cosine", "--warmup", "10", "--steps", "50"], ["all", "--steps", "20"]], ids=str)
def test_drawing(words, capsys, tmp_path):
    target = tmp_path / "folder" / "out.png"
    assert cli.main(["schedule", *words, "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert f"written: {target}" in capsys.readouterr().out
    assert cli.main(["schedule", *words, "--plot", str(target.with_suffix(".svg")), "--json"]) == 0
    text = target.with_suffix(".svg").read_text()
    assert "</svg>" in text
    found = json.loads(capsys.readouterr().out)["learning_rates"]
    assert list(found) == (list(picture.NAMES) if words[0] == "all" else ["cosine"])


def test_drawing_without_matplotlib_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["schedule", "cosine", "--plot", "out.png"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "matplotlib: pip install 'fusedstep[bench]'" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "invalid choice"),
        (["cosine", "--steps", "0"], "--steps must be 1 or more"),
        (["cosine", "--set", "nope"], "NAME=VALUE"),
        (["cosine", "--set", "nope=3"], "unexpected keyword argument 'nope'"),
        (["warmup_stable_decay"], "num_decay_steps"),
        (["PolyScheduler", "--set", "pwr=-1"], "pwr: -1"),
        (["CosineScheduler", "--warmup", "1000"], "larger than warmup_steps"),
        (["all", "--set", "pwr=-1"], "for one schedule"),
        (["all"], "needs --plot or --json"),
        (["cosine", "--lr", "-1"], "Invalid --lr: -1.0"),
        (["cosine", "--lr", "nan"], "Invalid --lr: nan"),
        (["polynomial", "--set", "power=-2", "--set", "lr_end=0", "--steps", "9"], "a negative power"),
        (["polynomial", "--set", "lr_end=-1e999"], "the learning rate of update 0 is"),
        (["cosine", "--plot", "out.nope"], "Format 'nope' is not supported"),
        (["cosine", "--plot", f"{__file__}/out.png"], "cannot be written"),
    ],
    ids=str,
)
def test_errors(words, message, capsys):
    assert cli.main(["schedule", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_the_committed_figure_shows_all():
    assert (IMAGES / "schedules.png").read_bytes().startswith(b"\x89PNG")
    curves = picture.gallery(1.0, 100, 1000, 1251)
    assert set(curves) == set(picture.NAMES)
    assert all(len(set(rates)) > 1 for name, rates in curves.items() if name != "constant")
