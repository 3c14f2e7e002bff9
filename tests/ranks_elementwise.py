"""Scenarios of test_ranks.py: elementwise rules on parts of tensors, their checkpoints, norms and mistakes.

Models and optimizers that torch wraps are in ranks_wrapped.py.
"""

import copy
import functools
import gc
from random import Random

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from kinds import ELEMENTWISE
from ranks import (
    CLOSE,
    COPIES,
    FOLDER,
    HALF,
    MESHES,
    ROWS,
    SEVERAL,
    SHAPES,
    SIZE,
    Model,
    Pair,
    assert_a_flag_of_one_process_skips,
    assert_all_raise,
    assert_untouched,
    checkpoint,
    fsdp,
    fsdp_and_tp,
    fsdp_with_copies,
    layers,
    local,
    mesh,
    numbers,
    overflow,
    raised,
    scenario,
    snapshot,
    takes_part,
)
from support import numbers_of
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fusedstep

# The bits of one process.

OPTIONS = {
    "plain": {},
    "double": {"dtype": torch.float64},
    "average and copy": {"ema_decay": 0.75, "weights_copy": torch.bfloat16},
    "zero": {"zero_grads": True},
    "master": {**HALF, "master_weights": True, "ema_decay": 0.5},
    "split": {**HALF, "master_weights": "split", "state_dtype": torch.bfloat16},
    "kahan": {**HALF, "kahan": True},
    "stochastic": {**HALF, "rounding": "stochastic", "rounding_seed": 2**40 + 17, "weights_copy": torch.float16},
    "reference": {"backend": "reference", **HALF, "rounding": "stochastic"},
}


@scenario(where=MESHES)
def rules(where):
    """Every kind of rule; one parameter has no gradient at first, another one never."""
    if takes_part(where):
        for case in ELEMENTWISE:
            pair = Pair(getattr(fusedstep, case.optimizer), where, **case.options)
            for number in range(3):
                pair.step(skip=(2,) if number else (0, 2))
            pair.assert_same()


@scenario(option=OPTIONS)
def random_layouts(option, seeds=range(12)):
    """Any shape on any of the meshes, along whatever dimensions, by any kind of rule; all processes draw the same."""
    random = Random(option)
    options = dict(OPTIONS[option])
    dtype = options.pop("dtype", torch.float32)
    for seed in seeds:
        where = random.choice(("two", "three", "four", "HSDP"))
        shape = [random.choice((1, 2, 3, 5, 8, 17, 40)) for _ in range(random.randint(1, 3))]
        dims = [random.choice((None, *range(len(shape)))) for _ in MESHES[where][0]]
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        case = random.choice(ELEMENTWISE)
        if not takes_part(where):
            continue
        placed = functools.partial(
            distribute_tensor, device_mesh=mesh(*MESHES[where][0]), placements=placements, src_data_rank=None
        )
        values, *grads = (numbers(*shape, seed=4 * seed + i, dtype=dtype) for i in range(3))
        alone, part = torch.nn.Parameter(values.clone()), torch.nn.Parameter(placed(values.clone()))
        make = functools.partial(getattr(fusedstep, case.optimizer), **{**case.options, **options})
        expected, mine = make([alone]), make([part])
        for grad in grads:
            alone.grad, part.grad = grad.clone(), placed(grad.clone())
            expected.step()
            mine.step()
        for key, other in {"parameter": alone.detach(), **expected.state.get(alone, {})}.items():
            found = part.detach() if key == "parameter" else mine.state[part][key]
            other = placed(other.clone()) if other.dim() else other
            assert torch.equal(local(found), local(other)), (key, str(case), shape, placements, where)
        if mine.stepper.kept.copy.dtype is not None:
            assert torch.equal(local(mine.copies[part]), local(placed(expected.copies[alone].clone())))


@scenario(where=("three", "columns", "FSDP and TP"))
def accumulated_gradients(where):
    if takes_part(where):
        for dtype in (torch.float32, torch.bfloat16):
            pair = Pair(fusedstep.AdamW, where, dtype=dtype, lr=0.01, ema_decay=0.5)
            pair.step_by_micro_batches(set_to_none=dtype == torch.float32)
            pair.assert_same()


@scenario
def a_schedule_on_the_device():
    schedule = fusedstep.schedules.CosineScheduler(max_update=5, base_lr=0.1, final_lr=0.01, warmup_steps=2)
    pair = Pair(fusedstep.AdamW, "four", lr=schedule)
    for _ in range(4):
        pair.step()
    pair.assert_same()


# 8-bit states, whose blocks are those of a part.

BLOCKS = ((16, 512), (3, 5))


@scenario(where=("two", "three", "four", "HSDP", "FSDP and TP", "replicated"))
def blocks_of_whole_rows(where):
    """Where the last dimension is made of blocks, the blocks are those of the whole tensor, and so are all bits."""
    if takes_part(where):
        for given in ({}, {"backend": "reference"}, {**HALF, "rounding": "stochastic"}, {"state_dtype": "4bit"}):
            pair = Pair(fusedstep.AdamW, where, BLOCKS, **{"state_dtype": "8bit", **given})
            for _ in range(3):
                pair.step()
            mine, expected = (each.state_dict()["state"][0] for each in (pair.mine, pair.expected))
            assert torch.equal(local(pair.parts[0]), local(pair.part(pair.whole[0], 0)))
            for key in ("exp_avg", "exp_avg_sq"):
                numbers = numbers_of(pair.expected, expected, key, pair.whole[0])
                assert torch.equal(local(mine[key]), local(pair.part(numbers, 0)))


@scenario(where=("two", "three", "columns"))
def blocks_of_other_parts(where):
    """They are those that an optimizer of the part alone would have."""
    if takes_part(where):
        pair = Pair(fusedstep.AdamW, where, ((41, 700),), state_dtype="8bit", ema_decay=0.5)
        alone = torch.nn.Parameter(local(pair.parts[0]).clone())
        expected = fusedstep.AdamW([alone], state_dtype="8bit", ema_decay=0.5)
        for _ in range(3):
            pair.give()
            alone.grad = local(pair.parts[0].grad).clone()
            pair.mine.step()
            expected.step()
        assert torch.equal(local(pair.parts[0]), alone)
        for key, value in expected.state[alone].items():
            assert torch.equal(local(pair.mine.state[pair.parts[0]][key]), value), key
        again = copy.deepcopy(pair.mine)
        again.load_state_dict(pair.mine.state_dict())
        for optimizer in (pair.mine, again):
            for param in optimizer.param_groups[0]["params"]:
                param.grad = pair.parts[0].grad.clone()
            optimizer.step()
        for a, b in zip(pair.mine.state.values(), again.state.values(), strict=True):
            assert all(torch.equal(local(a[key]), local(b[key])) for key in a)


# Checkpoints.

KEPT = {
    "plain": {},
    "split and average": {**HALF, "master_weights": "split", "ema_decay": 0.75},
    "stochastic": {**HALF, "rounding": "stochastic", "rounding_seed": 2**40 + 17, "state_dtype": torch.bfloat16},
    "schedule": {"lr": "schedule", "max_grad_norm": 100.0},
    "8bit": {"state_dtype": "8bit", "shapes": BLOCKS},
}


def pair_of(where, kept, seed=None):
    options = dict(KEPT[kept])
    if options.get("lr") == "schedule":
        options["lr"] = fusedstep.schedules.CosineScheduler(max_update=9, base_lr=0.1, warmup_steps=2)
    if seed is not None and "rounding_seed" in options:
        options["rounding_seed"] = seed
    return Pair(fusedstep.AdamW, where, **options)


@scenario(kept=KEPT)
def from_one_number_of_processes_to_another(kept):
    """On each a step, as one process goes on alone; parameter 1 has no gradient before the third stage."""
    flat = kept not in ("plain", "stochastic")
    form = StateDictOptions(flatten_optimizer_state_dict=flat)
    stages = [None, "two", "three", "FSDP and TP", "four", None]
    if kept == "8bit":
        stages = stages[1:-1]  # the codes of a whole tensor are in no checkpoint of parts
    whole = pair_of(None, kept)
    for number, where in enumerate(stages):
        skip = (1,) if number < 2 else ()
        if (where is None and dist.get_rank() == 0) or (where is not None and takes_part(where)):
            group = mesh(*MESHES[where][0]).get_group() if where in ("two", "three") else None  # None: of all
            how = {"no_dist": True} if where is None else {"process_group": group}
            pair = pair_of(where, kept, seed=number or None)
            pair.number = number
            pair.whole, pair.expected = whole.whole, whole.expected
            model = Model(pair.parts)
            before = snapshot(pair)
            template = checkpoint(model, pair.mine, form)
            assert pair.mine.schedule_step == 0
            assert all(map(torch.equal, snapshot(pair)[0], before[0]))
            if number:
                dcp.load(template, checkpoint_id=f"{FOLDER}/{kept}{number - 1}", **how)
                model.load_state_dict(template["model"])
                set_optimizer_state_dict(model, pair.mine, template["optimizer"], options=form)
                assert pair.mine.schedule_step == number
            pair.step(skip=skip)
            pair.assert_same_numbers()
            dcp.save(checkpoint(model, pair.mine, form), checkpoint_id=f"{FOLDER}/{kept}{number}", **how)
        else:
            whole.number = number
            whole.give(skip=skip)
            whole.expected.step()
        dist.barrier()


@scenario(kept=KEPT)
def state_dicts_of_whole_tensors(kept):
    """Gathered from parts, of one process, sent by one to the others: training goes on, on parts and in one process."""
    old = pair_of("four", kept)
    for _ in range(2):
        old.step(skip=(1,))
    model, asked = Model(old.parts), {"full_state_dict": True}
    forms = [StateDictOptions(**asked, flatten_optimizer_state_dict=flat) for flat in (False, True)]
    gathered, flattened = (get_optimizer_state_dict(model, old.mine, options=form) for form in forms)
    sent = get_optimizer_state_dict(model, old.mine, options=StateDictOptions(**asked, cpu_offload=True))
    assert bool(sent) == (dist.get_rank() == 0)
    of_one = copy.deepcopy(get_optimizer_state_dict(Model(old.whole), old.expected))
    for state in of_one["state"].values():
        if "weight_remainder" in state:  # no process group carries 16-bit integers
            state["weight_remainder"] = state["weight_remainder"].int()
    for state, where, options in (
        (gathered, "four", asked),
        (of_one, "four", asked),
        (sent, "four", {**asked, "broadcast_from_rank0": True}),
        (gathered, None, {}),
        (flattened, None, {"flatten_optimizer_state_dict": True}),
    ):
        new = pair_of(where, kept, seed=5)
        new.number = old.number
        new.whole, new.expected = copy.deepcopy((old.whole, old.expected))
        with torch.no_grad():
            for i, (part, whole) in enumerate(zip(new.parts, old.whole, strict=True)):
                part.copy_(new.part(whole, i))
        form = StateDictOptions(**options)
        set_optimizer_state_dict(Model(new.parts), new.mine, copy.deepcopy(state), options=form)
        for _ in range(2):
            new.step()
        new.assert_same_numbers()


@scenario(where=("three", "columns", "FSDP and TP"))
def codes_of_a_whole_tensor_become_the_numbers_of_parts(where):
    """Wherever the parts cut its blocks."""
    if not takes_part(where):
        return
    pair = Pair(fusedstep.AdamW, where, ((41, 700), (5, 1024)), state_dtype="8bit")
    for _ in range(2):
        pair.give()
        pair.expected.step()
    given = pair.expected.state_dict()
    expected = {}
    for i, whole in enumerate(pair.whole):
        state = given["state"][i] = dict(given["state"][i])
        for key in ("exp_avg", "exp_avg_sq"):
            expected[i, key] = numbers_of(pair.expected, state, key, whole)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = pair.part(state[key], i)  # as torch's set_optimizer_state_dict does
    new = fusedstep.AdamW([(f"p{i}", part) for i, part in enumerate(pair.parts)], state_dtype=torch.float32)
    new.load_state_dict(given)
    for (i, key), other in expected.items():
        assert torch.equal(local(new.state[pair.parts[i]][key]), local(pair.part(other, i))), (i, key)


@scenario
def codes_of_a_whole_tensor_are_no_part():
    """Neither through a state_dict nor through a checkpoint, which would be read as if codes were numbers."""
    form = StateDictOptions(flatten_optimizer_state_dict=True)
    pair = Pair(fusedstep.AdamW, "four", BLOCKS, state_dtype="8bit")
    pair.step()
    found = raised(ValueError, lambda: pair.mine.load_state_dict(pair.expected.state_dict()))
    assert "'exp_avg' of parameter 0 is in codes of a whole tensor" in found, found
    if dist.get_rank() == 0:
        dcp.save(
            get_optimizer_state_dict(Model(pair.whole), pair.expected, options=form),
            checkpoint_id=f"{FOLDER}/whole",
            no_dist=True,
        )
    dist.barrier()
    template = get_optimizer_state_dict(Model(pair.parts), pair.mine, options=form)
    found = raised(BaseException, lambda: dcp.load(template, checkpoint_id=f"{FOLDER}/whole"))
    assert "exp_avg_scale" in found, found


# Norms.

CLIPS = {
    "2": (fusedstep.SGD, {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.5}),
    "inf": (fusedstep.SGD, {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.5, "norm_type": float("inf")}),
    "write": (fusedstep.AdamW, {"max_grad_norm": 0.5, "write_grads": True}),
    "reference": (fusedstep.SGD, {"lr": 0.1, "max_grad_norm": 0.5, "backend": "reference"}),
    "global_clipnorm": (fusedstep.AdamWeightDecay, {"global_clipnorm": 0.5, "epsilon": 1e-3}),
    "clipnorm": (fusedstep.AdamWeightDecay, {"clipnorm": 0.5, "epsilon": 1e-3}),
    "clipvalue and clipnorm": (fusedstep.AdamWeightDecay, {"clipvalue": 0.9, "clipnorm": 0.5, "epsilon": 1e-3}),
    "clipnorm, checked": (
        fusedstep.AdamWeightDecay,
        {"clipvalue": 0.9, "clipnorm": 0.5, "skip_nonfinite": True, "epsilon": 1e-3},
    ),
}


@scenario(clip=CLIPS)
def clipped(clip):
    cls, given = CLIPS[clip]
    for where in (*MESHES, SEVERAL):
        if where is SEVERAL or takes_part(where):
            pair = Pair(cls, where, **given)
            for number in range(3):
                pair.step(skip=(number,))
            pair.assert_same(**CLOSE)
            if pair.mine.grad_norm is not None:
                torch.testing.assert_close(pair.mine.grad_norm, pair.expected.grad_norm, rtol=1e-6, atol=0)
            if "write_grads" in given:
                for i, (part, whole) in enumerate(zip(pair.parts, pair.whole, strict=True)):
                    if whole.grad is not None:
                        torch.testing.assert_close(local(part.grad), local(pair.part(whole.grad, i)), **CLOSE)


@scenario
def every_process_has_the_same_norm():
    pair = Pair(fusedstep.SGD, SEVERAL, lr=0.1, max_grad_norm=0.1)
    for _ in range(5):
        pair.step()
        norms = [None] * SIZE
        dist.all_gather_object(norms, pair.mine.grad_norm.item())
        assert len(set(norms)) == 1, norms


@scenario
def norms_keep_nothing():
    """Whatever limits steps are given."""
    if takes_part("two"):
        pair = Pair(fusedstep.SGD, "two", lr=0.0, max_grad_norm=1.0)
        pair.give()

        def objects(steps):
            for number in steps:
                pair.mine.step(max_grad_norm=float(number))
            gc.collect()
            return len(gc.get_objects())

        before = objects(range(1, 30))
        assert objects(range(30, 130)) - before < 50


@scenario
def gradients_on_some_processes_alone():
    """As of experts without tokens: the others' parts count as zeros, and nobody waits for ever."""
    pair = Pair(fusedstep.SGD, "four", lr=0.1, max_grad_norm=1e-3)
    pair.give()
    if dist.get_rank() in (0, 2):
        for param in pair.parts:
            param.grad = None
    squares = sum(local(p.grad).double().square().sum() for p in pair.parts if p.grad is not None)
    squares = torch.as_tensor(squares, dtype=torch.float64)
    dist.all_reduce(squares)
    for _ in range(2):
        pair.mine.step()
        torch.testing.assert_close(pair.mine.grad_norm.double(), squares.sqrt(), rtol=1e-6, atol=0)


@scenario(order=(2.0, float("inf")))
def clip_grad_norm(order):
    for where in (*MESHES, SEVERAL):
        if where is SEVERAL or takes_part(where):
            pair = Pair(fusedstep.SGD, where)
            pair.give(skip=(1,))
            norm = fusedstep.clip_grad_norm_(iter(pair.parts), 0.5, order)
            expected = torch.nn.utils.clip_grad_norm_(pair.whole, 0.5, order)
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
            for i, (part, whole) in enumerate(zip(pair.parts, pair.whole, strict=True)):
                if whole.grad is not None:
                    torch.testing.assert_close(local(part.grad), local(pair.part(whole.grad, i)), **CLOSE)


@scenario
def clip_grad_norm_of_what_is_not_finite():
    pair = Pair(fusedstep.SGD, SEVERAL)
    pair.give(change=lambda i, grad: grad.index_fill(0, torch.tensor([0]), torch.inf) if i == 2 else grad)
    grads = [local(p.grad).clone() for p in pair.parts]
    assert "non-finite" in raised(RuntimeError, lambda: fusedstep.clip_grad_norm_(pair.parts, 1.0, 2.0, True))
    assert all(torch.equal(local(p.grad), grad) for p, grad in zip(pair.parts, grads, strict=True))
    assert fusedstep.clip_grad_norm_(pair.parts, 1.0) == torch.inf


@scenario(value=("inf", "nan"))
def an_overflow_on_one_process_skips_on_all(value):
    for where in ("four", "FSDP and TP", SEVERAL):
        for given in ({"skip_nonfinite": True}, {"skip_nonfinite": True, "max_grad_norm": 1.0, "norm_type": torch.inf}):
            pair = Pair(fusedstep.AdamW, where, **given)
            pair.step()
            before = snapshot(pair)
            pair.step(change=overflow(float(value)))
            assert_untouched(pair, before)
            pair.step()
            pair.assert_same(**CLOSE)


@scenario
def an_error_for_what_is_not_finite_is_raised_by_all():
    pair = Pair(fusedstep.AdamWeightDecay, "four", error_if_nonfinite=True, clipnorm=1.0)
    pair.step()
    before = snapshot(pair)
    pair.give(change=overflow(torch.inf))
    assert "non-finite" in raised(RuntimeError, pair.mine.step)
    assert_untouched(pair, before)
    pair.step()


@scenario
def an_overflow_is_seen_by_the_scaler_of_all():
    pair = Pair(fusedstep.AdamW, "four", max_grad_norm=1.0)
    scaler = fusedstep.GradScaler("cpu", init_scale=4.0)
    for number in range(4):
        before = snapshot(pair)
        scaler.scale(torch.ones(()))
        scale = scaler.get_scale()
        pair.give(change=overflow(torch.inf) if number == 2 else None)
        for param in (*pair.parts, *pair.whole):
            if param.grad is not None:
                local(param.grad).mul_(scale)
        if number != 2:
            for param in pair.whole:
                param.grad.div_(scale)
            pair.expected.step()
        scaler.step(pair.mine)
        scaler.update()
        if number == 2:
            assert_untouched(pair, before)
            assert scaler.get_scale() == scale / 2
    pair.assert_same(**CLOSE)


@scenario
def a_flag_of_one_process_skips_on_all():
    for where, given in (
        ("four", {"skip_nonfinite": True}),
        ("four", {"clipnorm": 1.0, "skip_nonfinite": True}),
        ("HSDP", {"skip_nonfinite": True}),
    ):
        pair = Pair(fusedstep.AdamWeightDecay, where, **given)
        assert_a_flag_of_one_process_skips(pair)


# As models are sharded.


@scenario(shard=(fsdp, fsdp_with_copies, fsdp_and_tp))
def models(shard):
    """All processes have the same data, so that the mean of their gradients is that of one."""
    for given in ({}, {"max_grad_norm": 0.1}):
        whole, parts = layers(), shard(layers())
        expected = fusedstep.AdamW(whole.parameters(), lr=0.01, **given)
        mine = fusedstep.AdamW(parts.parameters(), lr=0.01, **given)
        for number in range(4):
            data = numbers(5, 6, seed=number)
            for model, optimizer in ((whole, expected), (parts, mine)):
                model(data).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=number % 2 == 0)
        for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor().detach(), b.detach(), rtol=1e-5, atol=1e-6)
        if given:
            torch.testing.assert_close(mine.grad_norm, expected.grad_norm, rtol=1e-5, atol=0)
        assert not mine.stepper.plans[0].memory_keys


# Mistakes.


@scenario
def gradients_that_are_not_placed_as_parameters():
    for given in ({}, {"max_grad_norm": 1.0}):
        pair = Pair(fusedstep.AdamW, "four", **given)
        pair.step()
        before = snapshot(pair)
        wrong = {
            "a plain tensor": lambda p: torch.zeros(p.shape),
            "those of parameter 0 'p0'": lambda p: distribute_tensor(torch.zeros(p.shape), mesh(4), COPIES),
            "a sum that is still to be made": lambda p: DTensor.from_local(torch.zeros(p.shape), mesh(4), [Partial()]),
            "the mesh of parameter 0 'p0'": lambda p: distribute_tensor(
                torch.zeros(p.shape), mesh(2, 2), ROWS + COPIES
            ),
        }
        for text, make in wrong.items():
            pair.give()
            pair.parts[0].grad = make(pair.parts[0])
            found = raised(RuntimeError, pair.mine.step)
            assert text in found, found
            assert "parameter 0 'p0'" in found, found
            assert_untouched(pair, before)


@scenario
def gradients_that_look_like_the_parameters_part():
    """Another part of the same shape, and a sum that is still to be made."""
    for given in ({}, {"max_grad_norm": 1.0}, {"backend": "reference"}):
        for where, placements in (("HSDP", [Shard(0), Replicate()]), ("HSDP", [Partial(), Shard(0)])):
            pair = Pair(fusedstep.AdamW, where, **given)
            pair.step()
            before = snapshot(pair)
            pair.give()
            pair.parts[0].grad = DTensor.from_local(local(pair.parts[0].grad), mesh(2, 2), placements)
            found = raised(RuntimeError, pair.mine.step)
            assert f"AdamW: the gradient has placements {tuple(placements)}" in found, found
            assert "those of parameter 0 'p0'" in found, found
            assert_untouched(pair, before)


@scenario
def an_error_of_one_process_is_raised_by_all():
    for where, given in (
        ("four", {"max_grad_norm": 1.0}),
        ("four", {"clipnorm": 1.0, "skip_nonfinite": True}),
        ("HSDP", {"max_grad_norm": 1.0}),
    ):
        pair = Pair(fusedstep.AdamWeightDecay, where, **given)
        pair.step()
        assert_all_raise(pair, index=1, odd=2)
        pair.give()
        pair.mine.step()


@scenario
def states_of_another_mesh():
    pair = Pair(fusedstep.AdamW, "four")
    pair.step()
    state = pair.mine.state[pair.parts[1]]
    for other in (distribute_tensor(torch.zeros(7, 5), mesh(2, 2), ROWS + COPIES), torch.zeros(7, 5)):
        before = copy.copy(state)
        state["exp_avg"] = other
        pair.give()
        found = raised(RuntimeError, pair.mine.step)
        assert found.startswith("AdamW: state 'exp_avg' "), found
        assert "parameter 1 'p1'" in found, found
        state.update(before)
    pair.mine.step()


@scenario
def processes_that_disagree():
    odd = dist.get_rank() == 3
    own = {
        "max_grad_norm of AdamW: None in process 0, 1.0 in process 3": {"max_grad_norm": 1.0},
        "lr of parameter 0 'p0': 0.001 in process 0, 0.5 in process 3": {"lr": 0.5},
        "rounding_seed of AdamW": {"rounding_seed": 3},
        "process 0 has 5 parameters, process 3 4": {"shapes": SHAPES[:4]},
        "shape of parameter 1 'p1': (7, 5) in process 0, (7, 6)": {"shapes": ((8, 6), (7, 6), *SHAPES[2:])},
    }
    for text, given in own.items():
        for where in ("four", "FSDP and TP", "HSDP"):
            pair = Pair(fusedstep.AdamW, where, **(given if odd else {}))
            before = snapshot(pair)
            pair.give()
            found = raised(RuntimeError, pair.mine.step)
            assert text in found, found
            assert_untouched(pair, before)


@scenario
def processes_that_ask_for_different_steps():
    """Of the first step all know; later ones take a norm if the first one did, and none if it did not."""
    odd = dist.get_rank() == 2
    asked = {
        "max_grad_norm of SGD: None in process 0, 1.0 in process 2": (None, 1.0),
        "max_grad_norm of SGD: 0.5 in process 0, None in process 2": (0.5, None),
        "max_grad_norm of SGD: 0.5 in process 0, 1.0 in process 2": (0.5, 1.0),
        "TypeError: Invalid max_grad_norm: 'all' is a str": (0.5, "all"),
        "ValueError: Invalid max_grad_norm: -1.0": (None, -1.0),
    }
    for where in ("four", SEVERAL):
        for given in ({}, {"max_grad_norm": 0.5, "norm_type": torch.inf}):
            for text, (usual, other) in asked.items():
                if given and usual is None:
                    continue  # both would be the option's
                if given and other is None:
                    other = torch.inf
                for first in (True, False):
                    pair = Pair(fusedstep.SGD, where, lr=0.1, momentum=0.9, **given)
                    if not first:
                        pair.give()
                        pair.mine.step(max_grad_norm=usual)
                    before = snapshot(pair)
                    pair.give()
                    alone = not first and usual is None  # no other process waits
                    if alone and not odd:
                        pair.mine.step(max_grad_norm=usual)
                        continue
                    step = functools.partial(pair.mine.step, max_grad_norm=other if odd else usual)
                    found = raised((RuntimeError, TypeError, ValueError), step)
                    if alone and other == 1.0:
                        assert "max_grad_norm=math.inf" in found, found
                    elif "Error" in text:
                        assert text.split(": ", 1)[1] in found, found
                        assert odd or "process 2 could not make this step" in found, found
                    else:
                        of = "SGD" if first else "step()"
                        assert found.startswith(f"processes differ in max_grad_norm of {of}: "), found
                    assert_untouched(pair, before)
                    pair.give()
                    pair.mine.step(max_grad_norm=usual)


@scenario
def a_norm_that_the_first_step_took_is_taken_by_all_later_ones():
    """So that nobody waits for a process that asks for none."""
    for given in ({"max_grad_norm": torch.inf}, {}):
        pair = Pair(fusedstep.SGD, "four", lr=0.1, **given)
        for limit in (None if given else 0.5, None, 0.25, None):
            pair.give()
            pair.expected.step(max_grad_norm=limit)
            pair.mine.step(max_grad_norm=limit)
            assert pair.mine.grad_norm is not None
        pair.assert_same(**CLOSE)


@scenario
def an_error_of_one_process_in_its_first_step_is_raised_by_all():
    """Also where no step takes a norm; in a later step nobody else hears of it, and nobody waits."""
    for where in ("four", "HSDP", "FSDP and TP"):
        pair = Pair(fusedstep.AdamW, where)
        for number in range(2):
            before = snapshot(pair)
            pair.give()
            if dist.get_rank() == 1:
                pair.parts[1].grad = torch.zeros(pair.parts[1].shape)
            if number == 1 and dist.get_rank() != 1:
                pair.mine.step()
                continue
            found = raised(RuntimeError, pair.mine.step)
            assert "the gradient is a plain tensor, it must be a DTensor like parameter 1 'p1'" in found, found
            assert ("process 1 could not" in found) == (dist.get_rank() != 1), found
            assert_untouched(pair, before)
            pair.give()
            pair.mine.step()
