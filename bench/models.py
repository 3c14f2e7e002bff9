"""Parameter lists to step over: shapes of real models, derived from their architecture, and synthetic lists."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


def resnet50(classes: int = 1000) -> list[Shape]:
    """ResNet-50: bottleneck blocks 3, 4, 6, 3; a BatchNorm (weight, bias) after each of its bias-free convolutions."""

    def conv(out: int, into: int, kernel: int) -> list[Shape]:
        return [(out, into, kernel, kernel), (out,), (out,)]

    shapes = conv(64, 3, 7)
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += conv(width, channels, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:  # the shortcut changes the number of channels once per stage
                shapes += conv(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (classes, channels), (classes,)]


def gpt2(layers: int = 12, width: int = 768, context: int = 1024, vocabulary: int = 50257) -> list[Shape]:
    """GPT-2 (by default the 124M one); the output layer is the token embedding, so it is listed once."""
    shapes: list[Shape] = [(vocabulary, width), (context, width)]
    for _ in range(layers):
        shapes += [(width,), (width,)]  # LayerNorm
        shapes += [(width, 3 * width), (3 * width,), (width, width), (width,)]  # attention
        shapes += [(width,), (width,)]
        shapes += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]  # MLP
    return [*shapes, (width,), (width,)]


def llama(
    layers: int = 32,
    width: int = 4096,
    hidden: int = 11008,
    kv_width: int = 4096,
    vocabulary: int = 32000,
    embedding: bool = True,
    head: bool = True,
) -> list[Shape]:
    """Llama (by default the 7B one): no biases, RMSNorm, gated MLP.

    Args:
        layers: number of transformer blocks.
        width: of the residual stream.
        hidden: of the MLP.
        kv_width: of keys and values; smaller than ``width`` with grouped-query attention.
        vocabulary: number of tokens.
        embedding: include the token embedding (the first stage of a pipeline has it).
        head: include the last norm and the output layer (the last stage of a pipeline has them).
    """
    block: list[Shape] = [
        *((width, width), (kv_width, width), (kv_width, width), (width, width)),  # q, k, v, output
        *((hidden, width), (hidden, width), (width, hidden)),  # gate, up, down
        *((width,), (width,)),  # the two norms
    ]
    first: list[Shape] = [(vocabulary, width)] if embedding else []
    last: list[Shape] = [(width,), (vocabulary, width)] if head else []
    return [*first, *block * layers, *last]


def llama_1b(layers: int = 22, embedding: bool = True, head: bool = True) -> list[Shape]:
    """TinyLlama-1.1B: Llama at half the width, with 4 key-value heads for 32 query heads."""
    return llama(layers, width=2048, hidden=5632, kv_width=256, embedding=embedding, head=head)


@dataclass(frozen=True)
class Case:
    """A parameter list to measure.

    ``devices``: where it belongs to the default run. ``quick``: it belongs to the quick run. ``every_optimizer``: it is
    run for all optimizers by default, not only for those with `Optimizer.every_case`. ``one_thread``: on a CPU it
    is measured with one thread too, because one core alone does not saturate the memory.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False
    every_optimizer: bool = False
    one_thread: bool = False

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


CASES: tuple[Case, ...] = (
    Case("1000x16", "1,000 x 16", ((16,),) * 1000, quick=True, every_optimizer=True),
    Case("1000x1024", "1,000 x 1,024", ((1024,),) * 1000, quick=True, every_optimizer=True),
    Case("10000x64", "10,000 x 64", ((64,),) * 10_000),
    Case("50M", "one tensor, 50 M", ((50_000_000,),), every_optimizer=True, one_thread=True),
    Case("1000M", "one tensor, 10^9", ((10**9,),), devices=("cuda",)),
    Case("resnet50", "ResNet-50", tuple(resnet50()), quick=True, every_optimizer=True),
    Case("gpt2", "GPT-2 124M", tuple(gpt2())),
    # Whole, these are too large: a stage of a pipeline is what one device would hold.
    Case("llama-1b", "Llama 1.1B, 2 layers", tuple(llama_1b(2, embedding=False, head=False)), devices=("cpu",)),
    Case("llama-7b", "Llama 7B, 8 layers", tuple(llama(8, head=False)), devices=("cuda",)),
)
