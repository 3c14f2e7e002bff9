"""DTensors on a GPU, with NCCL: a single process, whose exchanges go through the device all the same.

Never run yet: where these were written there was no GPU. A dry run has gloo in the place of NCCL.
"""

import contextlib

import pytest
import torch
from on_gpu import DEVICE, DRY, no_waiting

import fusedstep
from fusedstep import exchange, shards

dist = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch"),
]
OPTIONS = {
    "plain": {},
    "split": {"master_weights": "split", "state_dtype": torch.bfloat16, "ema_decay": 0.5},
    "stochastic": {"rounding": "stochastic", "rounding_seed": 3},
    "norm": {"max_grad_norm": 0.1, "skip_nonfinite": True},
    "largest": {"max_grad_norm": 0.1, "norm_type": float("inf")},
}


@pytest.fixture
def mesh(tmp_path, monkeypatch):
    """Of one process, with which an optimizer exchanges what it would with others."""

    def groups(tensor, copies, dims=None):
        if not shards.is_sharded(tensor):
            return ()
        taken = [i for i, p in enumerate(tensor.placements) if dims is None or getattr(p, "dim", None) in dims]
        return tuple(map(tensor.device_mesh.get_group, taken))

    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    monkeypatch.setattr(exchange, "_groups", groups)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo" if DRY else "nccl", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


def pair(mesh, kernel, dtype, optimizer=fusedstep.AdamW, **options):
    """A model that `fully_shard` has taken, and one that it has not, with their optimizers."""
    from torch.distributed.fsdp import fully_shard

    found = []
    for sharded in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(24, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)).to(DEVICE, dtype)
        if sharded:
            fully_shard(model, mesh=mesh)
        found.append((model, optimizer(model.parameters(), lr=0.01, backend=kernel, **options)))
    return found


def give(model, number, value=None):
    """Gradients by a backward pass; ``value`` instead of one element."""
    torch.manual_seed(number)
    dtype = next(model.parameters()).dtype
    model(torch.randn(7, 24, device=DEVICE, dtype=dtype)).square().mean().backward()
    if value is not None:
        shards.layout.local(next(model.parameters()).grad).view(-1)[0] = value


def assert_same(a, b):
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(shards.layout.local(one.detach()), shards.layout.local(other.detach()))


@pytest.mark.parametrize("option", OPTIONS)
def test_steps_have_the_bits_of_plain_tensors(option, kernel, mesh):
    given = OPTIONS[option]
    narrow = given.keys() & {"master_weights", "rounding"}
    (model, plain), (parts, mine) = pair(mesh, kernel, torch.bfloat16 if narrow else torch.float32, **given)
    for number in range(4):
        give(model, number)
        give(parts, number)
        plain.step()
        # Nothing is asked of the device once limits are known to be those of all.
        with contextlib.nullcontext() if DRY or number < 2 else no_waiting():
            mine.step()
        assert mine.backends_used == {kernel}
        plain.zero_grad()
        mine.zero_grad()
    if "max_grad_norm" in given:
        torch.testing.assert_close(mine.grad_norm, plain.grad_norm, rtol=1e-6, atol=0)
        for a, b in zip(parts.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b.detach(), rtol=1e-6, atol=1e-7)
    else:
        assert_same(model, parts)


def test_an_infinity_skips_the_step_on_the_device(kernel, mesh):
    _, (parts, mine) = pair(mesh, kernel, torch.float32, max_grad_norm=1.0, skip_nonfinite=True)
    give(parts, 0)
    mine.step()
    before = [shards.layout.local(param.detach()).clone() for param in parts.parameters()]
    mine.zero_grad()
    give(parts, 1, torch.inf)
    with contextlib.nullcontext() if DRY else no_waiting():
        mine.step()
    assert all(map(torch.equal, before, (shards.layout.local(param.detach()) for param in parts.parameters())))
    assert all(count == 1 for count in (mine.state[param]["step"] for param in parts.parameters()))


REDUCING = {
    "Adafactor": (fusedstep.Adafactor, {"relative_step": False, "beta1": 0.5, "weight_decay": 0.1, "ema_decay": 0.5}),
    "TorchAdafactor": (fusedstep.TorchAdafactor, {"zero_grads": True}),
    "clipped": (fusedstep.TorchAdafactor, {"max_grad_norm": 0.1, "skip_nonfinite": True}),
    "Amos": (fusedstep.Amos, {"reduce": (0,)}),
}


@pytest.fixture
def sums_cross(monkeypatch):
    """What is sharded along a mesh of one process counts as a part of something."""

    def dims(tensor):
        found = tensor.placements if shards.is_sharded(tensor) else ()
        return {placement.dim for placement in found if hasattr(placement, "dim")}

    monkeypatch.setattr(shards, "sharded_dims", dims)


@pytest.mark.parametrize("option", REDUCING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_that_cross_processes_leave_the_numbers_of_plain_tensors(option, dtype, kernel, mesh, sums_cross):
    cls, given = REDUCING[option]
    (model, plain), (parts, mine) = pair(mesh, kernel, dtype, cls, **given)
    for number in range(4):
        give(model, number)
        give(parts, number)
        plain.step()
        with contextlib.nullcontext() if DRY or number < 2 else no_waiting():
            mine.step()
        assert mine.backends_used == ({"cpu"} if DRY else {"cuda"})
        for a, b in zip(parts.parameters(), model.parameters(), strict=True):
            # By the CUDA engine the bits of a step at once; Triton's are in another order.
            bound = 1e-5 if dtype == torch.float32 else 2.0**-7
            torch.testing.assert_close(a.full_tensor(), b.detach(), rtol=bound, atol=bound * 0.1)
            if kernel == "cuda" and "max_grad_norm" not in given:
                assert torch.equal(a.full_tensor(), b.detach())
        plain.zero_grad()
        mine.zero_grad()


def test_an_infinity_skips_a_step_whose_sums_cross_processes(kernel, mesh, sums_cross):
    _, (parts, mine) = pair(mesh, kernel, torch.float32, fusedstep.Adafactor, relative_step=False, skip_nonfinite=True)
    for number in range(2):
        mine.zero_grad()
        give(parts, number)
        mine.step()

    def numbers():
        states = [state for param in parts.parameters() for state in mine.state[param].values()]
        return [shards.layout.local(t.detach()).clone() for t in (*parts.parameters(), *states)]

    before = numbers()
    mine.zero_grad()
    give(parts, 2, torch.inf)
    with contextlib.nullcontext() if DRY else no_waiting():
        mine.step()
    assert all(map(torch.equal, before, numbers()))


def test_who_has_no_gradient_goes_on_with_the_others(kernel, mesh, sums_cross):
    """Where nobody else has one, nothing of the parameter changes."""
    _, (parts, mine) = pair(mesh, kernel, torch.float32, fusedstep.TorchAdafactor)
    for number in range(3):
        mine.zero_grad()
        give(parts, number)
        first, *others = parts.parameters()
        before = [shards.layout.local(param.detach()).clone() for param in (first, *others)]
        if number == 1:
            first.grad = None
        mine.step()
        for i, (param, old) in enumerate(zip((first, *others), before, strict=True)):
            assert torch.equal(shards.layout.local(param.detach()), old) == (number == 1 and i == 0)


def test_a_checkpoint_goes_on(kernel, mesh, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    optimizers = [pair(mesh, kernel, torch.float32, ema_decay=0.5)[1] for _ in range(2)]
    (old, mine), (new, again) = optimizers
    give(old, 0)
    mine.step()
    mine.zero_grad()
    saved = dict(zip(("model", "optimizer"), get_state_dict(old, mine), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint")
    loaded = dict(zip(("model", "optimizer"), get_state_dict(new, again), strict=True))
    dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint")
    set_state_dict(new, again, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for model, optimizer in optimizers:
        give(model, 1)
        optimizer.step()
    assert_same(old, new)


def test_averages_are_seen_by_the_next_forward_pass(kernel, mesh):
    seen = []
    for model, optimizer in pair(mesh, kernel, torch.float32, ema_decay=0.5):
        data = torch.ones(3, 24, device=DEVICE)
        for number in range(2):
            give(model, number)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found = [model(data)]
            with optimizer.swap_ema():
                found.append(model(data))
            found.append(model(data))
        seen.append(found)
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen[0][0], seen[0][1], rtol=1e-3)
