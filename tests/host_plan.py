"""Plans whose CUDA kernels run on the host, thread by thread, and the seam's structures as ctypes.

The optimizers are whole, only the launch is replaced: layouts, dtypes, missing gradients and skipped steps go through
the plan that a GPU would have. It proves nothing of a GPU.
"""

import ctypes
import functools
import shutil
import weakref
from abc import abstractmethod

import numpy as np
import pytest
import torch
from compiling import ROOT, linked

from fusedstep import _C, backends
from fusedstep.backends.cpu import CpuBackend, CpuPlan
from fusedstep.backends.parts import CudaPartsPlan
from fusedstep.backends.plan import KernelPlan
from fusedstep.lines import Lines
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


def given_to(native, step):
    """What a kernel is given of a step: hyperparameters, what becomes of gradients, and the gradients of a plan."""
    scalars = (Scalar * MAX_HYPER)()
    for scalar, value in zip(scalars, step.hyper, strict=False):
        if isinstance(value, torch.Tensor):
            scalar.tensor, scalar.dtype = value.data_ptr(), TAG[value.dtype]
        else:
            scalar.value = float(value)
    changes = (
        *map(ctypes.c_bool, (step.maximize, step.zero_grads, step.write_grads)),
        *map(flag, (step.grad_scale, step.found_inf, step.coefficient)),
        ctypes.c_double(step.average_weight),
    )
    return scalars, changes, np.frombuffer(native.grad_pointers(), dtype=np.int64).copy()


class HostPlan(KernelPlan):
    """What the plans of all CUDA kernels have; `run` calls one."""

    library = None
    blocks = 3

    def launch(self, step):
        native, records = self.native, self.native_records()
        scalars, changes, addresses = given_to(native, step)
        launches = self.run(scalars, changes, (at(records), ctypes.c_int64(len(records)), at(addresses)))
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
    loaded = built("reducing", "reducing.cpp", "cuda_reducing_table.cpp")
    loaded.host_parts.restype = ctypes.c_void_p
    return loaded


def run_reducing_on_the_host(monkeypatch):
    """Makes backend="cpu" run the CUDA kernels of rules that reduce on the host."""
    monkeypatch.setattr(HostPlan, "library", reducing_library())
    monkeypatch.setitem(backends.BACKENDS, "cpu", ReducingHostBackend())
    monkeypatch.setattr(backends, "_selected", {})


class HostPartsPlan(CudaPartsPlan):
    """The plan of parts that a GPU would have, but for the calls of the engine."""

    handle = None
    version = None  # of the gradients' dtypes, for which it was made

    def upload_if_changed(self):
        if self.version == self.native.grad_dtypes_version():
            return
        self.version, library, records = self.native.grad_dtypes_version(), reducing_library(), self.native_records()
        self.named = self.rule.encode(), len(self.states)
        wholes = np.array(self.wholes, np.int64)
        handle = library.host_parts(*self.named, at(records), ctypes.c_int64(len(records)), at(wholes))
        self.handle = ctypes.c_void_p(handle)
        weakref.finalize(self, library.free_host_table, self.handle)
        sums = []
        for stage in range(3):
            sums.append([])
            for record in range(len(records)):
                sizes = (ctypes.c_int64 * 3)()
                found = library.host_sums(self.handle, stage, ctypes.c_int64(record), sizes)
                sums[-1].append(sizes[:found])
        self.lay_out(sums)
        self.memory = self.work = torch.empty(0)

    def _run(self, step):
        scalars, changes, addresses = given_to(self.native, step)
        numbers = (ctypes.c_void_p * 3)(*(numbers.data_ptr() for numbers in self.numbers))
        given = self.handle, numbers, self.number, *self.named, scalars, *changes, at(addresses)
        launches = reducing_library().host_stage(*given)
        assert launches >= 0, "a counter is not ready for the next step"
        self.calls += launches
        if self.number == 3:
            self.native.increment_written(step.changes_grads)
            self.native.release_grads()


class HostPartsBackend(CpuBackend):
    def plan(self, *args):
        return HostPartsPlan(self, *args)


class StagedHostPlan(HostPartsPlan):
    """Of whole tensors, which are parts too: each stage goes on from the sums of the one before."""

    def launch(self, step):
        lines = (Lines.of_matrices(r.matrices, 0 if r.param is None else r.param.numel()) for r in self.records)
        self.begin(step, dict(enumerate(lines)))
        for _ in range(2):
            self.advance(step.found_inf)
        self.write()
        return super().launch(step)


class StagedHostBackend(CpuBackend):
    def plan(self, optimizer, group, options, variant, *args):
        kind = StagedHostPlan if optimizer.rule_of(variant)[1] else CpuPlan
        return kind(self, optimizer, group, options, variant, *args)


def run_stages_on_the_host(monkeypatch):
    """The same, as for parts of tensors."""
    reducing_library()
    monkeypatch.setitem(backends.BACKENDS, "cpu", StagedHostBackend())
    monkeypatch.setattr(backends, "_selected", {})


def launches_of(case, stages=False):
    """Of a rule that reduces, on tensors of one dtype: two or three passes over tiles of whole vectors, and over all
    else; and those of the stages."""
    is_amos = case.optimizer == "Amos"
    passes = 2 * (2 if is_amos else 3) + stages * (1 if is_amos else 4)
    # Amos' scalars are updated by an elementwise rule, its vectors by rows whatever is reduced.
    return {(-1,): passes + 1, (0,): 2 * passes + 1}.get(case.options.get("reduce"), passes)
