"""How long memory lives that a Triton launch was given: a captured graph uses it after the call.

CPU tensors stand for those of a GPU, and a launch under the interpreter writes down what it was given.
"""

import gc
import importlib.util
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fusedstep
from fusedstep.backends import BACKENDS, lifetime
from fusedstep.backends import triton as backend

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def gpu(monkeypatch):
    """What stands in for one: whether it captures a graph, what launches are given, what the allocator is told."""
    reasons = BACKENDS["triton"].reasons(torch.device("cpu"))
    if reasons:
        pytest.skip("; ".join(reasons))
    from fusedstep.triton_kernels.launching import Prepared

    class Gpu:
        def __init__(self):
            self.capturing = False
            self.stream = 1
            self.given = []
            self.told = []

        def capture(self, call):
            """References, which keep nothing alive, to all memory that launches are given in a captured ``call``."""
            self.given.clear()
            self.capturing = True
            try:
                call()
            finally:
                self.capturing = False
            references = [StorageWeakRef(tensor.untyped_storage()) for tensor in self.given]
            self.given.clear()
            return references

    gpu = Gpu()
    plain = Prepared.__call__

    def note(kernel, device, programs, *args):
        gpu.given += [arg for arg in args if isinstance(arg, torch.Tensor)]
        plain(kernel, device, programs, *args)

    def is_capturing(device):
        return gpu.capturing

    monkeypatch.setattr(Prepared, "__call__", note)
    monkeypatch.setattr(lifetime, "is_capturing", is_capturing)
    monkeypatch.setattr(backend, "is_capturing", is_capturing)
    monkeypatch.setattr(lifetime, "current_stream", lambda device: gpu.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: gpu.told.append((id(tensor), stream)))
    return gpu


def give(params, dtype=torch.float32):
    for param in params:
        param.grad_dtype = None
        param.grad = torch.ones_like(param, dtype=dtype)


def make(name):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((5,), (40, 30))]
    optimizer = getattr(fusedstep, name)(params, lr=0.1, backend="triton", max_grad_norm=1.0, ema_decay=0.9)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    give(params)
    optimizer.step()
    return optimizer, params


def other_gradients(optimizer, params):
    optimizer.gradients_before = [param.grad for param in params]  # so that their memory is not used again
    give(params)


def another_dtype(optimizer, params):
    give(params, torch.float16)


def another_learning_rate(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.2


def a_new_group(optimizer, params):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    give(optimizer.param_groups[-1]["params"])


def a_loaded_state(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ["AdamW", "TorchAdafactor"])
@pytest.mark.parametrize("change", [other_gradients, another_dtype, another_learning_rate, a_new_group, a_loaded_state])
def test_what_a_captured_launch_was_given_outlives_any_eager_step(gpu, name, change):
    optimizer, params = make(name)
    references = gpu.capture(optimizer.step)
    assert len(references) > 12
    change(optimizer, params)
    optimizer.grad_scale = optimizer.found_inf = None
    optimizer.step()
    gpu.given.clear()
    assert not any(reference.expired() for reference in references)
    gone = weakref.ref(optimizer)
    del optimizer
    params.clear()
    gc.collect()
    assert gone() is None
    assert all(reference.expired() for reference in references)


def test_without_a_graph_nothing_is_kept(gpu):
    optimizer, params = make("AdamW")
    gpu.given.clear()
    optimizer.step()
    references = [StorageWeakRef(tensor.untyped_storage()) for tensor in gpu.given]
    gpu.given.clear()
    another_dtype(optimizer, params)
    optimizer.step()
    gpu.given.clear()
    assert sum(reference.expired() for reference in references) >= 4


def test_addresses_that_only_a_graph_uploads_are_uploaded_again_for_an_eager_step(gpu):
    """A capture does not run: until a replay nothing is in the memory that it copies to."""
    optimizer, params = make("AdamW")
    other_gradients(optimizer, params)
    optimizer.param_groups[0]["lr"] = 0.5
    (plan,) = optimizer.stepper.plans
    gpu.capture(optimizer.step)
    captured = [plan.hyper, *(launch.grads for launch in (*plan.launches, *plan.sums))]
    optimizer.step()
    eager = [plan.hyper, *(launch.grads for launch in (*plan.launches, *plan.sums))]
    assert optimizer.stepper.plans == [plan]
    for before, after in zip(captured, eager, strict=True):
        assert before is not after
        assert torch.equal(before, after)
    kept = [plan.hyper, *(launch.grads for launch in (*plan.launches, *plan.sums))]
    optimizer.step()
    assert all(a is b for a, b in zip(kept, eager, strict=True))


def test_new_launches_are_refused_while_a_graph_is_captured(gpu):
    optimizer, params = make("AdamW")
    another_dtype(optimizer, params)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured; run one step.* before capturing"):
        gpu.capture(optimizer.step)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    optimizer.step()


def test_the_allocator_is_told_of_another_stream(gpu):
    optimizer, _ = make("AdamW")
    (plan,) = optimizer.stepper.plans
    gpu.told.clear()
    optimizer.step()
    assert not gpu.told
    gpu.stream = 2
    optimizer.step()
    launches = (*plan.launches, *plan.sums)
    for tensor in (plan.hyper, plan.weight, *(t for launch in launches for t in (launch.chunks, launch.grads))):
        assert (id(tensor), 2) in gpu.told
