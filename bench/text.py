"""The text that the demo learns: the language reference that every CPython carries, one token per character."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """Token numbers (int64) of a text in two parts, and the characters that they stand for."""

    train: Tensor
    validation: Tensor
    characters: str


def load() -> Corpus:
    """The text of `help()`'s topics; its last tenth is for validation."""
    # Several topics repeat paragraphs of others. Without them the validation text is new to the model.
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    text = "\n\n".join(paragraphs)
    characters = "".join(sorted(set(text)))
    number = {character: index for index, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in text])
    split = round(len(tokens) * (1 - VALIDATION_SHARE))
    return Corpus(tokens[:split], tokens[split:], characters)


def windows(tokens: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each ``(len(starts), length)``; a target is the character after its input."""
    rows = tokens[starts[:, None] + torch.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


def random_windows(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets from random places."""
    starts = torch.randint(len(tokens) - length, (count,), generator=generator)
    return windows(tokens, starts, length)


def even_windows(tokens: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets from ``count`` places at equal distances: the same ones in every call."""
    starts = torch.linspace(0, len(tokens) - length - 1, count).long()
    return windows(tokens, starts, length)
