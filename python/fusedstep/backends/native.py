"""Whether the compiled extension is there."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def extension_reasons() -> list[str]:
    """Why the extension `fusedstep._C` cannot be used; empty if it can."""
    try:
        importlib.import_module("fusedstep._C")
    except ImportError as error:
        return [f"the compiled extension cannot be imported ({error}); reinstall fusedstep with a C++17 compiler"]
    return []
