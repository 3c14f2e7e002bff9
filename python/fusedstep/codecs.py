"""How weights and states are stored in fewer bits: the reference that every engine repeats to the same bits.

Only integer operations and single IEEE additions, multiplications and divisions occur. csrc/codecs.h and
triton_kernels/codecs.py hold the same functions; csrc/codecs.h explains the formats.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def pieces(values: Tensor, codes: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Whole blocks of a tensor at a time, in the order of its memory."""
    return zip(flat(values).split(PIECE), flat(codes).split(PIECE), scales.split(PIECE // BLOCK), strict=True)


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """A dense fp32 tensor as 8-bit codes in its layout, and one fp32 scale for each block along its memory."""
    dtype = torch.int8 if signed else torch.uint8
    codes = torch.empty_strided(values.shape, values.stride(), dtype=dtype, device=values.device)
    scales = torch.empty(blocks_of(values.numel()), dtype=torch.float32, device=values.device)
    for wide, target, target_scales in pieces(values, codes, scales):
        some_codes, some_scales = encode_blocks(wide, signed)
        target.copy_(some_codes)
        target_scales.copy_(some_scales)
    return codes, scales


def encode_blocks(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes of some numbers in a row, and their scales."""
    numel = values.numel()
    padded = torch.zeros(blocks_of(numel) * BLOCK, dtype=torch.float32, device=values.device)
    padded[:numel] = values
    bits = bits_of(padded).view(-1, BLOCK)
    magnitude = bits & 0x7FFFFFFF
    largest = magnitude.amax(1)
    coded = (largest >= SMALLEST_NORMAL) & (largest < INFINITY)
    scales = torch.where(coded, largest, (largest >= INFINITY) * QUIET_NAN).to(torch.int32).view(torch.float32)
    inverse = torch.where(coded, 1.0 / scales, 0.0)
    relative = bits_of(magnitude.view(torch.float32) * inverse[:, None])
    shift, bias = ROOT_BIAS[signed]
    root = ((relative >> shift) + bias).view(torch.float32)
    nearest = bits_of(root * (127.0 if signed else 256.0) + 2.0**23) - 0x4B000000
    if signed:
        codes = torch.where(bits < 0, -nearest, nearest)
    else:
        codes = (nearest - 1).clamp(min=0)
    return torch.where(coded[:, None], codes, 0).view(-1)[:numel], scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The fp32 numbers, in the layout of the dense ``codes``; their dtype tells the code: int8 has a sign."""
    values = torch.empty_strided(codes.shape, codes.stride(), dtype=torch.float32, device=codes.device)
    for target, some_codes, some_scales in pieces(values, codes, scales):
        target.copy_(decode_blocks(some_codes, some_scales))
    return values


def decode_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers of some codes in a row."""
    number = codes.to(torch.int32)
    signed = codes.dtype == torch.int8
    shift, bias = ROOT_BIAS[signed]
    if signed:
        root = number.abs().to(torch.float32) * torch.tensor(1.0 / 127.0, dtype=torch.float32, device=codes.device)
        relative = torch.where(number == 0, 0, (bits_of(root) - bias) << shift).view(torch.float32)
        relative = torch.where(number < 0, -relative, relative)
    else:
        root = (number + 1).to(torch.float32) * (1.0 / 256.0)
        relative = ((bits_of(root) - bias) << shift).view(torch.float32)
    return relative * scales.repeat_interleave(BLOCK)[: codes.numel()]
