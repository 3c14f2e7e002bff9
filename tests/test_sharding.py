"""Optimizers that hold one process's part of the gradients, of which no norm of all can be taken: never silently.

One process, the first of two, whose collectives do nothing.
"""

import copy
import warnings
import weakref

import pytest
import torch
from kinds import each

import fusedstep
from fusedstep import sharding

dist = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*(NO_SHARD|sharding strategy):UserWarning"
    ),
]


@pytest.fixture(autouse=True)
def _the_first_of_two_processes():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


# What takes the norm of all gradients, beside `step(max_grad_norm=)`.
NORMS = {
    "max_grad_norm": (fusedstep.SGD, {"lr": 1.0, "max_grad_norm": 1.0}),
    "norm_type": (fusedstep.AdamW, {"max_grad_norm": 1.0, "norm_type": float("inf")}),
    "error_if_nonfinite": (fusedstep.Lion, {"error_if_nonfinite": True}),
    "skip_nonfinite": (fusedstep.Adagrad, {"skip_nonfinite": True}),
    "global_clipnorm": (fusedstep.AdamWeightDecay, {"global_clipnorm": 1.0}),
}
by_norm = pytest.mark.parametrize(("cls", "options"), NORMS.values(), ids=NORMS)


def values(optimizer):
    """Everything that an error must leave alone."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.detach().clone() for p in params], {k: dict(v) for k, v in optimizer.state.items()}


def assert_refuses(optimizer, message, step=None):
    before, states = values(optimizer)
    with pytest.raises(RuntimeError, match=message):
        (step or optimizer.step)()
    now, states_now = values(optimizer)
    assert all(map(torch.equal, before, now))
    assert states.keys() == states_now.keys()


class Wrapper(torch.Tensor):
    """One that only its author knows of."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def to_local(self):
        return self.inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = torch.utils._pytree.tree_map_only(cls, lambda wrapper: wrapper.inner, (args, kwargs or {}))
        made = function(*inner[0], **inner[1])
        return cls(made) if isinstance(made, torch.Tensor) and made.shape == args[0].shape else made


def wrapped():
    param = torch.nn.Parameter(Wrapper(torch.ones(4)))
    param.grad = Wrapper(torch.ones(4))
    return param


@pytest.mark.parametrize("norm", [*NORMS.values(), (fusedstep.AdamWeightDecay, {"clipnorm": 1.0})], ids=str)
def test_a_norm_of_an_unknown_wrapper_is_refused(norm, backend):
    cls, options = norm
    assert_refuses(cls([wrapped()], backend=backend, **options), r"norm of gradients of Wrapper .*local part alone")


def test_a_clipnorm_that_is_set_later_is_refused_for_wrappers_in_its_group(backend):
    plain = torch.nn.Parameter(torch.ones(4))
    plain.grad = torch.ones(4)
    mine = fusedstep.AdamWeightDecay([{"params": [wrapped()]}, {"params": [plain]}], clipvalue=2.0, backend=backend)
    mine.step()
    mine.param_groups[1]["clipnorm"] = 1.0
    mine.step()
    mine.param_groups[0]["clipnorm"] = 1.0
    assert_refuses(mine, "norm of gradients of Wrapper")
    mine.param_groups[0]["clipnorm"] = None
    mine.step()
    assert mine.state[plain]["step"] == 3


def zero(cls, params=None, **options):
    """ZeRO on two parameters, of which this process has one; and that one."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = params or [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = ZeroRedundancyOptimizer(params, cls, **options)
    return optimizer, optimizer.optim.param_groups[0]["params"][0]


@by_norm
def test_a_norm_of_zeros_share_is_refused(cls, options, backend):
    optimizer, _ = zero(cls, backend=backend, **options)
    assert_refuses(optimizer.optim, "ZeroRedundancyOptimizer gives .*clip_grad_norm_", optimizer.step)


def test_zeros_share_has_no_norm_that_a_step_asks_for(backend):
    optimizer, own = zero(fusedstep.SGD, lr=1.0, backend=backend)
    optimizer.step()
    assert own.eq(0).all()
    assert_refuses(optimizer.optim, "ZeroRedundancyOptimizer", lambda: optimizer.step(max_grad_norm=1.0))
    copied = copy.deepcopy(optimizer.optim)
    assert_refuses(copied, "ZeroRedundancyOptimizer", lambda: copied.step(max_grad_norm=1.0))
    optimizer.step()
    assert own.eq(-1).all()


def test_zeros_share_follows_no_schedule_by_itself():
    """What it loads takes the place of the learning rate: the schedule would end there."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    schedule = fusedstep.schedules.CosineScheduler(max_update=9, base_lr=0.1)
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"CosineScheduler.*ZeroRedundancyOptimizer.*ScheduleLR"):
        ZeroRedundancyOptimizer(params, fusedstep.SGD, lr=schedule)
    optimizer, _ = zero(fusedstep.SGD, params, lr=1.0)
    scheduler = fusedstep.schedules.ScheduleLR(optimizer, schedule)
    for number in range(3):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule(number), rel=1e-12)
        optimizer.step()
        scheduler.step()
        assert optimizer.optim.param_groups[0]["lr"] == pytest.approx(schedule(number), rel=1e-12)


def test_what_zeros_share_has_whole_is_done(backend):
    """The norm of each tensor by itself, and sums over it."""
    for cls, options in (
        (fusedstep.AdamWeightDecay, {"clipnorm": 1.0}),
        (fusedstep.AdamWeightDecay, {"clipvalue": 1.0}),
        (fusedstep.TorchAdafactor, {}),
    ):
        params = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
        optimizer, own = zero(cls, params, backend=backend, **options)
        alone = torch.nn.Parameter(torch.ones(3, 2))
        alone.grad = torch.ones(3, 2)
        optimizer.step()
        cls([alone], backend=backend, **options).step()
        assert torch.equal(own, alone)


def test_an_optimizer_of_ones_own_beside_zero_has_its_norm(backend):
    zero(fusedstep.SGD, lr=1.0, backend=backend)
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.ones(4)
    mine = fusedstep.SGD([param], lr=1.0, max_grad_norm=1.0, backend=backend)
    mine.step()
    assert mine.grad_norm == 2


def fsdp1(use_orig_params, strategy="FULL_SHARD"):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    model = FullyShardedDataParallel(
        model,
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )
    model(torch.ones(2, 4)).sum().backward()
    return model


by_form = pytest.mark.parametrize("use_orig_params", [False, True])


SUMMED = {
    **{name: (*norm, "the norm of all gradients") for name, norm in NORMS.items()},
    "clipnorm": (fusedstep.AdamWeightDecay, {"clipnorm": 1.0}, "the norm of each gradient"),
    "Adafactor": (fusedstep.Adafactor, {}, "the rule's sums"),
    "TorchAdafactor": (fusedstep.TorchAdafactor, {}, "the rule's sums"),
    "Amos": (fusedstep.Amos, {"reduce": (0,)}, "the rule's sums"),
}


@each(summed=SUMMED, use_orig_params=[False, True])
def test_a_norm_or_sum_of_fsdps_pieces_is_warned_of_once(use_orig_params, summed, backend):
    cls, options, what = summed
    mine = cls(fsdp1(use_orig_params).parameters(), backend=backend, **options)
    with pytest.warns(UserWarning, match=f"pieces.*alone: {what}") as caught:
        mine.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.step()
        mine.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        mine.step()


@by_form
def test_a_norm_of_fsdps_pieces_that_a_step_or_scaler_asks_for_is_warned_of(use_orig_params, backend):
    model = fsdp1(use_orig_params)
    for ask in ("step", "scaler"):
        mine = fusedstep.AdamW(model.parameters(), backend=backend)
        mine.step()
        scaler = fusedstep.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        with pytest.warns(UserWarning, match="norm of all gradients .*ShardedGradScaler"):
            mine.step(max_grad_norm=1.0) if ask == "step" else scaler.step(mine)


@by_form
def test_fsdps_pieces_need_no_warning_where_nothing_is_summed(use_orig_params, backend):
    mine = fusedstep.AdamWeightDecay(fsdp1(use_orig_params).parameters(), clipvalue=1.0, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.step()


@by_form
def test_fsdp_without_sharding_has_whole_parameters(use_orig_params, backend):
    model = fsdp1(use_orig_params, "NO_SHARD")
    assert not sharding.has_pieces(model.parameters())
    mine = fusedstep.AdamW(model.parameters(), max_grad_norm=1.0, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.step()


def test_to_look_for_who_makes_an_optimizer_keeps_no_local_variable_alive():
    import torch.distributed.optim.zero_redundancy_optimizer

    local = torch.ones(3)
    optimizer = fusedstep.SGD([torch.nn.Parameter(torch.ones(1))])
    seen = weakref.ref(local)
    del local
    assert seen() is None, optimizer
