"""Whether the compiled extension is there."""

from __future__ import annotations

import importlib


def _import_extension() -> list[str]:
    try:
        extension = importlib.import_module("fusedstep._C")
    except ImportError as error:
        return [f"the compiled extension cannot be imported ({error}); reinstall fusedstep with a C++17 compiler"]
    extension.look_up_torch()  # here, under the import lock, because it must not run in two threads at once
    return []


_REASONS = _import_extension()


def extension_reasons() -> list[str]:
    """Why the extension `fusedstep._C` cannot be used; empty if it can."""
    return _REASONS
