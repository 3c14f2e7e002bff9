"""A small GPT: the model that the demo trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """The sizes of the model and of its training: ``context`` in characters, ``batch`` in sequences."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer network, each behind a norm and around a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A language model; the same matrix turns tokens into vectors and vectors into scores of tokens."""

    def __init__(self, tokens: int, size: Size) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for name, param in self.named_parameters():
            if param.dim() == 2:
                # What is added to the stream 2 x layers times starts smaller, so that the stream's size does not grow
                # with the depth.
                into_stream = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(param, std=0.02 / (math.sqrt(2 * size.layers) if into_stream else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, inputs: Tensor) -> Tensor:
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.blocks(self.token(inputs) + self.position(places))
        return F.linear(self.norm(x), self.token.weight)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per character."""
        return F.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten())
