"""Options that every optimizer takes beside those of its rule."""

from __future__ import annotations

from typing import TypedDict


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, beside those of its rule.

    Args:
        backend: "auto" (default), "cuda", "triton", "cpu" or "reference".
    """

    backend: str | None
