"""Quantizers by themselves: bounds, blocks that are not finite, two codes in a byte, memory."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kinds import each, examples
from torch.utils._python_dispatch import TorchDispatchMode

from fusedstep import codecs

by_quantizer = pytest.mark.parametrize("quantizer", codecs.QUANTIZERS.values(), ids=codecs.QUANTIZERS)


def back_and_forth(x, quantizer, signed):
    codes, scales = codecs.quantize(x, quantizer, signed)
    return codes, scales, codecs.dequantize(codes, scales, quantizer, signed, x)


@by_quantizer
@pytest.mark.parametrize("signed", [True, False])
@hypothesis.given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=600), seed=st.integers(0, 99)
)
@examples(150)
def test_quantized_numbers_are_within_their_bound(quantizer, signed, values, seed):
    """Half a step of the root, times the largest slope of its inverse in that step, relative to the scale.

    Where the root is r the slope is at most 2 sqrt(2) r, or 2^2.75 r^3; the trick's root is at most 1.0607 times the
    true one. Without a sign what is near zero takes the first code.
    """
    x = torch.tensor(values) * torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    x = x if signed else x.abs()
    codes, scales, back = back_and_forth(x, quantizer, signed)
    scale = scales.double().repeat_interleave(256)[: len(x)]
    assert torch.equal(scales, torch.stack([b.abs().max() for b in x.split(256)]) * (scales > 0))
    coded = scale > 0
    y = x.double().abs()[coded] / scale[coded]
    half = 0.5 / quantizer.steps(signed)
    root = 1.0607 * y ** (0.5 if signed else 0.25) + half
    bound = half * 8**0.5 * root if signed else half * 2**2.75 * root**3 + (2 * half) ** 4
    error = (back.double()[coded] - x.double()[coded]).abs() / scale[coded]
    assert (error <= bound * (1 + 1e-5)).all()
    assert (back[~coded] == 0).all()
    assert (back[coded] * x[coded] >= 0).all()
    assert signed or (back[scale > 2.0**-90] > 0).all()  # of smaller scales a 2^-32th is none
    again, same, _ = back_and_forth(back, quantizer, signed)
    assert torch.equal(again, codes)
    assert torch.equal(same, scales)


@pytest.mark.parametrize(("quantizer", "share"), [(codecs.EIGHT_BITS, 0.01), (codecs.FOUR_BITS, 0.16)])
def test_quantized_normal_numbers_are_near(quantizer, share):
    x = torch.randn(100_000)
    for value, signed in ((x, True), (x.square(), False)):
        *_, back = back_and_forth(value, quantizer, signed)
        assert (back - value).norm() < share * value.norm()


@each(signed=[True, False], quantizer=codecs.QUANTIZERS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_block_that_is_not_finite_is_not_a_number(quantizer, bad, signed):
    x = torch.ones(600)
    x[300] = bad
    codes, _, back = back_and_forth(x, quantizer, signed)
    assert back[256:512].isnan().all()
    assert (back[:256] == 1).all()
    assert (back[512:] == 1).all()
    assert (codes[256 * quantizer.bits // 8 : 512 * quantizer.bits // 8] == 0).all()


@pytest.mark.parametrize(
    ("shape", "order", "expected"),
    [
        ((64, 96), (0, 1), ((64, 48), (48, 1))),
        ((64, 96), (1, 0), ((32, 96), (1, 32))),
        ((6, 8, 5, 7), (0, 2, 3, 1), ((6, 4, 5, 7), (140, 1, 28, 4))),  # channels last
        ((6, 8, 5, 7), (0, 1, 2, 3), ((840,), (1,))),
        ((5001,), (0,), ((2501,), (1,))),
        ((33, 97), (1, 0), None),
        ((1, 1), (0, 1), None),
    ],
)
def test_two_codes_share_a_byte_along_the_memory(shape, order, expected):
    x = torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    assert codecs.FOUR_BITS.codes_layout(x) == expected
    if expected is None:
        return
    codes, _, back = back_and_forth(x, codecs.FOUR_BITS, True)
    assert (tuple(codes.shape), codes.stride()) == expected
    assert back.stride() == x.stride()
    assert codecs.quantizer_of(codes, x) is codecs.FOUR_BITS
    # The same numbers in a row have the same codes.
    in_a_row, _, numbers = back_and_forth(codecs.flat(x).clone(), codecs.FOUR_BITS, True)
    assert torch.equal(codecs.flat(codes), in_a_row)
    assert torch.equal(codecs.flat(back), numbers)
    signs = torch.stack([in_a_row & 0xF, in_a_row >> 4], dim=1).view(-1)[: x.numel()]
    assert torch.equal((signs ^ 8).to(torch.int8) - 8 < 0, numbers < 0)


@each(n=[2, 1024, 1025, 5000], quantizer=codecs.QUANTIZERS, signed=[True, False])
def test_what_coding_takes_beside_the_numbers_does_not_grow_with_them(monkeypatch, quantizer, signed, n):
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.untyped_storage().nbytes())
            return result

    x = torch.randn(n) if signed else torch.randn(n).square()
    codes, scales, values = back_and_forth(x, quantizer, signed)
    monkeypatch.setattr(codecs, "PIECE", 1024)
    with Watch():
        *again, back = back_and_forth(x, quantizer, signed)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)
    assert torch.equal(back, values)
    kept = (n, 4 * n, (n + 1) // 2)  # codes and numbers
    assert all(size <= 8 * 1024 or size in kept for size in sizes)
