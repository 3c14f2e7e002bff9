"""Launches of one kernel with the same compile-time arguments: looked up once, then called directly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
from triton.runtime import driver


class Prepared:
    """A kernel with its compile-time arguments.

    Triton looks a kernel up in each launch by the types of all arguments, which takes longer than the launch itself.
    Here nothing but the device and the absence of optional arguments can differ between launches (the kernels ask for
    no specialisation), so that what the first launch has looked up, or compiled, is called by all that follow.
    """

    def __init__(
        self, kernel: triton.JITFunction, constants: dict[str, Any], num_warps: int = 8, **options: Any
    ) -> None:
        self.kernel = kernel
        self.constants = constants
        self.options = {"num_warps": num_warps, "enable_fp_fusion": False, **options}
        self.values = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, device: torch.device, programs: int, *args: Any) -> None:
        """Queue ``programs`` programs on the current stream of ``device``; ``args`` come before the constants."""
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(device, programs, args)
        else:
            self._launch(device, programs, args)

    def _launch(self, device: torch.device, programs: int, args: tuple) -> None:
        if not isinstance(self.kernel, triton.JITFunction):
            with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of infinities
                self.kernel[(programs,)](*args, **self.constants, **self.options)
            return
        key = (device.index, *[arg is None for arg in args])
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.kernel[(programs,)](*args, **self.constants, **self.options)
        else:
            stream = driver.active.get_current_stream(device.index)
            compiled[(programs, 1, 1)](*args, *self.values, stream=stream)
