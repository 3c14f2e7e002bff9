"""Where in the user's own code a warning points."""

from __future__ import annotations

import sys


def level_of_the_user() -> int:
    """The ``stacklevel`` at which a warning of the calling function points outside of this package and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fusedstep", "torch"):
        frame, level = frame.f_back, level + 1
    return level
