"""Plans whose CUDA kernels run on the host, thread by thread, and the seam's structures as ctypes.

The optimizers are whole, only the launch is replaced: layouts, dtypes, missing gradients and skipped steps go through
the plan that a GPU would have. It proves nothing of a GPU.
"""

import ctypes
import functools
import shutil
from abc import abstractmethod

import numpy as np
import pytest
import torch
from compiling import ROOT, linked

from fusedstep import _C, backends
from fusedstep.backends.cpu import CpuBackend, CpuPlan
from fusedstep.backends.plan import KernelPlan
from fusedstep.record import memory_layout

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TAG = {dtype: tag for tag, dtype in enumerate((*FLOATS, torch.int8, torch.uint8))}
MAX_HYPER = 10


class Scalar(ctypes.Structure):
    _fields_ = [("value", ctypes.c_double), ("tensor", ctypes.c_void_p), ("dtype", ctypes.c_uint8)]


# The undefined-behaviour checks trap, which needs no runtime library inside this Python.
FLAGS = [
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
    *("-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-DFUSEDSTEP_ISA=host"),
]


@functools.cache
def built(name, *sources):
    """A library of the kernels' source for the host, from files of ``tests/cuda_host`` and ``csrc``."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    paths = [next(p for p in (ROOT / "tests/cuda_host" / s, ROOT / "csrc" / s) if p.exists()) for s in sources]
    loaded = ctypes.CDLL(str(linked(name, [(path, [compiler, *FLAGS]) for path in paths], [compiler, "-shared"])))
    assert loaded.record_size() == memory_layout().itemsize
    return loaded


def step_library():
    """The kernels of elementwise rules, of norms and of schedules."""
    steps = sorted(path.name for path in (ROOT / "tests/cuda_host").glob("step_*.cpp"))
    loaded = built("steps", "library.cpp", "cuda_table.cpp", "cuda_norm_table.cpp", *steps)
    loaded.check_chunks.restype = ctypes.c_int64
    return loaded


def flag(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def at(array):
    return ctypes.c_void_p(array.ctypes.data)


class HostPlan(KernelPlan):
    """What the plans of all CUDA kernels have; `run` calls one."""

    library = None
    blocks = 3

    def launch(self, step):
        native, records = self.native, self.native_records()
        scalars = (Scalar * MAX_HYPER)()
        for scalar, value in zip(scalars, step.hyper, strict=False):
            if isinstance(value, torch.Tensor):
                scalar.tensor, scalar.dtype = value.data_ptr(), TAG[value.dtype]
            else:
                scalar.value = float(value)
        gradients = (
            *map(ctypes.c_bool, (step.maximize, step.zero_grads, step.write_grads)),
            *map(flag, (step.grad_scale, step.found_inf, step.coefficient)),
            ctypes.c_double(step.average_weight),
        )
        addresses = np.frombuffer(native.grad_pointers(), dtype=np.int64).copy()
        launches = self.run(scalars, gradients, (at(records), ctypes.c_int64(len(records)), at(addresses)))
        assert launches > 0, "a counter is not ready for the next step"
        native.increment_written(step.changes_grads)
        native.release_grads()
        return launches

    @abstractmethod
    def run(self, scalars, gradients, tensors):
        """Call the kernels; returns the number of launches."""


class ElementwiseHostPlan(HostPlan):
    threads = 64
    general = False  # whether every parameter goes through the kernel for those that have none of their own

    def run(self, scalars, gradients, tensors):
        rule = _C.rule_id(self.rule, list(self.states))
        how = (2, ctypes.c_bool(self.general), self.threads)
        return self.library.host_step(rule, scalars, *gradients, *tensors, *how)


class ElementwiseHostBackend(CpuBackend):
    def plan(self, *args):
        return ElementwiseHostPlan(self, *args)


def run_on_the_host(monkeypatch):
    """Makes backend="cpu" run the CUDA kernels of elementwise rules on the host."""
    monkeypatch.setattr(HostPlan, "library", step_library())
    monkeypatch.setitem(backends.BACKENDS, "cpu", ElementwiseHostBackend())
    monkeypatch.setattr(backends, "_selected", {})


class ReducingHostPlan(HostPlan):
    def run(self, scalars, gradients, tensors):
        return self.library.host_reducing_step(self.rule.encode(), len(self.states), scalars, *gradients, *tensors)


class ReducingHostBackend(CpuBackend):
    def plan(self, optimizer, group, options, variant, *args):
        kind = ReducingHostPlan if optimizer.rule_of(variant)[1] else CpuPlan
        return kind(self, optimizer, group, options, variant, *args)


def reducing_library():
    """The kernels of rules that reduce."""
    return built("reducing", "reducing.cpp", "cuda_reducing_table.cpp")


def run_reducing_on_the_host(monkeypatch):
    """Makes backend="cpu" run the CUDA kernels of rules that reduce on the host."""
    monkeypatch.setattr(HostPlan, "library", reducing_library())
    monkeypatch.setitem(backends.BACKENDS, "cpu", ReducingHostBackend())
    monkeypatch.setattr(backends, "_selected", {})


def launches_of(case):
    """Of a rule that reduces, on tensors of one dtype: two or three passes over tiles of whole vectors, and over all
    else."""
    passes = 2 * (2 if case.optimizer == "Amos" else 3)
    # Amos' scalars are updated by an elementwise rule, its vectors by rows whatever is reduced.
    return {(-1,): passes + 1, (0,): 2 * passes + 1}.get(case.options.get("reduce"), passes)
