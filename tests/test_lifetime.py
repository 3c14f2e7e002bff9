"""How long memory lives that a kernel call was given: a captured graph and other streams use it after the call.

CPU tensors stand for those of a GPU, a list for what the allocator is told, and a launch writes down what it was given.
"""

import gc
import shutil
import subprocess
import weakref
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fusedstep
from fusedstep import _C, planning, schedules
from fusedstep.backends import BACKENDS, lifetime
from fusedstep.backends.parts import CUDA_PARTS
from fusedstep.lines import Lines
from fusedstep.record import memory_layout

CAPTURED = "while a CUDA graph is captured; run one step.* before capturing"


class Table:
    """In the place of the tables of addresses that a plan uploads."""

    work_bytes = 48

    def __init__(self, native, *multiprocessors):
        self.version = native.grad_dtypes_version()

    def fits(self, native):
        return self.version == native.grad_dtypes_version()

    def bytes(self):
        return bytearray(64)


class Gpu:
    """What stands in for one: the launches, the streams that the allocator was told of, and what happens now."""

    def __init__(self, monkeypatch):
        self.capturing = False
        self.stream = 1
        self.given = []  # addresses, in the last launch
        self.told = []  # (address, stream)
        gpu = self

        class NormTable(Table):
            def launch(self, native, memory, norm, grad_scale, found_inf_before, limits, found_inf, first):
                gpu.given += [memory, norm, found_inf, *gpu.addresses(grad_scale, found_inf_before)]
                return 1

        def step(native, table, memory, work, step):
            tensors = [t for t in (*step.hyper, *step) if isinstance(t, torch.Tensor)]
            records = np.frombuffer(native.records(), memory_layout())
            pointers = [records[name].ravel().tolist() for name in ("param", "step", "states")]
            gpu.given += [memory, work, *filter(None, chain.from_iterable(pointers)), *gpu.addresses(*tensors)]
            native.release_grads()
            return 1

        def advance(values, table, n, found_inf, device):
            gpu.given += [values, table, *filter(None, [found_inf])]

        monkeypatch.setattr(BACKENDS["cuda"].__class__, "reasons", lambda self, device, dtype=None: [])
        monkeypatch.setattr(lifetime, "is_capturing", lambda device: gpu.capturing)
        monkeypatch.setattr(lifetime, "current_stream", lambda device: gpu.stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.stream)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: gpu.told.append((tensor.data_ptr(), stream))
        )
        for name, value in {
            "CudaTable": Table,
            "CudaNormTable": NormTable,
            "cuda_multiprocessors": lambda index: 1,
            "cuda_step": step,
            "cuda_advance_schedules": advance,
        }.items():
            monkeypatch.setattr(_C, name, value, raising=False)

    @staticmethod
    def addresses(*tensors):
        return [tensor.data_ptr() for tensor in tensors if tensor is not None]

    def capture(self, call):
        """Call while a graph is captured; what the launch was given, as references that keep nothing alive."""
        self.given, self.capturing = [], True
        try:
            call()
        finally:
            self.capturing = False
        storages = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
                storage = thing.untyped_storage()
                for address in self.given:
                    if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                        storages[address] = StorageWeakRef(storage)
        assert set(storages) == set(self.given)
        return list(storages.values())


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def give(params, dtype=torch.float32):
    for param in params:
        if dtype != param.dtype:
            param.grad_dtype = None
        param.grad = torch.ones_like(param, dtype=dtype)


def make(**options):
    params = [torch.nn.Parameter(torch.ones(n)) for n in (5, 70)]
    options = {"max_grad_norm": 1.0, "ema_decay": 0.9, "weights_copy": torch.bfloat16, **options}
    optimizer = fusedstep.AdamW(params, lr=torch.tensor(0.1), backend="cuda", **options)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    give(params)
    return optimizer, params


def other_gradients(optimizer, params):
    give(params)


def another_dtype(optimizer, params):
    give(params, torch.float16)


def a_new_group(optimizer, params):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    give(optimizer.param_groups[-1]["params"])


def a_loaded_state(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


def a_cleared_state(optimizer, params):
    optimizer.state.clear()


def other_numbers(optimizer, params):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.2)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)


changes = pytest.mark.parametrize(
    "change", [other_gradients, another_dtype, a_new_group, a_loaded_state, a_cleared_state, other_numbers]
)


@changes
def test_what_a_captured_launch_was_given_lives_as_long_as_the_optimizer(gpu, change):
    optimizer, params = make()
    optimizer.step()
    given = gpu.capture(optimizer.step)
    change(optimizer, params)
    optimizer.step()
    gc.collect()
    assert not any(storage.expired() for storage in given)


@pytest.mark.parametrize("change", [another_dtype, a_loaded_state, a_cleared_state, other_numbers])
def test_of_an_eager_launch_nothing_stays(gpu, change, monkeypatch):
    """Nothing else keeps it: what the test above sees is the doing of the optimizer."""
    optimizer, params = make()
    optimizer.step()
    monkeypatch.setattr(lifetime.Graphs, "keep", lambda *_: None)
    given = gpu.capture(optimizer.step)
    change(optimizer, params)
    optimizer.step()
    gc.collect()
    assert any(storage.expired() for storage in given)


def test_what_a_captured_accumulation_was_given_lives_as_long_as_the_accumulator(gpu):
    params = [torch.nn.Parameter(torch.ones(n)) for n in (5, 70)]
    accumulator = fusedstep.GradientAccumulator(params, set_to_none=False, backend="cuda")
    give(params)
    accumulator()
    given = gpu.capture(accumulator)
    give(params, torch.float16)
    accumulator()
    accumulator.load_state_dict(accumulator.state_dict())
    accumulator()
    gc.collect()
    assert not any(storage.expired() for storage in given)


def test_learning_rates_of_a_captured_step_live_as_long_as_the_optimizer(gpu):
    params = [torch.nn.Parameter(torch.ones(5))]
    optimizer = fusedstep.SGD(params, lr=schedules.LinearScheduler(10, 0.1), backend="cuda")
    give(params)
    optimizer.step()
    given = gpu.capture(optimizer.step)
    optimizer.param_groups[0]["lr"] = schedules.LinearScheduler(20, 0.1)
    optimizer.step()
    rates = optimizer.stepper.learning_rates
    rates.parts = rates.parts[1:]  # as after a move to another device
    rates.followed_by.clear()
    gc.collect()
    assert not any(storage.expired() for storage in given)


def test_a_copied_optimizer_keeps_nothing_for_graphs_that_it_does_not_have(gpu):
    import copy

    optimizer, _ = make()
    optimizer.step()
    gpu.capture(optimizer.step)
    assert optimizer.stepper.graphs.kept
    assert not copy.deepcopy(optimizer).stepper.graphs.kept


def test_what_was_kept_goes_with_the_optimizer_at_once(gpu):
    """On a GPU it is too much memory to wait for the garbage collector."""
    optimizer, _ = make()
    optimizer.step()
    gpu.capture(optimizer.step)
    kept = weakref.ref(optimizer.stepper.plans[0]), weakref.ref(optimizer.stepper.graphs)
    gc.disable()
    try:
        optimizer.stepper.plans = optimizer.stepper.graphs = None
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


def test_the_allocator_is_told_of_every_stream_once(gpu):
    optimizer, params = make()
    for stream in (1, 1, 2, 2):
        gpu.stream, gpu.given = stream, []
        before = len(gpu.told)
        give(params)
        optimizer.step()
        own = [a for a in gpu.given if any(a == address for address, _ in gpu.told)]
        assert {(address, stream) for address in own} == {told for told in gpu.told if told[1] == stream}
        assert len(own) >= 4  # the table, its work memory, the norm's table and its numbers
        assert (len(gpu.told) > before) == (len(gpu.told) == before + len(own))
    told = len(gpu.told)
    optimizer.step()
    assert len(gpu.told) == told


@pytest.mark.parametrize("what", ["step", "new group", "schedule", "accumulator"])
def test_what_cannot_be_captured_is_refused_before_anything_is_created(gpu, what):
    optimizer, params = make()
    subject = "step\\(\\) met new or changed tensors"
    call = optimizer.step
    if what == "accumulator":
        call = fusedstep.GradientAccumulator(params, backend="cuda")
        subject = "GradientAccumulator met new or changed tensors"
    elif what != "step":
        optimizer.step()
    if what == "new group":
        a_new_group(optimizer, params)
    elif what == "schedule":
        optimizer.param_groups[0]["lr"] = schedules.LinearScheduler(10, 0.1)
        subject = "a learning rate began to follow a schedule"
    before = {param: dict(state) for param, state in optimizer.state.items()}
    gpu.capturing, gpu.given = True, []
    with pytest.raises(RuntimeError, match=f"{subject} {CAPTURED}"):
        call()
    gpu.capturing = False
    assert not gpu.given
    assert {param: dict(state) for param, state in optimizer.state.items()}.keys() == before.keys()
    assert all(optimizer.state[p][k] is v for p, state in before.items() for k, v in state.items())
    call()
    assert gpu.given


def test_a_failed_call_of_the_runtime_is_not_reported_again(tmp_path):
    """By the next launch, which asks for the runtime's last error."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    (tmp_path / "cuda_runtime.h").write_text(
        """
        enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
        inline cudaError_t last = cudaSuccess;
        inline cudaError_t cudaGetLastError() { cudaError_t e = last; last = cudaSuccess; return e; }
        inline const char* cudaGetErrorString(cudaError_t) { return "invalid device"; }
        inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
        inline cudaError_t cudaSetDevice(int) { return last = cudaErrorInvalidDevice; }
        """
    )
    (tmp_path / "main.cpp").write_text(
        """
        #include "cuda/runtime.h"
        int main() {
          try {
            fusedstep::cuda::OnDevice on(7);
            return 1;
          } catch (const std::runtime_error&) {
          }
          return cudaGetLastError() != cudaSuccess;
        }
        """
    )
    csrc = Path(__file__).resolve().parent.parent / "csrc"
    command = [compiler, "-std=c++17", f"-I{tmp_path}", f"-I{csrc}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert subprocess.run(["./main"], cwd=tmp_path).returncode == 0


def test_another_stream_is_told_of_what_the_stages_of_parts_use(gpu, monkeypatch):
    """Which are the real plan's: it makes stages 0 to 3, on memory that stays, from stream to stream."""
    stages = []

    class PartsTable(Table):
        def __init__(self, native, multiprocessors, wholes):
            super().__init__(native)
            assert wholes == [(3, 4, 12)]
            self.sums = [[[3, 4, 1]], [[1]], [[1]]]

    def stage(native, table, memory, work, numbers, number, step):
        stages.append((number, memory, work, *numbers))
        return 1

    monkeypatch.setattr(_C, "CudaTable", PartsTable, raising=False)
    monkeypatch.setattr(_C, "cuda_stage", stage, raising=False)
    param = torch.nn.Parameter(torch.ones(3, 4))
    give([param])
    optimizer = fusedstep.TorchAdafactor([param])
    group = optimizer.param_groups[0]
    ((entry,),) = planning.entries(optimizer)
    variant = optimizer.variant_of(group, None, param)
    (plan,) = planning.build(optimizer, [[(entry, CUDA_PARTS, variant)]])
    for stream in (1, 2):
        gpu.stream = stream
        assert plan.gather()
        step = plan.step_with(optimizer.hyper(group, variant), found_inf=torch.tensor(0.0))
        sums = plan.begin(step, {0: Lines.of_part(optimizer, group, None, param)})
        assert [len(each) for each in sums[0]] == [3, 4, 1]
        for _ in range(2):
            sums = plan.advance(torch.tensor(1.0))
        assert [len(each) for each in sums[0]] == [1]
        plan.write()
        assert plan.step(step) == 4
    assert [number for number, *_ in stages] == [0, 1, 2, 3] * 2
    assert len({tuple(used) for _, *used in stages}) == 1
    assert {*stages[0][1:]} <= {address for address, stream in gpu.told if stream == 2}
