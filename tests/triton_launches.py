"""Steps of the Triton backend's own host code without a GPU, on whichever Triton is installed.

Triton's driver is replaced by one whose launches only write down what they were given; tensors lie on the CPU. Prints
what came of it, as JSON. Must run without TRITON_INTERPRET.
"""

import json
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

import fusedstep
from fusedstep.backends import BACKENDS

LAUNCHES = []  # name of the kernel, programs, and its arguments
LOADED = []  # names of kernels, whenever one was compiled or found in Triton's cache on disk
LOOKED_UP = []  # kernels that Triton has looked up by the types of their arguments
STREAM = 1234


class Launcher:
    """What Triton calls in each launch, with a compiled kernel's source and metadata."""

    def __init__(self, source, metadata):
        self.name = metadata.name
        self.types = list(source.signature.values())

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        assert (y, z, stream, function) == (1, 1, STREAM, 77)
        assert len(args) == len(self.types)
        given = [arg for arg, type_ in zip(args, self.types, strict=True) if type_ != "constexpr"]
        LAUNCHES.append((self.name, x, given))


class Utilities:
    def load_binary(self, name, binary, shared, device):
        LOADED.append(name)
        return 1, 77, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def unload_module(self, module):
        pass


DRIVER = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: STREAM,
    launcher_cls=Launcher,
    utils=Utilities(),
)


def give(params, dtype=torch.float32):
    for param in params:
        param.grad_dtype = None
        param.grad = torch.ones_like(param, dtype=dtype)


def twenty_steps():
    """Everything that may change from step to step changes; what was compiled and launched in each."""
    found = {}
    for name, options in (("AdamW", {}), ("SGD", {"zero_grads": True}), ("TorchAdafactor", {})):
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((), (300,), (64, 48))]
        optimizer = getattr(fusedstep, name)(params, lr=0.1, backend="triton", max_grad_norm=1.0, **options)
        loaded, launched, looked_up = [], [], []
        for number in range(20):
            optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
            optimizer.grad_scale = torch.tensor(2.0**number)
            give(params)
            before = len(LOADED), len(LAUNCHES), len(LOOKED_UP)
            optimizer.step()
            loaded.append(len(LOADED) - before[0])
            launched.append([name for name, *_ in LAUNCHES[before[1] :]])
            looked_up.append(len(LOOKED_UP) - before[2])
        found[name] = {"loaded": loaded, "launched": launched, "looked_up": looked_up}
    return found


def arguments():
    """Whether each launch was given the memory of its plan, the first time and afterwards."""
    params = [torch.nn.Parameter(torch.ones(5000))]
    optimizer = fusedstep.AdamW(params, backend="triton")
    same = []
    for _ in range(3):
        LAUNCHES.clear()
        give(params)
        optimizer.step()
        (plan,) = optimizer.stepper.plans
        (launch,) = plan.launches
        ((name, programs, given),) = LAUNCHES
        memory = (launch.table, launch.chunks, launch.grads, plan.hyper, launch.done)
        addresses = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in given]
        expected = [*(each.data_ptr() for each in memory), len(launch.table)]
        grads = torch.tensor([param.grad.data_ptr() for param in params])
        same.append(name == "step_kernel" and programs == len(launch.chunks) and addresses == expected)
        same.append(bool((launch.grads == grads).all()))
    return same


def microseconds(call, times=2000):
    for _ in range(100):
        call()
    taken = []
    for _ in range(times):
        begin = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - begin) / 1000)
        LAUNCHES.clear()
    return {"least": min(taken), "median": statistics.median(taken)}


def cost():
    """Microseconds of a step with one small tensor, of its launch, and of the same launch as Triton itself does it."""
    params = [torch.nn.Parameter(torch.ones(16))]
    optimizer = fusedstep.AdamW(params, backend="triton")
    give(params)
    optimizer.step()
    (plan,) = optimizer.stepper.plans
    (launch,) = plan.launches
    ((kernel,),) = launch.kernels.values()
    args = (launch.table, launch.chunks, launch.grads, plan.hyper, launch.done, None, None, None, None, 1)
    return {
        "step": microseconds(optimizer.step),
        "ours": microseconds(lambda: kernel(plan.device, 1, *args)),
        "triton's": microseconds(lambda: kernel.kernel[(1,)](*args, **kernel.constants, **kernel.options)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    driver.set_active(DRIVER)
    look_up = JITFunction.run
    JITFunction.run = lambda kernel, *args, **kwargs: (LOOKED_UP.append(kernel), look_up(kernel, *args, **kwargs))[1]
    BACKENDS["triton"].reasons = lambda *_: []
    print(json.dumps({"twenty_steps": twenty_steps, "arguments": arguments, "cost": cost}[sys.argv[1]]()))
