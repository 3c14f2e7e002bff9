"""DTensor parameters, and the state_dict functions of torch.distributed.checkpoint, in one process."""

import copy
import gc
import itertools
import sys
import tracemalloc

import pytest
import torch
from support import ADAMW, EXACT, WITH_STATES, by_kind, copies, each, ours, parameters, parameters_of, step, theirs

import fusedstep
from fusedstep.schedules import CosineScheduler

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture
def mesh(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def distributed(values, mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(0) if i % 2 == 0 and v.dim() else Replicate() for i, v in enumerate(values)]
    return [
        torch.nn.Parameter(distribute_tensor(v.clone(), mesh, [placement]))
        for v, placement in zip(values, placements, strict=True)
    ]


def give(optimizer, plain, skip=()):
    """The same gradients as DTensors and as plain tensors."""
    for index, (param, other) in enumerate(zip(*map(parameters_of, (optimizer, plain)), strict=True)):
        grad = torch.randn(other.shape, dtype=torch.float64)
        other.grad = None if index in skip else grad
        param.grad = None
        if index not in skip:
            (
                param * torch.distributed.tensor.distribute_tensor(grad, param.device_mesh, param.placements)
            ).sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@by_kind
def test_dtensor_parameters(case, backend, mesh):
    from torch.distributed.tensor import DTensor

    values = [p.detach() for p in parameters([(4, 3), (5,), (2, 2), ()])]
    mine = ours(case, distributed(values, mesh), backend)
    expected = theirs(case, [torch.nn.Parameter(v.clone()) for v in values])
    versions = [p._version for p in parameters_of(mine)]
    for number in range(4):
        give(mine, expected, skip=(number,))
        mine.step()
        expected.step()
        if number == 1:  # the memory under a parameter is exchanged
            for param in parameters_of(mine):
                param._local_tensor = param._local_tensor.clone()
    for a, b, version in zip(*map(parameters_of, (mine, expected)), versions, strict=True):
        torch.testing.assert_close(a.full_tensor(), b.detach(), **EXACT)
        assert a._version > version
        for name, state in expected.state.get(b, {}).items():
            value = mine.state[a][name]
            assert isinstance(value, DTensor) == (name != "step")
            torch.testing.assert_close(value.full_tensor() if name != "step" else value, state, **EXACT)
    again = ours(case, distributed(values, mesh), backend)
    again.load_state_dict(mine.state_dict())
    for a, b in zip(*map(parameters_of, (again, mine)), strict=True):
        a.data.copy_(b.data)
    give(mine, expected)
    for a, b in zip(*map(parameters_of, (again, mine)), strict=True):
        a.grad = b.grad.clone()
    for optimizer in (mine, again, expected):
        optimizer.step()
    for a, b, c in zip(*map(parameters_of, (mine, again, expected)), strict=True):
        torch.testing.assert_close(a.full_tensor(), c.detach(), **EXACT)
        assert torch.equal(a.full_tensor(), b.full_tensor())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "option", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}, {"error_if_nonfinite": True}], ids=str
)
def test_a_norm_on_a_mesh_of_one_process(option, backend, mesh):
    values = [p.detach() for p in parameters()]
    mine = ours(ADAMW, distributed(values, mesh), backend, **option)
    plain = ours(ADAMW, [torch.nn.Parameter(v.clone()) for v in values], backend, **option)
    for _ in range(2):
        give(mine, plain)
        mine.step()
        plain.step()
        assert torch.equal(mine.grad_norm, plain.grad_norm)
    for a, b in zip(*map(parameters_of, (mine, plain)), strict=True):
        assert torch.equal(a.full_tensor(), b.detach())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_frozen_parameter_may_be_anywhere(backend, mesh):
    params = [*distributed([torch.randn(4, 3)], mesh), *parameters()]
    mine = ours(ADAMW, params, backend, max_grad_norm=0.1)
    plain = ours(ADAMW, copies(params[1:]), backend, max_grad_norm=0.1)
    for a, b in zip(params[1:], parameters_of(plain), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    mine.step()
    plain.step()
    for a, b in zip(params[1:], parameters_of(plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_scaler_that_joins_after_the_first_step(backend, mesh):
    values = [p.detach() for p in parameters()]
    mine = ours(ADAMW, distributed(values, mesh), backend)
    plain = theirs(ADAMW, [torch.nn.Parameter(v.clone()) for v in values])
    give(mine, plain)
    mine.step()
    plain.step()
    scaler = fusedstep.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    give(mine, plain)
    scaler.step(mine)
    plain.step()
    for a, b in zip(*map(parameters_of, (mine, plain)), strict=True):
        torch.testing.assert_close(a.full_tensor(), b.detach(), **EXACT)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@each(case=WITH_STATES, flatten=[False, True])
def test_distributed_checkpoint_state_dicts(case, backend, flatten):
    """They name states by parameter; setting them makes a step with lr 0 to create missing states."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    mine, expected, new = (
        make(case, m.parameters())
        for make, m in zip(
            (lambda c, p: ours(c, p, backend), theirs, lambda c, p: ours(c, p, backend)), models, strict=True
        )
    )
    for _ in range(3):
        step(mine, expected)
    saved, torchs = (
        dcp.get_optimizer_state_dict(m, o, options=options) for m, o in zip(models[:2], (mine, expected), strict=True)
    )
    assert saved.keys() == torchs.keys()
    models[2].load_state_dict(models[0].state_dict())
    dcp.set_optimizer_state_dict(models[2], new, saved, options=options)
    for _ in range(2):
        step(mine, expected, new)
    for a, b, c in zip(*map(parameters_of, (mine, expected, new)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
        assert torch.equal(a, c)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_zero_redundancy_optimizer(backend, mesh):
    """It wraps an optimizer class and hands its options on."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    import fusedstep

    params = parameters()
    expected = theirs(ADAMW, copies(params))
    mine = ZeroRedundancyOptimizer(params, fusedstep.AdamW, backend=backend, **ADAMW.options)
    for _ in range(3):
        step(mine, expected)
    for a, b in zip(*map(parameters_of, (mine, expected)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def given(mesh, n=20, **options):
    """An optimizer of small matrices on a mesh, with gradients, after some steps."""
    params = distributed([torch.randn(4, 4) for _ in range(n)], mesh)
    optimizer = fusedstep.AdamW(params, backend="cpu", **options)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("options", [{}, {"zero_grads": True}, {"max_grad_norm": 1.0}], ids=str)
def test_a_steady_step_asks_nothing_of_dtensors(options, mesh):
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((function, types))
            return function(*args, **(kwargs or {}))

    optimizer, seen = given(mesh, **options), []
    with Watching():
        torch.ones_like(parameters_of(optimizer)[0])
        assert seen.pop(0)[1] == (DTensor,)
        seen.clear()
        optimizer.step()
    assert not [types for _, types in seen if DTensor in types]
    assert optimizer.kernel_calls == 1 + ("max_grad_norm" in options)
    assert all(count == 4 for count in (optimizer.state[p]["step"] for p in parameters_of(optimizer)))


KEPT = {
    "plain": {},
    "averages and copies": {"ema_decay": 0.5, "weights_copy": torch.bfloat16, "zero_grads": True},
    "norm, schedule": {"max_grad_norm": 1.0, "skip_nonfinite": True, "lr": CosineScheduler(max_update=9, base_lr=0.1)},
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
def test_a_thousand_steps_keep_nothing(options, mesh):
    """Neither a Python object nor memory, whether gradients stay or come anew, and whatever a step is given."""
    optimizer = given(mesh, n=4, **options)
    params = parameters_of(optimizer)
    fresh = [param.grad.clone() for param in params]
    asked = itertools.count(1)

    def steps(count):
        for number in range(count):
            if number % 10 == 0:
                for param, grad in zip(params, fresh, strict=True):
                    param.grad = grad.detach()
            if "max_grad_norm" in options:
                optimizer.step(max_grad_norm=1.0 / next(asked))
            else:
                optimizer.step()
        gc.collect()
        return len(gc.get_objects()), sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        steps(50)
        before = steps(50)
        after = steps(1000)
    finally:
        tracemalloc.stop()
    objects, blocks, memory = (now - then for now, then in zip(after, before, strict=True))
    assert objects < 50, objects
    assert blocks < 200, blocks
    assert memory < 16_000, memory


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("keep", [False, True])
def test_a_gradient_that_nothing_but_its_parameter_holds(keep, mesh):
    """Its Python object may then be torch's, and another one in the next step."""
    optimizer = given(mesh)
    plain = ours(ADAMW, [torch.nn.Parameter(p.full_tensor().detach().clone()) for p in parameters_of(optimizer)])
    optimizer = ours(ADAMW, parameters_of(optimizer))
    kept = []
    for number in range(5):
        for a, b in zip(*map(parameters_of, (optimizer, plain)), strict=True):
            a.grad = None
            b.grad = torch.full((4, 4), float(number))
            a.grad = torch.distributed.tensor.distribute_tensor(b.grad, mesh, a.placements)
            if keep:
                kept.append(a.grad)
        if not keep:
            gc.collect()
        versions = [p._version for p in parameters_of(optimizer)]
        optimizer.step()
        plain.step()
        assert all(p._version > v for p, v in zip(parameters_of(optimizer), versions, strict=True))
    for a, b in zip(*map(parameters_of, (optimizer, plain)), strict=True):
        assert torch.equal(a.full_tensor(), b)
        a.grad = None
    optimizer.step()
    for a, b in zip(*map(parameters_of, (optimizer, plain)), strict=True):
        assert torch.equal(a.full_tensor(), b)
    assert all(torch.equal(grad.full_tensor(), torch.full((4, 4), float(i // 20))) for i, grad in enumerate(kept))
