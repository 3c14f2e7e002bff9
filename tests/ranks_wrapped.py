"""Scenarios of test_ranks.py with models and optimizers that torch wraps, and with saves that are asynchronous.

All processes have the same data, and there are four of them: a mean of equal gradients is exact, so that a wrapped
model must have the bits of the model that one process has alone.
"""

import contextlib
import copy
import functools
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import (
    CLOSE,
    FOLDER,
    HALF,
    SIZE,
    Model,
    Pair,
    checkpoint,
    layers,
    mesh,
    numbers,
    scenario,
    takes_part,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

import fusedstep
from fusedstep.schedules import CosineScheduler

NESTED, FLAT = StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)


def train(model, optimizer, *given, dtype=torch.float32):
    for number in given:
        model(numbers(5, 6, seed=number, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def seen(model, optimizer=None):
    """What a model makes of some data outside of autograd, after which FSDP may keep its whole weights."""
    with torch.no_grad(), optimizer.swap_ema() if optimizer is not None else contextlib.nullcontext():
        return model(numbers(4, 6, seed=77))


# FullyShardedDataParallel, whose parameters are flat, or pieces of flat ones.

FORMS = [(form, strategy) for form in (False, True) for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")]
FORM_NAMES = {f"{'pieces' if form else 'flat'}, {strategy}": (form, strategy) for form, strategy in FORMS}
PIECES = {
    "plain": {},
    "average and copy": {"ema_decay": 0.75, "weights_copy": torch.bfloat16},
    "split": {**HALF, "master_weights": "split", "state_dtype": torch.bfloat16},
    "kahan": {**HALF, "kahan": True, "state_dtype": torch.float32, "ema_decay": 0.5},
    "schedule": {"lr": "schedule"},
    "8bit": {"state_dtype": "8bit"},
}


def wrapped(model, form):
    form, strategy = FORM_NAMES[form]
    # Without the device it looks for an accelerator.
    return FullyShardedDataParallel(
        model, use_orig_params=form, sharding_strategy=ShardingStrategy[strategy], device_id=torch.device("cpu")
    )


def gathers(model):
    """To a CPU torch would hand out one buffer for all states of a flat parameter: what is last in it, for each."""
    return FullyShardedDataParallel.state_dict_type(
        model,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False),
        FullOptimStateDictConfig(offload_to_cpu=False),
    )


def assert_same_weights(model, whole):
    with gathers(model):
        found = model.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(found[name], value), name


def of_one_kind(option):
    given = {"lr": 0.01, **PIECES[option]}
    dtype = given.pop("dtype", torch.float32)
    if given["lr"] == "schedule":
        given["lr"] = CosineScheduler(max_update=9, base_lr=0.1, warmup_steps=2)
    # Large enough for states in 8 bits.
    model = wide if option == "8bit" else layers
    return (lambda: model().to(dtype)), functools.partial(fusedstep.AdamW, **given), {"dtype": dtype}


def wide():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 5000), torch.nn.Tanh(), torch.nn.Linear(5000, 3))


@scenario(form=FORM_NAMES)
def flat_parameters(form):
    for option in PIECES if "FULL_SHARD" in form else ("average and copy",):
        if option != "8bit":  # whose blocks begin anew with each piece
            make, optimize, given = of_one_kind(option)
            whole, parts = make(), wrapped(make(), form)
            expected, mine = optimize(whole.parameters()), optimize(parts.parameters())
            train(whole, expected, 0, 1, 2, **given)
            train(parts, mine, 0, 1, 2, **given)
            assert_same_weights(parts, whole)


@scenario(option=PIECES)
def checkpoints_of_flat_parameters(option):
    """From a wrapped model to another one, in several ways; the first is that of one process too."""
    make, optimize, given = of_one_kind(option)
    whole = make()
    expected = optimize(whole.named_parameters())
    train(whole, expected, 0, 1, **given)
    alone = expected.state_dict()
    for form in ("flat, FULL_SHARD", "pieces, FULL_SHARD"):
        for how in ("FSDP", "flattened", *(("nested",) if option == "schedule" else ())):
            old, new = wrapped(make(), form), wrapped(make(), form)
            mine, again = optimize(old.parameters()), optimize(new.parameters())
            train(old, mine, 0, 1, **given)
            new.load_state_dict(old.state_dict())
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*was saved with other precision options.*", UserWarning)
                if how == "FSDP":
                    with gathers(old), gathers(new):
                        saved = FullyShardedDataParallel.optim_state_dict(old, mine)
                        if option in ("plain", "average and copy", "schedule"):
                            assert_same_state(saved["state"], alone)
                        again.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(new, again, saved))
                else:
                    kind = FLAT if how == "flattened" else NESTED
                    set_optimizer_state_dict(
                        new, again, get_optimizer_state_dict(old, mine, options=kind), options=kind
                    )
            assert again.schedule_step == mine.schedule_step == 2
            train(old, mine, 2, 3, **given)
            train(new, again, 2, 3, **given)
            for a, b in zip(old.parameters(), new.parameters(), strict=True):
                assert torch.equal(a, b), how


def assert_same_state(saved, alone):
    names = alone["param_groups"][0]["param_names"]
    assert saved.keys() == set(names)
    for index, name in enumerate(names):
        assert saved[name].keys() == alone["state"][index].keys()
        for key, value in alone["state"][index].items():
            assert torch.equal(saved[name][key], value), (name, key)


SHARDINGS = {
    **{form: functools.partial(wrapped, form=form) for form in ("flat, FULL_SHARD", "pieces, SHARD_GRAD_OP")},
    "fully_shard": lambda model: fully_shard(model, mesh=mesh(4)),
    "fully_shard, gathered": lambda model: fully_shard(model, mesh=mesh(4), reshard_after_forward=False),
}


@scenario(sharding=SHARDINGS)
def averages_are_seen_by_the_next_forward_pass(sharding):
    """Also where whole weights are still gathered; and what training goes on with are the weights again."""
    passes = []
    for model in (layers(), SHARDINGS[sharding](layers())):
        optimizer = fusedstep.AdamW(model.parameters(), lr=0.1, ema_decay=0.5)
        train(model, optimizer, 0, 1)
        found = [seen(model), seen(model, optimizer), seen(model)]
        train(model, optimizer, 2)
        found.append(seen(model, optimizer))
        train(model, optimizer, 3)
        passes.append([*found, seen(model)])
    for a, b in zip(*passes, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(passes[0][0], passes[0][1])


@scenario(form=("flat, FULL_SHARD", "pieces, FULL_SHARD"))
def an_overflow_on_one_process_is_seen_by_the_sharded_scaler(form):
    model = wrapped(layers(), form)
    optimizer = fusedstep.AdamW(model.parameters(), lr=0.1)
    scaler = ShardedGradScaler(device="cpu", init_scale=4.0)
    for number in range(3):
        scaler.scale(model(numbers(5, 6, seed=number)).square().mean()).backward()
        if number == 1 and dist.get_rank() == 1:
            next(p for p in model.parameters() if p.grad is not None and p.grad.numel()).grad.fill_(torch.inf)
        before = [param.detach().clone() for param in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        same = all(map(torch.equal, before, model.parameters()))
        elements = sum(param.numel() for param in before)
        assert same == (number == 1 or elements == 0)
        assert scaler.get_scale() == (4.0 if number == 0 else 2.0)
        optimizer.zero_grad()


# ZeroRedundancyOptimizer, whose processes have whole parameters, each its own ones.

SHARES = {
    "plain": {},
    "views": {"parameters_as_bucket_view": True},
    "average": {"ema_decay": 0.5},
}


@scenario(option=SHARES)
def shares_of_parameters(option):
    """Consolidated in one process, the state is that of one process alone; so is training after it was loaded."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of the age of what it imports

    given = {"lr": 0.1, **SHARES[option]}
    own = {key: given.pop(key) for key in ("parameters_as_bucket_view",) if key in given}
    whole, parts = layers(), DistributedDataParallel(layers())
    expected = fusedstep.AdamW(whole.parameters(), **given)
    mine = ZeroRedundancyOptimizer(parts.parameters(), fusedstep.AdamW, **own, **given)
    for model, optimizer in ((whole, expected), (parts, mine)):
        train(model, optimizer, 0, 1)
    mine.consolidate_state_dict(to=1)
    told = [mine.state_dict() if dist.get_rank() == 1 else None]
    dist.broadcast_object_list(told, src=1)
    alone = expected.state_dict()
    assert told[0]["state"].keys() == alone["state"].keys()
    for index, state in alone["state"].items():
        assert told[0]["state"][index].keys() == state.keys()
        assert all(torch.equal(told[0]["state"][index][key], state[key]) for key in state)
    again = DistributedDataParallel(layers())
    again.load_state_dict(parts.state_dict())
    new = ZeroRedundancyOptimizer(again.parameters(), fusedstep.AdamW, **own, **given)
    new.load_state_dict(copy.deepcopy(told[0]))  # it would take the tensors as they are
    for model, optimizer in ((whole, expected), (parts, mine), (again, new)):
        train(model, optimizer, 2, 3)
    for a, *others in zip(whole.parameters(), parts.parameters(), again.parameters(), strict=True):
        assert all(torch.equal(a, b) for b in others)


# DistributedDataParallel.


@scenario(views=(False, True))
def micro_batches_of_all_processes(views):
    """Accumulated by each without an exchange, and then added up: the mean over all micro-batches."""
    whole, parts = layers(), DistributedDataParallel(layers(), gradient_as_bucket_view=views)
    expected = fusedstep.AdamW(whole.parameters(), lr=0.01, max_grad_norm=0.5)
    mine = fusedstep.AdamW(parts.parameters(), lr=0.01, max_grad_norm=0.5)
    accumulator = fusedstep.GradientAccumulator(mine, mean=True, set_to_none=not views)
    for number in range(3):
        batches = [numbers(5, 6, seed=100 * number + i) for i in range(2 * SIZE)]
        torch.stack([whole(batch).square().mean() for batch in batches]).mean().backward()
        expected.step()
        expected.zero_grad()
        for batch in batches[dist.get_rank() :: SIZE]:
            with parts.no_sync():
                parts(batch).square().mean().backward()
            accumulator()
        accumulator.all_reduce()
        accumulator.assign()
        mine.step()
        accumulator.reset()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# Weights, gradients and states in main memory.


@scenario
def offloaded_weights_are_updated_by_the_cpu_engine():
    given = {"lr": 0.01, "master_weights": "split", "state_dtype": torch.bfloat16, "ema_decay": 0.5}
    # Without a GPU there is no memory to pin.
    policy = CPUOffloadPolicy(pin_memory=False)
    whole, parts = layers().bfloat16(), fully_shard(layers().bfloat16(), mesh=mesh(4), offload_policy=policy)
    expected, mine = (fusedstep.AdamW(model.parameters(), **given) for model in (whole, parts))
    for model, optimizer in ((whole, expected), (parts, mine)):
        train(model, optimizer, 0, 1, 2, dtype=torch.bfloat16)
    assert mine.backends_used == {"cpu"}
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b)


# Checkpoints that are written while training goes on.

EVERYTHING = {**HALF, "rounding": "stochastic", "state_dtype": torch.bfloat16, "ema_decay": 0.5}


@functools.cache
def of_savers():
    """A group of its own: a save that is under way must not meet the exchanges of training."""
    return dist.new_group(backend="gloo")


def pair_with_everything(where, seed):
    schedule = CosineScheduler(max_update=9, base_lr=0.1, warmup_steps=2)
    return Pair(fusedstep.AdamW, where, lr=schedule, rounding_seed=seed, **EVERYTHING)


@scenario(form=("nested", "flattened"))
def asynchronous_saves(form):
    """Of what there was when they began; to ask before the first step changed nothing, in no process."""
    options = FLAT if form == "flattened" else NESTED
    pair = pair_with_everything("four", 17)
    model = Model(pair.parts)
    for asked in (NESTED, FLAT):
        found = get_optimizer_state_dict(model, pair.mine, options=asked)
        states = found["state"] if asked is NESTED else [key for key in found if key.startswith("state.")]
        everywhere = [None] * SIZE
        dist.all_gather_object(everywhere, sorted(states))
        assert all(some == everywhere[0] for some in everywhere)
        assert {key.removeprefix("state.").split(".")[0] for key in states} == {f"p{i}" for i in range(len(pair.parts))}
        assert pair.mine.schedule_step == 0
    for _ in range(2):
        pair.step(skip=(1,))  # which has a state all the same
    pair.assert_same()
    saving = dcp.async_save(
        checkpoint(model, pair.mine, options), checkpoint_id=f"{FOLDER}/async {form}", process_group=of_savers()
    )
    then = copy.deepcopy((pair.whole, pair.expected))
    for _ in range(2):
        pair.step()
    saving.result()
    dist.barrier()
    if takes_part("two"):
        again = pair_with_everything("two", 4)
        again.whole, again.expected = then
        again.number = 2
        model, group = Model(again.parts), mesh(2).get_group()
        template = checkpoint(model, again.mine, options)
        dcp.load(template, checkpoint_id=f"{FOLDER}/async {form}", process_group=group)
        model.load_state_dict(template["model"])
        set_optimizer_state_dict(model, again.mine, template["optimizer"], options=options)
        for _ in range(2):
            again.step()
        again.assert_same()
    dist.barrier()
