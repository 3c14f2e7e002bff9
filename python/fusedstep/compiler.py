"""What torch.compile shall leave alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable


def keep_from_compiler(function: Callable) -> None:
    """Let torch.compile break its graph at ``function`` and leave alone all that it calls.

    The same as `torch.compiler.disable`, which would cost 2 us in every call and import the compiler.
    """
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = "fusedstep calls its own kernels"
    with contextlib.suppress(ImportError, AttributeError, TypeError):  # a torch that has other names for these
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
