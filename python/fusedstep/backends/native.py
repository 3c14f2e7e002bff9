"""The compiled extension, and whether it is there."""

from __future__ import annotations

import importlib
from typing import Any

_C: Any = None  # the module `fusedstep._C`, where it can be imported


def _import_extension() -> list[str]:
    global _C
    try:
        _C = importlib.import_module("fusedstep._C")
    except ImportError as error:
        return [f"the compiled extension cannot be imported ({error}); reinstall fusedstep with a C++17 compiler"]
    _C.look_up_torch()  # here, under the import lock, because it must not run in two threads at once
    return []


_REASONS = _import_extension()


def extension_reasons() -> list[str]:
    """Why the extension `fusedstep._C` cannot be used; empty if it can."""
    return _REASONS
