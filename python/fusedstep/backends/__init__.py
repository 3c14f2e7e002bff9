"""Backends behind one signature, and the choice among them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..caller import level_of_the_user
from .base import Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .native import _C, extension_reasons
from .reference import ReferenceBackend
from .triton import TritonBackend

__all__ = ["BACKENDS", "Backend", "check_choice", "select", "use_backend", "watch"]

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())
}
CHOICES = ("auto", *BACKENDS)

_default: ContextVar[str | None] = ContextVar("fusedstep_backend", default=None)  # of `use_backend`


def check_choice(name: str | None) -> str:
    """The backend to use: ``name``, else that of `use_backend`, else of FUSEDSTEP_BACKEND, else "auto".

    Raises:
        ValueError: there is no backend of that name.
    """
    source = "backend"
    if name is None:
        name = _default.get()
    if name is None:
        source = "FUSEDSTEP_BACKEND"
        name = os.environ.get("FUSEDSTEP_BACKEND") or "auto"
    if name not in CHOICES:
        raise ValueError(f"Invalid {source}: {name!r} (it must be one of {', '.join(CHOICES)})")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make ``name`` the backend of optimizers that are constructed inside the ``with`` block.

    Args:
        name: "auto", "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: there is no backend of that name.
    """
    token = _default.set(check_choice(name))
    try:
        yield
    finally:
        _default.reset(token)


_selected: dict[tuple[str, torch.device, torch.dtype], Backend] = {}


def select(choice: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for parameters of ``dtype`` on ``device``.

    With "auto", CUDA tensors take "cuda", else "triton"; CPU tensors take "cpu"; the rest takes "reference", with one
    warning that says why.

    Raises:
        RuntimeError: the backend that was asked for cannot run; the text gives its reasons.
    """
    key = (choice, device, dtype)
    if key not in _selected:
        _selected[key] = _select(*key)
    return _selected[key]


def _select(choice: str, device: torch.device, dtype: torch.dtype) -> Backend:
    if choice != "auto":
        reasons = BACKENDS[choice].reasons(device, dtype)
        if reasons:
            raise RuntimeError(
                f"backend='{choice}' cannot update {dtype} parameters on {device}: {'; '.join(reasons)}. "
                "Use backend='auto', or see `fusedstep info`"
            )
        return BACKENDS[choice]
    preferred = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device.type, ())
    refused = []
    for name in preferred:
        if name not in BACKENDS:
            continue
        reasons = BACKENDS[name].reasons(device, dtype)
        if not reasons:
            return BACKENDS[name]
        refused.append(f"{name}: {'; '.join(reasons)}")
    reasons = BACKENDS["reference"].reasons(device, dtype)
    if reasons:
        raise RuntimeError(f"no backend can update {dtype} parameters on {device}: {'; '.join(reasons)}")
    why = " | ".join(refused) or f"there are no kernels for {device.type}"
    warnings.warn(
        f"fusedstep updates {dtype} parameters on {device} with its slow reference implementation ({why})",
        stacklevel=level_of_the_user(),
    )
    return BACKENDS["reference"]


class _AlwaysChanged:
    """Stands in for the compiled watch where the extension is missing: plans are then built in every step."""

    def unchanged(self, *_: Any) -> bool:
        return False


def watch(state: dict[Tensor, Any], param_groups: list[dict[str, Any]]) -> Any:
    """Something whose ``unchanged(state, param_groups)`` tells whether an object in the two was replaced."""
    if extension_reasons():
        return _AlwaysChanged()
    return _C.ChangeDetector(state, param_groups)
