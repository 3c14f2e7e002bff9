"""How several processes do something together: each scenario runs in all of them, one after the other.

Each process compares its parts with what one makes of the whole tensors, which all of them compute for themselves.
The scenarios are in ranks_elementwise.py, ranks_wrapped.py, ranks_reducing.py and ranks_device.py.
"""

import functools
import json
import multiprocessing
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from support import numbers_of
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusedstep

SIZE = 4
FOLDER = Path(sys.argv[-1])  # for results and checkpoints
SCENARIOS = {}
SHAPES = ((8, 6), (7, 5), (3,), (2, 33), (16, 256))
ROWS, COLUMNS, COPIES = [Shard(0)], [Shard(1)], [Replicate()]
HALF = {"dtype": torch.bfloat16}
CLOSE = {"rtol": 1e-6, "atol": 1e-7}
SEVERAL = ["FSDP and TP", None, "four", "HSDP", "four"]  # several meshes and a plain tensor


def scenario(function=None, *, among=SCENARIOS, **values):
    """Registers a function, once for each of some ``values`` of one argument."""
    if function is None:
        return functools.partial(scenario, among=among, **values)
    for name, some in values.items():
        for value in some:
            label = value if isinstance(value, str) else getattr(value, "__name__", str(value))
            among[f"{function.__name__}[{label}]"] = functools.partial(function, **{name: value})
    if not values:
        among[function.__name__] = function
    return function


@functools.cache
def mesh(*shape):
    """A mesh of the first processes; all must ask for it in the same order."""
    numel = torch.Size(shape).numel()
    return DeviceMesh("cpu", torch.arange(numel).reshape(shape))


MESHES = {  # with the placements of matrices
    "two": ((2,), ROWS),
    "three": ((3,), ROWS),
    "four": ((4,), ROWS),
    "columns": ((3,), COLUMNS),
    "replicated": ((2,), COPIES),
    "HSDP": ((2, 2), [Replicate(), Shard(0)]),
    "FSDP and TP": ((2, 2), [Shard(0), Shard(1)]),
}


def takes_part(where):
    return mesh(*MESHES[where][0]).get_coordinate() is not None


def distributed(values, where):
    shape, placements = MESHES[where]
    placements = [Shard(0) if isinstance(p, Shard) and p.dim >= values.dim() else p for p in placements]
    return distribute_tensor(values.clone(), mesh(*shape), placements, src_data_rank=None)


def numbers(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Pair:
    """An optimizer of parts and one of whole tensors, with equal parameters and gradients.

    ``where``: a key of `MESHES` for each parameter, or one for all; None: a plain tensor.
    """

    def __init__(self, cls, where, shapes=SHAPES, dtype=torch.float32, **options):
        self.where = where if isinstance(where, (list, tuple)) else [where] * len(shapes)
        values = [numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
        self.whole = [torch.nn.Parameter(v.clone()) for v in values]
        self.parts = [torch.nn.Parameter(self.part(v, i)) for i, v in enumerate(values)]
        self.expected = cls([(f"p{i}", p) for i, p in enumerate(self.whole)], **options)
        self.mine = cls([(f"p{i}", p) for i, p in enumerate(self.parts)], **options)
        self.number = 0

    def part(self, value, index):
        where = self.where[index]
        return value.detach().clone() if where is None else distributed(value.detach(), where)

    def give(self, skip=(), change=None, scale=1.0):
        """New gradients; ``change(index, grad)`` makes others of them."""
        self.number += 1
        for i, (part, whole) in enumerate(zip(self.parts, self.whole, strict=True)):
            part.grad = whole.grad = None
            if i not in skip:
                grad = numbers(*whole.shape, seed=100 * self.number + i) * scale
                grad = (grad if change is None else change(i, grad)).to(whole.dtype)
                whole.grad, part.grad = grad.clone(), self.part(grad, i)

    def step(self, **given):
        self.give(**given)
        self.expected.step()
        self.mine.step()

    def step_by_micro_batches(self, set_to_none=True):
        """Three steps of two each; one parameter has a gradient in the second alone, another one never."""
        optimizers = self.expected, self.mine
        both = [fusedstep.GradientAccumulator(each, mean=True, set_to_none=set_to_none) for each in optimizers]
        for _ in range(3):
            for skip in ((0, 2), (2,)):
                self.give(skip=skip)
                for accumulator in both:
                    accumulator(weight=1.0 + len(skip))
            for accumulator in both:
                accumulator.assign()
            for part, whole in zip(self.parts, self.whole, strict=True):
                assert (part.grad is None) == (whole.grad is None)
            for optimizer, accumulator in zip(optimizers, both, strict=True):
                optimizer.step()
                accumulator.reset()

    def each(self):
        """(part, what it must be) of parameters and states."""
        for i, (part, whole) in enumerate(zip(self.parts, self.whole, strict=True)):
            yield f"p{i}", part, self.part(whole, i)
            states, expected = self.mine.state.get(part, {}), self.expected.state.get(whole, {})
            assert states.keys() == expected.keys(), (i, states.keys(), expected.keys())
            for key, state in states.items():
                other = expected[key]
                if other.shape == whole.shape and whole.dim():
                    assert isinstance(state, DTensor) == (self.where[i] is not None), key
                    other = self.part(other, i)
                yield f"{key} of p{i}", state, other
            if self.mine.stepper.kept.copy.dtype is not None:
                yield f"copy of p{i}", self.mine.copies[part], self.part(self.expected.copies[whole], i)

    def assert_same(self, **tolerance):
        for what, part, expected in self.each():
            part, expected = (local(t) for t in (part, expected))
            if tolerance:
                torch.testing.assert_close(part, expected, **tolerance, msg=lambda text, what=what: f"{what}: {text}")
            else:
                assert (part.dtype, part.shape) == (expected.dtype, expected.shape), what
                assert torch.equal(part, expected), f"{what}: {part} {expected}"

    def assert_same_numbers(self):
        """Compares the states as a state_dict shows them, each as numbers."""
        for i, (part, whole) in enumerate(zip(self.parts, self.whole, strict=True)):
            assert torch.equal(local(part), local(self.part(whole, i))), i
            mine, expected = (each.state_dict()["state"].get(i, {}) for each in (self.mine, self.expected))
            for key in expected:
                other = numbers_of(self.expected, expected, key, whole)
                if other.shape == whole.shape:
                    found = mine[key] if isinstance(part, DTensor) else numbers_of(self.mine, mine, key, part)
                    assert torch.equal(local(found), local(self.part(other, i))), (key, i)
                elif key == "step":
                    assert mine[key] == other


def assert_all_raise(pair, index, odd):
    """Where one process has a plain gradient for a part, all raise its error, and nothing has changed."""
    before = snapshot(pair)
    pair.give()
    if dist.get_rank() == odd:
        pair.parts[index].grad = torch.zeros(pair.parts[index].shape)
    found = raised(RuntimeError, pair.mine.step)
    assert f"the gradient is a plain tensor, it must be a DTensor like parameter {index} 'p{index}'" in found, found
    assert (f"process {odd} could not" in found) == (dist.get_rank() != odd), found
    assert_untouched(pair, before)


def local(tensor):
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def raised(error, call):
    """The text of the error that ``call`` must raise."""
    try:
        call()
    except error as found:
        return str(found)
    raise AssertionError(f"no {error}")


def snapshot(pair):
    return [local(p).clone() for p in pair.parts], [
        {k: local(v).clone() for k, v in pair.mine.state.get(p, {}).items()} for p in pair.parts
    ]


def assert_untouched(pair, before):
    params, states = snapshot(pair)
    assert all(map(torch.equal, params, before[0]))
    for now, then in zip(states, before[1], strict=True):
        assert now.keys() == then.keys()
        assert all(torch.equal(now[key], then[key]) for key in now)


def assert_a_flag_of_one_process_skips(pair):
    pair.step()
    before = snapshot(pair)
    pair.give()
    pair.mine.found_inf = torch.tensor(float(dist.get_rank() == 1))
    pair.mine.step()
    del pair.mine.found_inf
    assert_untouched(pair, before)


class Model(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        for i, param in enumerate(params):
            self.register_parameter(f"p{i}", param)


def checkpoint(model, optimizer, form):
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=form)}


def overflow(value):
    """In one element of one process's part."""

    def change(index, grad):
        if index == 4:
            grad[-1, -1] = value
        return grad

    return change


def layers():
    generator = torch.Generator().manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return model


def fsdp(model):
    return fully_shard(model, mesh=mesh(4))


def fsdp_with_copies(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))


def fsdp_and_tp(model):
    names = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, names["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=names["dp"])


def main(scenarios=SCENARIOS):
    """``python SCRIPT FOLDER``: the processes are forks of one, which has imported everything for all of them."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_all, args=(scenarios, rank)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    (FOLDER / "results.json").write_text(json.dumps(results_of_all(scenarios, codes)))
    sys.exit(any(codes))


def results_of_all(scenarios, codes):
    """The errors of all processes in each scenario that one has run: "" for none."""
    told = [json.loads(of_rank(rank).read_text()) if of_rank(rank).exists() else {} for rank in range(SIZE)]
    results = {}
    for name in scenarios:
        if any(name in each for each in told):
            errors = [each.get(name, f"process {rank} ended with {codes[rank]}") for rank, each in enumerate(told)]
            results[name] = "\n".join(filter(None, errors))
    return results


def of_rank(rank):
    return FOLDER / f"results.{rank}.json"


def run_all(scenarios, rank):
    store = dist.FileStore(str(FOLDER / "store"), SIZE)
    dist.init_process_group("gloo", rank=rank, world_size=SIZE, store=store, timeout=timedelta(seconds=120))
    for shape, _ in MESHES.values():
        mesh(*shape)
    results = {}
    for name, run in scenarios.items():
        results[name] = error_of(run, rank)
        of_rank(rank).write_text(json.dumps(results))
        failed = [None] * SIZE
        try:
            dist.all_gather_object(failed, bool(results[name]))
        except RuntimeError:  # another process has left the scenario with an error
            break
        if any(failed):
            break  # who left a collective early is in none of the next ones with the others
    dist.destroy_process_group()


def error_of(run, rank):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            run()
    except BaseException as error:
        return f"process {rank}: {error!r}\n{traceback.format_exc()}"
    return ""
