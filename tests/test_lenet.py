"""The textbook run: its data, its schedules, its command, with one or two epochs of a few images."""

import gzip
import json
import math
import sys

import numpy as np
import pytest
import torch
from fusedstep.bench import images, lenet

import fusedstep

COUNTS = {"train": 40, "test": 10}


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write(folder, *, zipped=(), side=28, **changed):
    """The four files with random content; ``changed`` replaces the bytes of some."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, (pictures, labels) in images.FILES.items():
        arrays[pictures] = generator.integers(0, 256, (COUNTS[part], side, side), dtype=np.uint8)
        arrays[labels] = generator.integers(0, 10, COUNTS[part], dtype=np.uint8)
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        content = changed.get(name.split("-idx")[0].replace("-", "_"), idx(array))
        if name in zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


def test_idx_files_are_read_plain_and_zipped(tmp_path):
    names = [name for pair in images.FILES.values() for name in pair]
    arrays = write(tmp_path, zipped=names[1:3])
    data = images.load(tmp_path)
    parts = {"train": (data.train, data.train_labels), "test": (data.test, data.test_labels)}
    for part, (pictures, labels) in parts.items():
        expected, expected_labels = (torch.from_numpy(arrays[name]) for name in images.FILES[part])
        assert pictures.shape == (COUNTS[part], 1, 28, 28)
        assert torch.equal((pictures[:, 0] * 255).round().to(torch.uint8), expected)
        assert torch.equal(labels, expected_labels.long())


def test_missing_files_are_named(tmp_path, capsys):
    arrays = write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="lacks train-images-idx3-ubyte, t10k-labels-idx1-ubyte; it must hold"):
        images.load(tmp_path)
    assert lenet.main(["--data", str(tmp_path / "nowhere")]) == 2
    printed = capsys.readouterr().err
    assert all(name in printed for name in arrays)


LABELS = idx(np.arange(10, dtype=np.uint8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"t10k_labels": b""}, "is not an IDX file of bytes with 1 dimensions .it begins with nothing"),
        ({"t10k_images": LABELS}, "t10k-images-idx3-ubyte is not an IDX file of bytes with 3 dimensions"),
        ({"t10k_labels": LABELS[:-1]}, "has 17 bytes, expected 18"),
        ({"t10k_labels": idx(np.zeros(9, np.uint8))}, "9 labels for 10 images"),
        ({"t10k_labels": idx(np.full(10, 10, np.uint8))}, "a label is 10, expected 0 to 9"),
        ({"side": 32}, r"images of \(32, 32\), expected \(28, 28\)"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, changed, message):
    write(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        images.load(tmp_path)


def test_a_file_that_is_not_zipped_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").rename(tmp_path / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz cannot be read"):
        images.load(tmp_path)


@pytest.mark.parametrize("damage", [lambda c: c[:-20], lambda c: c[:10] + b"\7" + c[11:]], ids=["short", "wrong"])
def test_a_damaged_archive_is_refused(tmp_path, damage, capsys):
    write(tmp_path, zipped=["t10k-images-idx3-ubyte"])
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    assert lenet.main(["--data", str(tmp_path)]) == 2
    assert f"{path} cannot be read" in capsys.readouterr().err


def test_the_digits_are_enlarged_and_split():
    pytest.importorskip("sklearn")
    data = images.load(None)
    assert data.train.shape == (1437, 1, 28, 28)
    assert data.test.shape == (360, 1, 28, 28)
    for pictures, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert pictures.dtype == torch.float32
        assert pictures.min() == 0
        assert 0.9 < pictures.max() <= 1
        assert labels.unique().tolist() == list(range(10))


def test_the_network_is_the_books():
    net = lenet.lenet()
    assert [tuple(p.shape) for p in net.parameters() if p.dim() > 1] == [
        (6, 1, 5, 5),
        (16, 6, 5, 5),
        (120, 400),
        (84, 120),
        (10, 84),
    ]
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_schedules_are_the_books_at_30_epochs():
    chosen = lenet.chosen_schedules(0.3, 30)
    rates = {name: [schedule(epoch) for epoch in range(30)] for name, schedule in chosen.items()}
    assert rates["constant"] == [0.3] * 30
    book = {
        "square root": [0.3 * (t + 1) ** -0.5 for t in range(30)],
        "factor": [max(0.01, 0.3 * 0.9 ** (t + 1)) for t in range(30)],
        "multi-factor": [0.3] * 16 + [0.15] * 14,
        "cosine": [0.01 + 0.29 * (1 + math.cos(math.pi * min(t, 20) / 20)) / 2 for t in range(30)],
        "cosine with warm-up": [
            0.3 * t / 5 if t < 5 else 0.01 + 0.29 * (1 + math.cos(math.pi * min(t - 5, 15) / 15)) / 2 for t in range(30)
        ],
    }
    for name, expected in book.items():
        assert rates[name] == pytest.approx(expected, rel=1e-12), name
    for epochs in range(1, 10):
        assert len(lenet.chosen_schedules(0.1, epochs)) == 6


def test_training_is_that_of_torch(tmp_path):
    """The same network, batches and learning rates with torch's SGD give the same losses."""
    write(tmp_path)
    data = images.load(tmp_path)
    schedule = lenet.chosen_schedules(0.3, 3)["factor"]
    run = lenet.train(data, "factor", schedule, epochs=3, batch=16, seed=5, backend=None)
    torch.manual_seed(5)
    net = lenet.lenet()
    generator = torch.Generator().manual_seed(5)
    for epoch in range(3):
        optimizer = torch.optim.SGD(net.parameters(), lr=max(0.01, 0.3 * 0.9 ** (epoch + 1)))
        total = right = 0.0
        for chosen in torch.randperm(40, generator=generator).split(16):
            scores = net(data.train[chosen])
            loss = torch.nn.functional.cross_entropy(scores, data.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
            right += (scores.argmax(1) == data.train_labels[chosen]).sum().item()
        assert run.train_loss[epoch] == pytest.approx(total / 40, rel=1e-5)
        assert run.train_accuracy[epoch] == right / 40
        expected = (net(data.test).argmax(1) == data.test_labels).float().mean().item()
        assert run.test_accuracy[epoch] == pytest.approx(expected)


def test_the_command_prints_a_table_and_writes_curves_and_numbers(tmp_path, capsys):
    write(tmp_path / "data")
    words = ["--data", str(tmp_path / "data"), "--epochs", "2", "--batch", "20", "--device", "cpu"]
    assert lenet.main([*words, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for expected in (*lenet.chosen_schedules(0.3, 2), "test accuracy", torch.__version__, fusedstep.__version__):
        assert expected.split()[0] in printed
    assert (tmp_path / "out" / "lenet.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "lenet.json").read_text())
    assert [run["schedule"] for run in found["runs"]] == list(lenet.chosen_schedules(0.3, 2))
    for run in found["runs"]:
        for key in ("lr", "train_loss", "train_accuracy", "test_accuracy"):
            assert len(run[key]) == 2
    assert len({run["train_loss"][0] for run in found["runs"][:1] + found["runs"][3:5]}) == 1  # the same start


def test_a_loss_that_diverges_ends_it(tmp_path, capsys):
    write(tmp_path)
    words = ["--data", str(tmp_path), "--epochs", "2", "--lr", "1e30", "--json", "--output", str(tmp_path)]
    assert lenet.main(words) == 1
    assert "a smaller --lr may help" in capsys.readouterr().err


def test_what_cannot_run_says_so(tmp_path, capsys, monkeypatch):
    assert lenet.main(["--lr", "-1", "--json"]) == 2
    assert "-1.0" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(lenet.importlib.util, "find_spec", lambda name: None if name == "sklearn" else 1)
    assert lenet.main(["--json"]) == 2
    assert capsys.readouterr().err == "this needs scikit-learn: pip install 'fusedstep[lenet]'\n"
