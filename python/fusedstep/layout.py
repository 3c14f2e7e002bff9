"""Memory layouts: which tensors the kernels can take as flat memory, and dense copies of those that they cannot."""

from __future__ import annotations

import torch
from torch import Tensor


def same_layout(a: Tensor, b: Tensor) -> bool:
    """True if equal indices lie at equal offsets in ``a`` and ``b`` (strides of 1-element dimensions do not count)."""
    return a.shape == b.shape and all(s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1)


def is_dense(tensor: Tensor) -> bool:
    """True if the elements lie in memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """True if one memory location surely stands for several elements, as in an expanded tensor."""
    return tensor.numel() > 0 and any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def is_lazy(tensor: Tensor) -> bool:
    """True if the numbers are not those in memory: negated, or zeros without memory."""
    return tensor.is_neg() or tensor._is_zerotensor()


def has_memory(tensor: Tensor) -> bool:
    """False if there is nothing to read or write where a dense tensor lies: it wraps others, or was freed."""
    if tensor.numel() == 0:
        return True
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:  # torch's own classes that wrap others have no storage at all
        return False


def extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses between which a dense tensor lies."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum(stride * (size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def write(tensor: Tensor, values: Tensor) -> None:
    """Put ``values`` into a dense tensor, which may be expanded where they are equal."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def zero(tensor: Tensor) -> None:
    """Fill any tensor with zeros: dense or sparse, expanded or a wrapper; torch's own zeros are left as they are."""
    tensor = local(tensor)
    if not tensor._is_zerotensor():
        tensor.zero_()


def memory_key(tensor: Tensor) -> tuple:
    """Equal for two tensors that are the same memory, read in the same way."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, is_lazy(tensor)


def dense_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new dense tensor with the layout that `torch.zeros_like` gives the states of ``tensor``."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def laid_out_as(tensor: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of ``tensor`` with the strides of the dense ``like``, in its own dtype unless ``dtype`` is given."""
    copy = torch.empty_strided(like.shape, like.stride(), dtype=dtype or tensor.dtype, device=like.device)
    return copy.copy_(tensor)


def local(tensor: Tensor) -> Tensor:
    """The plain memory of a wrapper, such as a DTensor or a tensor still on its way; any other tensor as it is."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    inside = getattr(tensor, "_local_tensor", None)  # a DTensor's own; asked for a parameter's, it makes a view of it
    if inside is not None:
        tensor = inside
    elif is_wrapper(tensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def is_wrapper(tensor: Tensor) -> bool:
    """True for a tensor subclass that keeps its memory in another tensor, such as a DTensor."""
    return hasattr(tensor, "to_local")


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor's memory as real numbers; a real tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
