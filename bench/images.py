"""Images for the LeNet demo: Fashion-MNIST from a folder, or the handwritten digits that scikit-learn ships."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 28
CLASSES = 10
TEST_SHARE = 0.2  # of the digits
# As Fashion-MNIST and MNIST are published, each of them plain or with .gz behind it.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
UNSIGNED_BYTES = 8  # the code of the element type in an IDX header


@dataclass(frozen=True)
class Images:
    """Pictures, (number, 1, 28, 28) from 0 to 1, and the number of each one's class."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load(folder: Path | None) -> Images:
    """Fashion-MNIST (or anything in its files) from a folder; the digits if there is none.

    Raises:
        FileNotFoundError: files are missing; the text names them.
        ValueError: a file is not what its name says.
    """
    return digits() if folder is None else from_folder(folder)


def digits() -> Images:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels, enlarged to 28x28; every fifth is for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = torch.from_numpy(found.images).float().div(found.images.max())[:, None]
    pictures = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(found.target).long()
    test = torch.arange(len(labels)) % round(1 / TEST_SHARE) == 0
    name = "scikit-learn's digits, enlarged from 8x8"
    return Images(name, pictures[~test], labels[~test], pictures[test], labels[test])


def from_folder(folder: Path) -> Images:
    """The four IDX files of a folder."""
    names = [name for pair in FILES.values() for name in pair]
    paths = {name: path for name in names for path in (folder / f"{name}.gz", folder / name) if path.is_file()}
    missing = [name for name in names if name not in paths]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; it must hold these four files of Fashion-MNIST, each as it is "
            f"or with .gz: {', '.join(names)}"
        )
    tensors = []
    for image_name, label_name in FILES.values():
        pictures, labels = read_idx(paths[image_name], 3), read_idx(paths[label_name], 1)
        if pictures.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"{paths[image_name]}: images of {tuple(pictures.shape[1:])}, expected ({SIDE}, {SIDE})")
        if len(pictures) != len(labels) or len(labels) == 0:
            raise ValueError(f"{paths[label_name]}: {len(labels)} labels for {len(pictures)} images")
        if int(labels.max()) >= CLASSES:
            raise ValueError(f"{paths[label_name]}: a label is {int(labels.max())}, expected 0 to {CLASSES - 1}")
        tensors += [pictures[:, None].float().div(255), labels.long()]
    return Images(f"the images in {folder}", *tensors)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of an IDX file: two zeros, the code of the type, the number of dimensions, their sizes, the data.

    Raises:
        ValueError: it is something else, or cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    expected = bytes([0, 0, UNSIGNED_BYTES, dimensions])
    header = 4 + 4 * dimensions
    if content[:4] != expected or len(content) < header:
        raise ValueError(
            f"{path} is not an IDX file of bytes with {dimensions} dimensions (it begins with "
            f"{content[:4].hex(' ') or 'nothing'}, expected {expected.hex(' ')})"
        )
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    if len(content) != header + math.prod(shape):
        raise ValueError(f"{path} has {len(content)} bytes, expected {header + math.prod(shape)} for {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
