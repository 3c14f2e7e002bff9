"""What rules that reduce do in several processes, for test_ranks_reducing.py, in the way of ranks.py.

Sums are added up in another order than one process has: numbers are those of one process to 1e-6, and where no sum
crosses processes to the last bit.
"""

import copy
import functools
import gc
import warnings
from itertools import product
from random import Random
from unittest import mock

import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from kinds import ALL, OF_EACH_REDUCING
from ranks import (
    CLOSE,
    COPIES,
    FOLDER,
    MESHES,
    SEVERAL,
    Model,
    Pair,
    assert_a_flag_of_one_process_skips,
    assert_all_raise,
    assert_untouched,
    checkpoint,
    local,
    mesh,
    overflow,
    raised,
    snapshot,
    takes_part,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedstep
from fusedstep.backends import lifetime
from fusedstep.cases import REDUCING

SCENARIOS = {}
scenario = functools.partial(ranks.scenario, among=SCENARIOS)

# Matrices, a batch of them, kernels, vectors; parts that are uneven or empty; single rows and columns.
SHAPES = ((8, 6), (7, 5), (3,), (2, 33), (64, 96), (3, 5, 4), (9, 4, 3, 3), (1, 7), (6, 1), (11,))
EXACT = {"rtol": 0, "atol": 0}
ADAFACTOR = {"lr": 0.05, "relative_step": False, "beta1": 0.5, "weight_decay": 0.1}


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(other):
    """1e-6 of the numbers, of which the largest have made the others by cancelling; in float64 the numbers to 1e-9."""
    if other.dtype == torch.float64:
        return {"rtol": 1e-9, "atol": 1e-12}
    return {"rtol": 0, "atol": 1e-6 * other.detach().float().abs().max().item() if other.numel() else 0}


def assert_close(pair, exact=False):
    """Parameters, states and copies are those of one process; what processes share, each of them has so."""
    for i, (part, expected) in enumerate(zip(pair.parts, pair.whole, strict=True)):
        states, others = pair.mine.state.get(part, {}), pair.expected.state.get(expected, {})
        assert states.keys() == others.keys(), (i, states.keys(), others.keys())
        found = {"parameter": (part, expected), **{key: (states[key], others[key]) for key in states}}
        if pair.mine.stepper.kept.copy.dtype is not None:
            found["copy"] = pair.mine.copies[part], pair.expected.copies[expected]
        for key, (mine, other) in found.items():
            text = f"{key} of p{i}, {pair.where[i]}"
            if pair.where[i] is not None and other.dim():
                assert isinstance(mine, DTensor), text
                assert mine.device_mesh == part.device_mesh, text
            assert mine.dtype == other.dtype, text
            torch.testing.assert_close(
                whole(mine),
                other.detach(),
                **(EXACT if exact else close(other)),
                msg=lambda found, text=text: f"{text}: {found}",
            )


def pair_of(case, where, **given):
    given = {"shapes": SHAPES, **given}
    options = {**case.options, **given}
    if "reduce" in options and options["reduce"] == (0,):
        options["reduce"] = {f"p{i}": (0,) for i in range(0, len(given["shapes"]), 2)}  # the others are elementwise
    return Pair(getattr(fusedstep, case.optimizer), where, **options)


@scenario(case=REDUCING)
def rules(case):
    """One of each rule on every mesh, the others on some; one parameter has no gradient at first, another one never."""
    several = SEVERAL * 2
    places = [(several, torch.float32), ("columns", torch.float64)]
    if ALL or case in OF_EACH_REDUCING:
        places = product((*MESHES, several), (torch.float32, torch.float64))
    for where, dtype in places:
        if where is several or takes_part(where):
            pair = pair_of(case, where, dtype=dtype)
            for number in range(3):
                pair.step(skip=(2,) if number else (0, 2))
            assert_close(pair, exact=where == "replicated")


@scenario(backend=("cpu", "reference"))
def random_layouts(backend, seeds=range(40)):
    """Any shape on any of the meshes, along whatever dimensions; all processes draw the same."""
    random = Random(17)
    for seed in seeds:
        where = random.choice(("two", "three", "four", "HSDP"))
        shape = [random.choice((1, 2, 3, 5, 8, 17)) for _ in range(random.randint(1, 4))]
        dims = [random.choice((None, *range(len(shape)))) for _ in MESHES[where][0]]
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        case = random.choice(REDUCING)
        options = dict(case.options)
        if "reduce" in options:
            first = random.randrange(len(shape))
            options["reduce"] = tuple(range(first, random.randint(first, len(shape) - 1) + 1))
        if takes_part(where):
            placed = functools.partial(
                distribute_tensor, device_mesh=mesh(*MESHES[where][0]), placements=placements, src_data_rank=None
            )
            values, *grads = (ranks.numbers(*shape, seed=4 * seed + i, dtype=torch.float64) for i in range(3))
            alone, part = torch.nn.Parameter(values.clone()), torch.nn.Parameter(placed(values.clone()))
            make = functools.partial(getattr(fusedstep, case.optimizer), backend=backend, **options)
            expected, mine = make([alone]), make([part])
            for grad in grads:
                alone.grad, part.grad = grad, placed(grad.clone())
                expected.step()
                mine.step()
            for key, other in {"parameter": alone.detach(), **expected.state[alone]}.items():
                text = f"{key} of {case} {options}, shape {shape}, {placements} on {where}"
                found = whole(part if key == "parameter" else mine.state[part][key])
                torch.testing.assert_close(
                    found, other, rtol=1e-9, atol=1e-12, msg=lambda given, text=text: f"{text}: {given}"
                )


@scenario
def large_matrices():
    """Lines are cut into blocks, and several threads share them: with the same bits."""
    for where in ("two", "columns", "FSDP and TP"):
        if takes_part(where):
            runs = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                pair = Pair(fusedstep.Adafactor, where, ((300, 260), (5, 20000), (70000,)), **ADAFACTOR)
                for _ in range(2):
                    pair.step()
                assert_close(pair)
                runs.append([local(t).clone() for p in pair.parts for t in (p, *pair.mine.state[p].values())])
            torch.set_num_threads(1)
            assert all(map(torch.equal, *runs))


# Options, on one rule or two; each with the class.

OPTIONS = {
    "clipped": (fusedstep.Adafactor, {"max_grad_norm": 0.5}),
    "clipped by the largest": (fusedstep.TorchAdafactor, {"max_grad_norm": 0.5, "norm_type": torch.inf}),
    "average and copy": (fusedstep.Adafactor, {**ADAFACTOR, "ema_decay": 0.75, "weights_copy": torch.bfloat16}),
    "zero": (fusedstep.Adafactor, {"zero_grads": True}),
    "write": (fusedstep.Adafactor, {"write_grads": True, "max_grad_norm": 0.5, "maximize": True}),
    "reference": (fusedstep.Adafactor, {**ADAFACTOR, "backend": "reference"}),
    "cpu": (fusedstep.Adafactor, {"backend": "cpu"}),
    "narrow": (fusedstep.Adafactor, {**ADAFACTOR, "dtype": torch.bfloat16, "ema_decay": 0.75}),
    "narrow states": (fusedstep.TorchAdafactor, {"dtype": torch.bfloat16}),
    "narrow reduced": (fusedstep.Amos, {"reduce": (-1,), "momentum": 0.5, "dtype": torch.bfloat16}),
}


@scenario(option=OPTIONS)
def options(option):
    cls, given = OPTIONS[option]
    for where in ("three", "columns", "FSDP and TP", "HSDP", SEVERAL):
        if where is SEVERAL or takes_part(where):
            pair = Pair(cls, where, SHAPES[:5], **given)
            for number in range(3):
                pair.step(skip=(number,))
            if given.get("dtype") == torch.bfloat16:
                assert_close_in_16_bits(pair)
            else:
                assert_close(pair)
            for i, (part, expected) in enumerate(zip(pair.parts, pair.whole, strict=True)):
                if expected.grad is not None:
                    grad = pair.part(expected.grad, i)
                    torch.testing.assert_close(local(part.grad), local(grad), **CLOSE)


def assert_close_in_16_bits(pair):
    """A number that is rounded another way is one of the neighbours."""
    for part, expected in zip(pair.parts, pair.whole, strict=True):
        pairs = [(part, expected)]
        pairs += [(state, pair.expected.state[expected][key]) for key, state in pair.mine.state[part].items()]
        for mine, other in pairs:
            scale = other.detach().float().abs().max().item()
            torch.testing.assert_close(whole(mine).float(), other.detach().float(), rtol=2.0**-7, atol=2e-3 * scale)


@scenario(case=(REDUCING[0], REDUCING[-1]))
def accumulated_gradients(case):
    for where in ("three", "FSDP and TP"):
        if takes_part(where):
            pair = pair_of(case, where)
            pair.step_by_micro_batches()
            assert_close(pair)


@scenario
def a_schedule_on_the_device():
    schedule = fusedstep.schedules.CosineScheduler(max_update=5, base_lr=0.1, final_lr=0.01, warmup_steps=2)
    pair = Pair(fusedstep.TorchAdafactor, "four", lr=schedule)
    for _ in range(4):
        pair.step()
    assert_close(pair)


@scenario
def dimensions_that_are_edited():
    """From the next step on they are others, also where no sum crossed processes before."""
    pair = Pair(fusedstep.Amos, "four", SHAPES[:3], lr=0.1)
    for reduce in (None, {"p0": (0,)}, {"p0": (0, 1), "p1": (0,)}, {"p1": (1,)}):
        for optimizer in (pair.expected, pair.mine):
            optimizer.param_groups[0]["reduce"] = reduce
            optimizer.state.clear()
        for _ in range(2):
            pair.step()
        assert_close(pair)


@scenario
def no_matrix_travels():
    """All sums of a step go through three calls for each group, of as many numbers as there are lines, at most."""
    sent = []
    original = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    pair = Pair(fusedstep.Adafactor, "four", SHAPES)
    pair.step()
    pair.give()
    dist.all_reduce = counted
    try:
        pair.mine.step()
    finally:
        dist.all_reduce = original
    lines = sum(torch.Size(shape[:-2]).numel() * shape[-1] for shape in SHAPES if len(shape) > 1)
    assert len(sent) == 3, sent
    assert sum(sent) <= lines + 5 * len(SHAPES) + 2 + 3 * 4, (sent, lines)


@scenario
def every_run_and_every_process_has_the_same_bits():
    for where in ("four", "HSDP", "FSDP and TP", SEVERAL):
        runs = []
        for _ in range(2):
            pair = Pair(fusedstep.Adafactor, where, SHAPES[:5], **ADAFACTOR, max_grad_norm=1.0)
            for _ in range(3):
                pair.give()
                pair.mine.step()
            runs.append([whole(t) for p in pair.parts for t in (p, *pair.mine.state[p].values())])
        assert all(map(torch.equal, *runs))
        others = [None] * ranks.SIZE
        dist.all_gather_object(others, runs[0])
        for other in others:
            assert all(map(torch.equal, other, runs[0]))


@scenario
def what_no_sum_crosses_is_left_to_the_engine():
    """Where dimensions are sharded that the rule keeps: it has the bits of an optimizer of the part alone."""
    case = {"lr": 0.1, "momentum": 0.5, "backend": "cpu"}
    shapes = ((8, 6), (7, 5), (64, 96), (3, 5, 4), (1, 7))
    for where, reduce in (("three", (-1,)), ("columns", (0,)), ("HSDP", (-1,)), ("replicated", (-1,)), ("four", (1,))):
        if takes_part(where):
            pair = Pair(fusedstep.Amos, where, shapes, **case, reduce=reduce)
            alone = [torch.nn.Parameter(local(part).clone()) for part in pair.parts]
            expected = fusedstep.Amos(alone, **case, reduce=reduce)
            for _ in range(3):
                pair.give()
                for own, part in zip(alone, pair.parts, strict=True):
                    own.grad = local(part.grad).clone()
                for optimizer in (pair.expected, pair.mine, expected):
                    optimizer.step()
            assert_close(pair, exact=where == "replicated")
            for own, part in zip(alone, pair.parts, strict=True):
                assert torch.equal(local(part), own)
            assert pair.mine.backends_used == {"cpu"}
            assert pair.mine.kernel_calls > 0


@scenario
def a_mesh_of_one_process_costs_no_exchange():
    """The engine takes tensors that are whole, in one call, and to the bits of plain ones."""
    alone = mesh(1)
    if alone.get_coordinate() is not None:
        values = [ranks.numbers(*shape, seed=i) for i, shape in enumerate(SHAPES)]
        plain = [torch.nn.Parameter(v.clone()) for v in values]
        parts = [torch.nn.Parameter(distribute_tensor(v, alone, [Shard(0)], src_data_rank=None)) for v in values]
        expected, mine = (fusedstep.Adafactor(params, **ADAFACTOR) for params in (plain, parts))
        for _ in range(2):
            for i, (a, b) in enumerate(zip(plain, parts, strict=True)):
                a.grad = ranks.numbers(*a.shape, seed=100 + i)
                b.grad = distribute_tensor(a.grad, alone, [Shard(0)], src_data_rank=None)
            expected.step()
            mine.step()
        assert (mine.backends_used, mine.kernel_calls) == (expected.backends_used, expected.kernel_calls)
        for a, b in zip(plain, parts, strict=True):
            assert torch.equal(a, local(b))
            assert all(torch.equal(value, local(mine.state[b][key])) for key, value in expected.state[a].items())


@scenario
def a_steady_step_asks_nothing_of_dtensors():
    types = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, seen, args=(), kwargs=None):
            types.extend(seen)
            return function(*args, **(kwargs or {}))

    pair = Pair(fusedstep.Adafactor, "four", SHAPES, backend="cpu", **ADAFACTOR)
    for _ in range(2):
        pair.step()
    versions = [part._version for part in pair.parts]
    with Watching():
        torch.ones_like(pair.parts[0])
        assert DTensor in types
        types.clear()
        pair.mine.step()
    assert DTensor not in types
    assert pair.mine.kernel_calls == 1
    assert all(part._version > version for part, version in zip(pair.parts, versions, strict=True))


@scenario
def parts_that_are_no_stretch_of_memory():
    """The engine takes none; torch's operations do, whatever the backend is."""
    if takes_part("columns"):
        values, *grads = (ranks.numbers(6, 9, seed=seed) for seed in range(4))
        alone = torch.nn.Parameter(values.clone())
        memory = local(ranks.distributed(values, "columns")).t().contiguous().t()
        part = torch.nn.Parameter(DTensor.from_local(memory, mesh(3), [Shard(1)]))
        assert not local(part).is_contiguous()
        expected, mine = (fusedstep.Adafactor([p], **ADAFACTOR, backend="cpu") for p in (alone, part))
        for grad in grads:
            alone.grad, part.grad = grad, ranks.distributed(grad, "columns")
            expected.step()
            mine.step()
        assert mine.backends_used == {"reference"}
        torch.testing.assert_close(whole(part), alone.detach(), **close(alone))
        for key, value in mine.state[part].items():
            torch.testing.assert_close(whole(value), expected.state[alone][key], rtol=1e-6, atol=1e-7)


# As models are sharded: the last way shards one dimension twice, in an order that is not that of the mesh.


@scenario(shard=(ranks.fsdp, ranks.fsdp_with_copies, ranks.fsdp_and_tp))
def models(shard):
    """All processes have the same data, so that the mean of their gradients is that of one.

    What is saved is, for a process that has the whole model, what they had together.
    """
    for cls, given in ((fusedstep.Adafactor, ADAFACTOR), (fusedstep.TorchAdafactor, {"max_grad_norm": 0.1})):
        alone, parts = ranks.layers(), shard(ranks.layers())
        expected = cls(alone.parameters(), **given)
        mine = cls(parts.parameters(), **given)
        for number in range(4):
            data = ranks.numbers(5, 6, seed=number)
            for model, optimizer in ((alone, expected), (parts, mine)):
                model(data).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=number % 2 == 0)
        for a, b in zip(parts.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(a), b.detach(), rtol=1e-5, atol=1e-6)
            assert mine.state[a].keys() == expected.state[b].keys()
            for key, value in mine.state[a].items():
                torch.testing.assert_close(whole(value), expected.state[b][key], rtol=1e-4, atol=1e-7)
        place, form = f"{FOLDER}/{shard.__name__} {cls.__name__}", StateDictOptions()
        dcp.save(checkpoint(parts, mine, form), checkpoint_id=place)
        dist.barrier()
        loaded = ranks.layers()
        optimizer = cls(loaded.parameters(), **given)
        template = checkpoint(loaded, optimizer, form)
        dcp.load(template, checkpoint_id=place, no_dist=True)
        set_optimizer_state_dict(loaded, optimizer, template["optimizer"], options=form)
        for a, b in zip(parts.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(whole(a), b)
            for key, value in mine.state[a].items():
                assert torch.equal(whole(value), optimizer.state[b][key]), key


# Gradients that are not everywhere.


@scenario(where=("four", "HSDP", "FSDP and TP", "columns"))
def gradients_on_some_processes_alone(where):
    """The others' parts count as zeros, and what all share stays the same for all; also before there are states."""
    if takes_part(where):
        for first in (True, False):
            pair = Pair(fusedstep.Adafactor, where, SHAPES[:5], **ADAFACTOR)
            if not first:
                pair.step()
            for _ in range(2):
                pair.give()
                for i, (part, expected) in enumerate(zip(pair.parts, pair.whole, strict=True)):
                    # Of HSDP these are both copies of a part.
                    lacks = i in (1, 2, 4) and dist.get_rank() in (0, 2)
                    if lacks:
                        local(part.grad).zero_()
                    expected.grad = part.grad.full_tensor()
                    if lacks:
                        part.grad = None
                pair.expected.step()
                pair.mine.step()
            assert_close(pair)


@scenario
def an_overflow_on_one_process_skips_on_all():
    for where in ("four", "FSDP and TP", SEVERAL):
        pair = Pair(fusedstep.Adafactor, where, SHAPES[:5], skip_nonfinite=True, zero_grads=True)
        pair.step()
        before = snapshot(pair)
        pair.step(change=overflow(torch.inf))
        assert_untouched(pair, before)
        assert all(not local(p.grad).any() for p in pair.parts)
        pair.step()
        assert_close(pair)


@scenario
def a_flag_of_one_process_skips_on_all():
    """Also without a norm, which would tell it."""
    for where in ("four", "HSDP", SEVERAL):
        pair = Pair(fusedstep.Adafactor, where, SHAPES[:5], zero_grads=True)
        assert_a_flag_of_one_process_skips(pair)
        assert all(not local(p.grad).any() for p in pair.parts)
        pair.step()


@scenario
def a_scaler():
    pair = Pair(fusedstep.TorchAdafactor, "four", SHAPES[:5])
    scaler = fusedstep.GradScaler("cpu", init_scale=4.0)
    for number in range(3):
        before = snapshot(pair)
        scaler.scale(torch.ones(()))
        scale = scaler.get_scale()
        pair.give(change=overflow(torch.inf) if number == 1 else None)
        for part in pair.parts:
            local(part.grad).mul_(scale)
        if number != 1:
            pair.expected.step()
        scaler.step(pair.mine)
        scaler.update()
        if number == 1:
            assert_untouched(pair, before)
            assert scaler.get_scale() == scale / 2
    assert_close(pair)


# Checkpoints.

KEPT = {
    "Adafactor": (fusedstep.Adafactor, {**ADAFACTOR, "ema_decay": 0.75}),
    "TorchAdafactor": (fusedstep.TorchAdafactor, {"lr": 0.1}),
    "Amos": (fusedstep.Amos, {"lr": 0.1, "reduce": (0,), "momentum": 0.5}),
}
TARGETS = (None, "three", "four", "columns", "HSDP", "FSDP and TP")


@scenario(kept=KEPT)
def from_two_processes_to_others(kept):
    """States are those that were saved to the last bit; then a step is made, and all is saved for one process again."""
    cls, given = KEPT[kept]
    form = StateDictOptions(flatten_optimizer_state_dict=kept != "Amos")
    first = Pair(cls, "two", SHAPES, **given) if takes_part("two") else Pair(cls, None, SHAPES, **given)
    for number in range(2):
        first.step(skip=(1,) if number == 0 else ())
    if takes_part("two"):
        group = mesh(2).get_group()
        dcp.save(
            checkpoint(Model(first.parts), first.mine, form), checkpoint_id=f"{FOLDER}/{kept}", process_group=group
        )
        saved = [{key: whole(value) for key, value in first.mine.state[p].items()} for p in first.parts]
        if dist.get_rank() == 0:
            torch.save(saved, f"{FOLDER}/{kept}.saved")
    dist.barrier()
    saved = torch.load(f"{FOLDER}/{kept}.saved", weights_only=True)
    for where in TARGETS:
        if where is None or takes_part(where):
            how = {"no_dist": True}
            if where is not None and mesh(*MESHES[where][0]).size() < ranks.SIZE:
                how = {"process_group": mesh(*MESHES[where][0]).get_group()}
            elif where is not None:
                how = {}
            pair = Pair(cls, where, SHAPES, **given)
            model = Model(pair.parts)
            template = checkpoint(model, pair.mine, form)
            dcp.load(template, checkpoint_id=f"{FOLDER}/{kept}", **how)
            model.load_state_dict(template["model"])
            set_optimizer_state_dict(model, pair.mine, template["optimizer"], options=form)
            for part, states in zip(pair.parts, saved, strict=True):
                found = pair.mine.state[part]
                assert found.keys() == states.keys()
                for key, value in states.items():
                    assert torch.equal(whole(found[key]), value), key
                    assert isinstance(found[key], DTensor) == (where is not None and value.dim() > 0), key
            pair.expected = copy.deepcopy(first.expected)
            pair.whole = pair.expected.param_groups[0]["params"]
            pair.number = first.number
            pair.step()
            assert_close(pair)
            if where == "four":
                dcp.save(checkpoint(model, pair.mine, form), checkpoint_id=f"{FOLDER}/{kept} again")
                dist.barrier()
                alone = Pair(cls, None, SHAPES, **given)
                model = Model(alone.parts)
                template = checkpoint(model, alone.mine, form)
                dcp.load(template, checkpoint_id=f"{FOLDER}/{kept} again", no_dist=True)
                set_optimizer_state_dict(model, alone.mine, template["optimizer"], options=form)
                for part, other in zip(pair.parts, alone.parts, strict=True):
                    for key, value in pair.mine.state[part].items():
                        assert torch.equal(whole(value), alone.mine.state[other][key]), key


@scenario
def a_state_dict_of_parts():
    """Loaded into a copy that has gone on, training goes on as from where it was taken."""
    pair = Pair(fusedstep.Adafactor, SEVERAL, SHAPES[:5], **ADAFACTOR)
    for _ in range(2):
        pair.step()
    again = copy.deepcopy(pair.mine)
    again.load_state_dict(pair.mine.state_dict())
    pair.step()
    for param, part in zip(again.param_groups[0]["params"], pair.parts, strict=True):
        param.grad = part.grad.clone()
    again.step()
    for mine, other in zip(again.param_groups[0]["params"], pair.parts, strict=True):
        assert torch.equal(local(mine), local(other))
        for key, value in again.state[mine].items():
            assert torch.equal(local(value), local(pair.mine.state[other][key])), key


@scenario
def steps_keep_nothing():
    for backend in ("cpu", "reference"):
        pair = Pair(fusedstep.Adafactor, "four", SHAPES[:5], backend=backend, max_grad_norm=1.0)
        pair.give()

        def objects(steps, pair=pair):
            for _ in range(steps):
                pair.mine.step()
            gc.collect()
            return len(gc.get_objects())

        before = objects(10)
        assert objects(30) - before < 15


# Mistakes.


@scenario
def an_error_of_one_process_is_raised_by_all():
    """In its first step too."""
    for where in ("four", "HSDP", SEVERAL):
        for given in ({}, {"max_grad_norm": 1.0}):
            for steps in (0, 1):
                pair = Pair(fusedstep.Adafactor, where, SHAPES[:5], **given)
                for _ in range(steps):
                    pair.step()
                assert_all_raise(pair, index=2, odd=2)
                pair.step()
                pair.step()
                assert_close(pair)


@scenario
def a_parameter_that_is_frozen_in_some_processes():
    pair = Pair(fusedstep.Adafactor, "four", SHAPES[:3])
    pair.step(skip=(1,))
    before = snapshot(pair)
    pair.give()
    if dist.get_rank() == 1:
        pair.parts[1].requires_grad_(False)
        pair.parts[1].grad = None
    found = raised(RuntimeError, pair.mine.step)
    assert "some processes have a gradient of parameter 1 'p1'" in found, found
    assert_untouched(pair, before)


@scenario
def states_of_other_places():
    pair = Pair(fusedstep.Adafactor, "four", SHAPES[:3])
    pair.step()
    state = pair.mine.state[pair.parts[0]]
    before = dict(state)
    odd = {
        "exp_avg_sq_row' is a plain tensor": torch.zeros(8),
        "exp_avg_sq_row' has placements (Replicate(),); they must be (Shard(dim=0),)": distribute_tensor(
            torch.zeros(8), mesh(4), COPIES
        ),
    }
    for text, value in odd.items():
        state["exp_avg_sq_row"] = value
        pair.give()
        found = raised(RuntimeError, pair.mine.step)
        assert text in found, found
        assert "parameter 0 'p0'" in found, found
        state.update(before)
    pair.mine.step()
    found = raised(ValueError, lambda: pair.mine.load_state_dict(pair.expected.state_dict()))
    assert "is a plain tensor, it must be a DTensor like parameter 0 'p0'" in found, found
    pair.mine.step()


@scenario
def parameters_that_cannot_be():
    for cls in (fusedstep.Adafactor, fusedstep.TorchAdafactor):
        summed = torch.nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh(4), [Partial()]))
        found = raised(RuntimeError, functools.partial(cls, [("weight", summed)]))
        assert f"{cls.__name__} takes sums over tensors that are sharded or replicated" in found, found
        assert "parameter 0 'weight'" in found, found
    twice = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh(4), [Shard(0)]))
    found = raised(ValueError, lambda: listed_twice(twice).step())
    assert "parameter 1, shape (4, 4), torch.float32, cpu is given twice" in found, found


def listed_twice(param):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        optimizer = fusedstep.Adafactor([param, param])
    param.grad = distribute_tensor(torch.ones(4, 4), mesh(4), [Shard(0)])
    return optimizer


@scenario
def processes_that_disagree_about_dimensions():
    reduce = {f"p{i}": (0,) for i in range(3)}
    if dist.get_rank() == 3:
        reduce["p1"] = (1,)
    pair = Pair(fusedstep.Amos, "four", SHAPES[:3], reduce=reduce)
    before = snapshot(pair)
    pair.give()
    assert "processes differ in reduce of parameter 0 'p0'" in raised(RuntimeError, pair.mine.step)
    assert_untouched(pair, before)


@scenario
def a_step_that_is_captured():
    pair = Pair(fusedstep.TorchAdafactor, "four", SHAPES[:3])
    pair.give()
    pair.mine.step()
    before = snapshot(pair)
    pair.give()
    with mock.patch.object(lifetime, "is_capturing", return_value=True):
        assert "a CUDA graph cannot hold such a step" in raised(RuntimeError, pair.mine.step)
    assert_untouched(pair, before)
    pair.give()
    pair.mine.step()


def main():
    ranks.main(SCENARIOS)


if __name__ == "__main__":
    main()
