"""How weights and states are stored in fewer bits: the reference that every engine repeats to the same bits.

Only integer operations and single IEEE additions, multiplications and divisions occur. csrc/codecs.h and
triton_kernels/codecs.py hold the same functions; csrc/codecs.h explains the formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import layout

BLOCK = 256  # numbers that share a scale
PIECE = BLOCK << 14  # numbers that are coded at a time, for what that takes beside them not to grow with the tensor
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
INFINITY, SMALLEST_NORMAL, QUIET_NAN = 0x7F800000, 0x00800000, 0x7FC00000
ROOT_BIAS = {True: (1, 0x1FC00000), False: (2, 0x2FA00000)}  # signed: shift, and what makes the root of 1 be 1
CODES = (torch.int8, torch.uint8)


def bits_of(x: Tensor) -> Tensor:
    """The bits of fp32 numbers, as int32."""
    return x.contiguous().view(torch.int32)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words from four, as int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]  # modulo 2^64, which keeps the lower word
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + PHILOX_KEY_STEPS[0] & WORD, k1 + PHILOX_KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


def random_16(elements: Tensor, seed: int, index: int, step: int) -> Tensor:
    """16 random bits for each of some elements of parameter ``index`` in its step ``step``, as int32."""
    group = elements // 8
    words = philox(
        (group & WORD, group >> 32, torch.full_like(group, index), torch.full_like(group, step & WORD)),
        (seed & WORD, seed >> 32 & WORD),
    )
    word = torch.stack(words).gather(0, (elements % 8 // 2).unsqueeze(0)).squeeze(0)
    return (word >> 16 * (elements % 2) & 0xFFFF).to(torch.int32)


def narrow_stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """fp32 numbers in bf16 or fp16, rounded up with the probability of what rounding down would cut off."""
    bits = bits_of(x)
    magnitude, sign = bits & 0x7FFFFFFF, bits >> 16 & 0x8000
    nan = magnitude > INFINITY
    if dtype == torch.bfloat16:
        narrowed = torch.where(nan, QUIET_NAN >> 16, (magnitude + random) >> 16)
    else:
        normal = (magnitude + (random & 0x1FFF) - 0x38000000) >> 13
        # Below 2^-14 numbers are multiples of 2^-24; the sum is in units of 2^-40.
        tiny = (torch.where(magnitude < 0x38800000, x.abs(), 0.0) * 2.0**40).to(torch.int32) + random >> 16
        finite = torch.where(magnitude < 0x38800000, tiny, normal)
        narrowed = torch.where(nan, 0x7E00, torch.where(magnitude < 0x47800000, finite, 0x7C00))
    return (narrowed | sign).to(torch.int16).view(dtype)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 numbers as bf16, to nearest (ties away from zero), and 16-bit remainders: both together are exact."""
    bits = bits_of(x)
    bits = torch.where((bits & 0x7FFFFFFF) > INFINITY, QUIET_NAN, bits)
    upper = (bits.to(torch.int64) + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
    return upper, bits.to(torch.int16)


def join(upper: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 numbers that `split` took apart; zeros that somebody has written beside negative remainders stay."""
    high = upper.contiguous().view(torch.int16).to(torch.int64)
    bits = high * 65536 + torch.where((high & 0x7FFF == 0) & (remainder < 0), 0, remainder)
    return bits.to(torch.int32).view(torch.float32)


def remainder_of(x: Tensor, upper: Tensor) -> Tensor:
    """The remainder with which ``upper``, already rounded in some way, comes nearest to the fp32 ``x``."""
    difference = bits_of(x).to(torch.int64) - upper.contiguous().view(torch.int16).to(torch.int64) * 65536
    return torch.where(x.isfinite(), difference.clamp(-0x8000, 0x7FFF), 0).to(torch.int16)


def compensate(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 numbers in ``dtype``, rounded to nearest even, and what that lost, in ``dtype`` too."""
    narrowed = x.to(dtype)
    lost = torch.where(narrowed.isfinite(), x - narrowed.float(), 0.0)
    return narrowed, lost.to(dtype)


def flat(tensor: Tensor) -> Tensor:
    """The numbers of a dense tensor in the order of their memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def elements_of(tensor: Tensor) -> Tensor:
    """The number of each element in the order of the memory that a dense tensor like ``tensor`` has."""
    numbers = layout.dense_like(tensor, torch.int64)
    flat(numbers).copy_(torch.arange(tensor.numel(), device=tensor.device))
    return numbers


def blocks_of(numel: int) -> int:
    return -(-numel // BLOCK)


class Quantizer(NamedTuple):
    """A way to store states in codes of ``bits`` bits, with a scale for each block: csrc/codecs.h's Quantizer.

    Codes of 4 bits lie two in a byte, along the memory of what they stand for, the first one in the lower half. Their
    tensor has half of the innermost dimension; or it is flat, where that dimension is odd and the order is the logical
    one.
    """

    name: str  # as the option state_dtype has it
    bits: int

    def steps(self, signed: bool) -> float:
        """Into how many steps the root of a scale is divided."""
        return float((1 << self.bits - 1) - 1 if signed else 1 << self.bits)

    def code(self, signed: bool) -> torch.dtype:
        return torch.int8 if signed and self.bits == 8 else torch.uint8

    def codes_layout(self, like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shape and strides of the codes of a tensor like the dense ``like``; None: it cannot be stored in this way."""
        shape, strides, numel = list(like.shape), list(like.stride()), like.numel()
        if self.bits == 8:
            return tuple(shape), tuple(strides)
        inner = next((d for d in range(like.dim()) if shape[d] > 1 and strides[d] == 1), None)
        if numel < 2 or inner is None:
            return None
        if shape[inner] % 2:
            return (((numel + 1) // 2,), (1,)) if like.is_contiguous() else None
        shape[inner] //= 2
        return tuple(shape), tuple(stride if d == inner else stride // 2 for d, stride in enumerate(strides))

    def pack(self, numbers: Tensor) -> Tensor:
        """Bytes of codes in a row, given as whole numbers."""
        if self.bits == 8:
            return numbers
        pairs = torch.nn.functional.pad(numbers, (0, numbers.numel() % 2)).view(-1, 2) & 0xF
        return pairs[:, 0] | pairs[:, 1] << 4

    def unpack(self, codes: Tensor, signed: bool, numel: int) -> Tensor:
        """Codes in a row as whole numbers."""
        if self.bits == 8:
            return codes.to(torch.int32)
        pairs = codes.to(torch.int32)
        numbers = torch.stack([pairs & 0xF, pairs >> 4], dim=1).view(-1)[:numel]
        return (numbers ^ 8) - 8 if signed else numbers


EIGHT_BITS, FOUR_BITS = Quantizer("8bit", 8), Quantizer("4bit", 4)
QUANTIZERS = {quantizer.name: quantizer for quantizer in (EIGHT_BITS, FOUR_BITS)}


def quantizer_for(name: str, like: Tensor) -> Quantizer:
    """The quantizer of that name, or of more bits where a tensor like the dense ``like`` cannot be stored in it."""
    quantizer = QUANTIZERS[name]
    return EIGHT_BITS if quantizer.codes_layout(like) is None else quantizer


def quantizer_of(codes: Tensor, like: Tensor) -> Quantizer | None:
    """How a tensor like ``like`` is stored in these codes; None: they are none of it."""
    if codes.dtype not in CODES:
        return None
    if codes.shape == like.shape:
        return EIGHT_BITS
    is_pairs = codes.dtype == torch.uint8 and strides_of(codes, FOUR_BITS, like) is not None
    return FOUR_BITS if is_pairs else None


def strides_of(codes: Tensor, quantizer: Quantizer, like: Tensor) -> tuple[int, ...] | None:
    """The strides of what dense codes of a tensor like ``like`` stand for; None: they are none of it."""
    if quantizer.bits == 8:
        return codes.stride() if codes.shape == like.shape else None
    numel = like.numel()
    if numel < 2 or codes.numel() != (numel + 1) // 2:
        return None
    if codes.dim() == 1:
        return torch.empty(like.shape, device="meta").stride()
    halved = [d for d, (a, b) in enumerate(zip(codes.shape, like.shape, strict=False)) if a != b]
    if codes.dim() != like.dim() or len(halved) != 1 or codes.shape[halved[0]] * 2 != like.shape[halved[0]]:
        return None
    inner = halved[0]
    if not layout.is_dense(codes) or (codes.shape[inner] > 1 and codes.stride(inner) != 1):
        return None
    return tuple(1 if d == inner else 2 * stride for d, stride in enumerate(codes.stride()))


def are_laid_out_as(codes: Tensor, quantizer: Quantizer, like: Tensor) -> bool:
    """Whether dense codes are in the order of the memory of the dense ``like``."""
    if quantizer.bits == 8:
        return layout.same_layout(codes, like)
    codes_layout = quantizer.codes_layout(like)
    return codes_layout is not None and layout.same_layout(codes, torch.empty_strided(*codes_layout, device="meta"))


def pieces(values: Tensor, codes: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Whole blocks of a tensor at a time, in the order of its memory."""
    size = PIECE if codes.numel() == values.numel() else PIECE // 2
    return zip(flat(values).split(PIECE), flat(codes).split(size), scales.split(PIECE // BLOCK), strict=True)


def quantize(values: Tensor, quantizer: Quantizer, signed: bool) -> tuple[Tensor, Tensor]:
    """A dense fp32 tensor as codes along its memory, and one fp32 scale for each block of them."""
    shape, strides = quantizer.codes_layout(values)
    codes = torch.empty_strided(shape, strides, dtype=quantizer.code(signed), device=values.device)
    scales = torch.empty(blocks_of(values.numel()), dtype=torch.float32, device=values.device)
    for wide, target, target_scales in pieces(values, codes, scales):
        some_codes, some_scales = quantize_blocks(wide, quantizer, signed)
        target.copy_(quantizer.pack(some_codes))
        target_scales.copy_(some_scales)
    return codes, scales


def quantize_blocks(values: Tensor, quantizer: Quantizer, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes of some numbers in a row, and their scales."""
    numel = values.numel()
    padded = torch.zeros(blocks_of(numel) * BLOCK, dtype=torch.float32, device=values.device)
    padded[:numel] = values
    bits = bits_of(padded).view(-1, BLOCK)
    magnitude = bits & 0x7FFFFFFF
    max_abs = magnitude.amax(1)
    coded = (max_abs >= SMALLEST_NORMAL) & (max_abs < INFINITY)
    scales = torch.where(coded, max_abs, (max_abs >= INFINITY) * QUIET_NAN).to(torch.int32).view(torch.float32)
    inverse = torch.where(coded, 1.0 / scales, 0.0)
    relative = bits_of(magnitude.view(torch.float32) * inverse[:, None])
    shift, bias = ROOT_BIAS[signed]
    root = ((relative >> shift) + bias).view(torch.float32)
    nearest = bits_of(root * quantizer.steps(signed) + 2.0**23) - 0x4B000000
    if signed:
        codes = torch.where(bits < 0, -nearest, nearest)
    else:
        codes = (nearest - 1).clamp(min=0)
    return torch.where(coded[:, None], codes, 0).view(-1)[:numel], scales


def dequantize(codes: Tensor, scales: Tensor, quantizer: Quantizer, signed: bool, like: Tensor) -> Tensor:
    """The fp32 numbers of a tensor like ``like``, in the layout of the dense ``codes``."""
    strides = strides_of(codes, quantizer, like)
    values = torch.empty_strided(like.shape, strides, dtype=torch.float32, device=codes.device)
    for target, some_codes, some_scales in pieces(values, codes, scales):
        numbers = quantizer.unpack(some_codes, signed, target.numel())
        target.copy_(dequantize_blocks(numbers, some_scales, quantizer, signed))
    return values


def dequantize_blocks(numbers: Tensor, scales: Tensor, quantizer: Quantizer, signed: bool) -> Tensor:
    """The numbers of some codes in a row."""
    steps = quantizer.steps(signed)
    shift, bias = ROOT_BIAS[signed]
    if signed:
        root = numbers.abs().to(torch.float32) * torch.tensor(1.0 / steps, dtype=torch.float32, device=numbers.device)
        relative = torch.where(numbers == 0, 0, (bits_of(root) - bias) << shift).view(torch.float32)
        relative = torch.where(numbers < 0, -relative, relative)
    else:
        root = (numbers + 1).to(torch.float32) * (1.0 / steps)
        relative = ((bits_of(root) - bias) << shift).view(torch.float32)
    return relative * scales.repeat_interleave(BLOCK)[: numbers.numel()]
