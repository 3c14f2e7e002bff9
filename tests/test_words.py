"""Where torch keeps a tensor's address, gradient, version and so on is found by their values."""

import torch

from fusedstep import _C


def test_all_words_are_found_each_time_whatever_memory_held_before():
    first = _C.find_words()
    assert min(first.values()) >= 0, first
    for number in range(100):
        # Objects of torch's whose memory the next ones get: padding holds what was there.
        held = [torch.empty(3).detach() for _ in range(number)]
        held += [tensor.requires_grad_() for tensor in held[::3]]
        del held
        assert _C.find_words() == first
