"""Schedules as the learning rate of an optimizer: evaluated after each step, with the same bits on every backend."""

import copy
import io
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kinds import ALL, IN_ENGINES, each
from support import by_one_kind, copies, give_grads, ours, parameters, parameters_of, snapshot, step, theirs

import fusedstep
from fusedstep import backends, schedules
from fusedstep.cases import CASES
from fusedstep.schedules import on_device
from fusedstep.schedules.schedule import COSINE, FACTOR, RESTARTS, piece

COSINE_LR = schedules.CosineScheduler(8, 0.05, 0.002, warmup_steps=3)
FAMILY = [
    COSINE_LR,
    schedules.ConstantScheduler(0.3),
    schedules.SquareRootScheduler(0.7),
    schedules.FactorScheduler(0.93, 1e-3, 0.4),
    schedules.MultiFactorScheduler([2, 5, 11], 0.3, 0.2),
    schedules.LinearScheduler(30, 0.1, warmup_steps=4),
    schedules.PolyScheduler(30, 0.1, 3, 0.01, 4, 0.02),
    schedules.PolyScheduler(30, 0.1, 2.5),
    schedules.WarmUp(schedules.SquareRootScheduler(), 6, 0.5),
    schedules.WarmUp(schedules.WarmUp(0.1, 3), 2, 2, 0.4),
    schedules.get_schedule("cosine", 0.1, 3, 17),
    schedules.get_schedule("cosine_with_restarts", 0.1, 3, 30, {"num_cycles": 4}),
    schedules.get_schedule("inverse_sqrt", 0.1, 3),
    schedules.get_schedule("warmup_stable_decay", 0.1, 3, 20, {"num_decay_steps": 5, "decay_type": "1-sqrt"}),
    schedules.get_schedule("warmup_stable_decay", 0.1, 3, 20, {"num_decay_steps": 5, "warmup_type": "cosine"}),
]


def random_schedules(count):
    """Pieces of all kinds with numbers from all over."""
    draw = random.Random(5)
    made = []
    for _ in range(count):
        rows, start = [], 0.0
        for _ in range(draw.randint(1, 5)):
            kind = draw.choice([0.0, COSINE, RESTARTS, FACTOR])
            numbers = {"high": draw.uniform(0, 2), "low": draw.uniform(0, 1)}
            if kind == FACTOR:
                rows.append(piece(start, kind, **numbers, offset=draw.randint(0, 3), exponent=draw.uniform(0.5, 1)))
            elif kind == 0.0:
                rows.append(piece(start, **numbers, offset=1, length=draw.uniform(1, 99), exponent=draw.randint(-5, 9)))
            else:
                rows.append(piece(start, kind, **numbers, length=draw.uniform(1, 99), exponent=draw.uniform(0, 9)))
            start += draw.randint(1, 40)
        made.append(schedules.Schedule(rows))
    return made


def on(backend, made, count=0):
    """The schedules in the hands of a backend on the CPU."""
    return on_device.DeviceSchedules(made, count, torch.device("cpu"), backends.BACKENDS[backend])


def bits(part):
    return part.values.view(torch.int64).tolist()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_backend_has_the_bits_of_the_python_function(backend):
    made = FAMILY + random_schedules(60 if backend == "cpu" else 10)
    mine, reference = on(backend, made), on("reference", made)
    for start in (0, 1000, 123_456_789):
        mine.set_count(start)
        reference.set_count(start)
        for t in range(start, start + (150 if backend == "cpu" else 12)):
            assert mine.lrs == [schedule(t) for schedule in made]
            assert bits(mine) == bits(reference)
            mine.backend.advance_schedules(mine, None)
            reference.backend.advance_schedules(reference, None)


def test_a_skipped_step_does_not_count():
    for backend in ("cpu", "triton", "reference"):
        part = on(backend, [COSINE_LR], 4)
        part.backend.advance_schedules(part, torch.tensor(1.0))
        assert (part.count, part.lrs) == (4, [COSINE_LR(4)])
        part.backend.advance_schedules(part, torch.tensor(0.0))
        assert (part.count, part.lrs) == (5, [COSINE_LR(5)])


# Optimizers.


@pytest.fixture(params=["cpu", "reference", "triton"])
def anywhere(request):
    return request.param


@each(schedule=FAMILY if ALL else FAMILY[::4], case=IN_ENGINES)
def test_training_is_that_of_torch_with_a_scheduler(schedule, case, backend):
    mine = ours(case, parameters(), backend, lr=schedule)
    expected = theirs(case, copies(parameters_of(mine)), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(expected, lambda t: schedule(t) / 0.1)
    for t in range(13):
        assert mine.get_last_lr() == [schedule(t)]
        assert mine.schedule_step == t
        step(mine, expected)
        scheduler.step()
    for a, b in zip(*map(parameters_of, (mine, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c.optimizer in ("AdamW", "SGD")][:2], ids=str)
def test_training_has_the_bits_of_a_written_learning_rate(case, anywhere):
    """And of the same schedule on the host."""
    values = parameters(dtype=torch.float32)
    runs = [
        (ours(case, copies(values), anywhere, lr=COSINE_LR), None),
        (ours(case, copies(values), anywhere, lr=torch.tensor(0.0, dtype=torch.float64)), COSINE_LR),
        (ours(case, copies(values), anywhere, lr=0.1), schedules.ScheduleLR),
    ]
    by_torch = schedules.ScheduleLR(runs[2][0], COSINE_LR)
    optimizers = [optimizer for optimizer, _ in runs]
    for t in range(6):
        optimizers[1].param_groups[0]["lr"].fill_(COSINE_LR(t))
        step(*optimizers)
        by_torch.step()
    for a, b, c in zip(*map(parameters_of, optimizers), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("cls", sorted({case.optimizer for case in CASES}))
def test_every_optimizer_takes_a_schedule(cls, backend):
    case = next(c for c in CASES if c.optimizer == cls)
    mine = ours(case, parameters(), backend, lr=COSINE_LR)
    expected = ours(case, copies(parameters_of(mine)), backend, lr=COSINE_LR(0))
    for t in range(4):
        expected.param_groups[0]["lr"] = COSINE_LR(t)
        step(mine, expected)
    for a, b in zip(*map(parameters_of, (mine, expected)), strict=True):
        assert torch.equal(a, b)


def test_groups_with_schedules_numbers_and_tensors(backend):
    params, tensor = parameters(), torch.tensor(0.3)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "lr": 0.5},
        {"params": params[2:3], "lr": FAMILY[2]},
        {"params": params[3:], "lr": tensor},
    ]
    mine = fusedstep.AdamW(groups, lr=COSINE_LR, backend=backend)
    for t in range(5):
        assert mine.get_last_lr() == [COSINE_LR(t), 0.5, FAMILY[2](t), pytest.approx(0.3)]
        step(mine)
    assert mine.param_groups[3]["lr"] is tensor


def test_the_count_is_the_optimizers(backend):
    """A parameter that joins late, or a group without gradients, does not hold the schedule up; nor is it warmed up."""
    params = parameters()
    mine = fusedstep.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=COSINE_LR, backend=backend)
    for t in range(4):
        step(mine, skip=(1, 2, 3))
        assert mine.get_last_lr() == [COSINE_LR(t + 1)] * 2
    step(mine)
    assert mine.state[params[1]]["step"] == 1
    added = parameters(((4,),))
    mine.add_param_group({"params": added})
    mine.add_param_group({"params": parameters(((2,),)), "lr": FAMILY[2]})
    assert mine.get_last_lr() == [COSINE_LR(5)] * 3 + [FAMILY[2](5)]
    step(mine)
    assert mine.get_last_lr() == [COSINE_LR(6)] * 3 + [FAMILY[2](6)]
    for param in parameters_of(mine):
        param.grad = None
    mine.step()
    assert mine.schedule_step == 7


def test_a_group_that_joins_late_may_begin_with_its_own_warm_up(backend):
    """In a resumed training too."""

    def new():
        return fusedstep.AdamW(parameters(), lr=COSINE_LR, backend=backend)

    def join(mine, at):
        mine.add_param_group({"params": parameters(((2,),)), "lr": COSINE_LR.starting_at(at)})

    mine = new()
    for _ in range(5):
        step(mine)
    join(mine, mine.schedule_step)
    for t in range(4):
        assert mine.get_last_lr() == [COSINE_LR(5 + t), COSINE_LR(t)]
        step(mine)
    other = new()
    join(other, 5)
    other.load_state_dict(mine.state_dict())
    assert other.get_last_lr() == mine.get_last_lr() == [COSINE_LR(9), COSINE_LR(4)]


def test_a_step_that_fails_does_not_count(backend):
    mine = fusedstep.AdamW(parameters(), lr=COSINE_LR, backend=backend)
    step(mine)
    before = snapshot(mine)
    give_grads(mine)
    parameters_of(mine)[1].grad = torch.zeros_like(parameters_of(mine)[1]).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        mine.step()
    assert mine.schedule_step == 1
    assert before[0][1].keys() == mine.state.keys()


def test_grad_scaler_skips(backend):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    mine = fusedstep.AdamW(parameters(), lr=COSINE_LR, backend=backend)
    for number in range(6):
        for param in parameters_of(mine):
            param.grad = None
            scaler.scale((param * (float("inf") if number in (0, 3) else 1.0)).sum()).backward()
        scaler.step(mine)
        scaler.update()
    assert mine.schedule_step == 4
    assert mine.get_last_lr() == [COSINE_LR(4)]


def test_the_kernel_is_told_whether_the_step_was_skipped(backend, monkeypatch):
    """On a GPU only the kernel knows."""
    mine = fusedstep.AdamW(parameters(), lr=COSINE_LR, backend=backend)
    told = []
    evaluating = mine.stepper.learning_rates.parts[0].backend
    monkeypatch.setattr(evaluating, "advance_schedules", lambda part, found_inf: told.append(found_inf) or 0)
    mine.found_inf = torch.tensor(0.0)
    step(mine)
    del mine.found_inf
    step(mine)
    assert told == [torch.tensor(0.0), None]


def test_a_schedule_set_later_and_a_number_instead(backend):
    """The user's assignment holds; the count goes on."""
    mine = fusedstep.AdamW(parameters(), lr=0.1, backend=backend)
    step(mine)
    step(mine)
    mine.param_groups[0]["lr"] = COSINE_LR
    assert mine.state_dict()["param_groups"][0]["lr"] == COSINE_LR(2)
    step(mine)
    assert mine.get_last_lr() == [COSINE_LR(3)]
    mine.param_groups[0]["lr"] = 0.25
    step(mine)
    assert mine.get_last_lr() == [0.25]
    assert "schedule_step" not in mine.state_dict()["param_groups"][0]
    mine.param_groups[0]["lr"] = FAMILY[2]
    step(mine)
    assert mine.get_last_lr() == [FAMILY[2](5)]
    mine.schedule_step = 0
    assert mine.get_last_lr() == [FAMILY[2](0)]
    for bad, error in ((-1, ValueError), (1.5, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="schedule_step"):
            mine.schedule_step = bad


def twice(make):
    first, second = make(), make()
    for a, b in zip(*map(parameters_of, (first, second)), strict=True):
        b.data.copy_(a.data)
    return first, second


def assert_goes_on(first, second, count=5):
    for _ in range(count):
        step(first, second)
        assert first.get_last_lr() == second.get_last_lr()
    for a, b in zip(*map(parameters_of, (first, second)), strict=True):
        assert torch.equal(a, b)


@by_one_kind
def test_resuming(case, backend):
    first, second = twice(lambda: ours(case, parameters(), backend, lr=COSINE_LR))
    for _ in range(4):
        step(first)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["param_groups"][0]["lr"] == COSINE_LR(4)
    assert state["param_groups"][0]["schedule_step"] == 4
    lr = second.param_groups[0]["lr"]
    second.load_state_dict(state)
    assert second.param_groups[0]["lr"] is lr  # where a captured graph reads it
    assert "schedule_step" not in second.param_groups[0]
    for a, b in zip(*map(parameters_of, (first, second)), strict=True):
        b.data.copy_(a.data)
    assert_goes_on(first, second)


def test_a_state_goes_to_torch_and_back(backend):
    """torch counts the parameters' steps alone; they tell where the schedule is."""
    mine = fusedstep.AdamW(parameters(), lr=COSINE_LR, backend=backend)
    other = torch.optim.AdamW(copies(parameters_of(mine)))
    for _ in range(3):
        step(mine)
    other.load_state_dict(mine.state_dict())
    assert other.param_groups[0]["lr"] == COSINE_LR(3)
    step(other)
    step(other)
    mine.load_state_dict(other.state_dict())
    assert mine.schedule_step == 5
    assert mine.get_last_lr() == [COSINE_LR(5)]
    plain = torch.optim.AdamW(copies(parameters_of(mine)), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1)
    step(plain)
    scheduler.step()
    mine.load_state_dict(plain.state_dict())
    step(mine)
    assert mine.get_last_lr() == [COSINE_LR(2)]


def test_a_state_without_a_schedule_takes_its_number(backend):
    mine = fusedstep.AdamW(parameters(), lr=COSINE_LR, backend=backend)
    step(mine)
    plain = fusedstep.AdamW(copies(parameters_of(mine)), lr=0.7, backend=backend)
    plain.load_state_dict(mine.state_dict())
    assert plain.get_last_lr() == [COSINE_LR(1)]
    step(plain)
    assert plain.get_last_lr() == [COSINE_LR(1)]
    assert "schedule_step" not in plain.state_dict()["param_groups"][0]


def test_distributed_checkpoints_hold_the_count(backend):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    first, second = (fusedstep.AdamW(model.parameters(), lr=COSINE_LR, backend=backend) for model in models)
    for _ in range(3):
        step(first)
    set_optimizer_state_dict(models[1], second, get_optimizer_state_dict(models[0], first))
    assert second.schedule_step == 3
    step(second)
    assert second.get_last_lr() == [COSINE_LR(4)]


def test_learning_rates_go_where_the_parameters_are(backend):
    """As if they had been on another device so far."""
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": FAMILY[2]}]
    mine = fusedstep.AdamW(groups, lr=COSINE_LR, backend=backend)
    step(mine)
    old = mine.param_groups[1]["lr"]
    mine.stepper.learning_rates.parts[0].device = torch.device("meta")
    mine.stepper.plans = None
    for t in (1, 2):
        assert mine.get_last_lr() == [COSINE_LR(t), FAMILY[2](t)]
        step(mine)
    assert mine.param_groups[1]["lr"] is not old
    assert len(mine.stepper.learning_rates.parts) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_have_learning_rates_of_their_own(copied, backend):
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": FAMILY[2]}]
    first = fusedstep.AdamW(groups, lr=COSINE_LR, backend=backend)
    step(first)
    step(first)
    second = copied(first)
    step(first)
    assert second.get_last_lr() == [COSINE_LR(2), FAMILY[2](2)]
    assert second.schedule_step == 2
    assert copied(copied(second)).get_last_lr() == second.get_last_lr()
    step(second)
    assert first.get_last_lr() == second.get_last_lr() == [COSINE_LR(3), FAMILY[2](3)]


def test_a_torch_scheduler_beside_a_schedule_is_refused_before_anything_changes(backend):
    mine = fusedstep.AdamW(parameters(), lr=COSINE_LR, backend=backend)
    step(mine)
    torch.optim.lr_scheduler.StepLR(mine, 1)
    before = [p.detach().clone() for p in parameters_of(mine)]
    give_grads(mine)
    with pytest.raises(RuntimeError, match=r"follows CosineScheduler\(.*\) by itself.*make no scheduler"):
        mine.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(mine), strict=True))
    assert mine.schedule_step == 1


def test_what_cannot_be_evaluated_on_a_device_is_refused(backend):
    params = parameters()
    for schedule, why in (
        (schedules.WarmUp(abs, 3, initial_learning_rate=1.0), "function abs> is a function"),
        (schedules.PolyScheduler(9, pwr=0.7), "power 0.7 is not a multiple of 0.5"),
        (schedules.WarmUp(COSINE_LR, 3, 1.2), "power 1.2 is not a multiple of 0.5"),
    ):
        with pytest.raises(ValueError, match=f"{why}; use fusedstep.schedules.ScheduleLR"):
            fusedstep.AdamW(params, lr=schedule, backend=backend)
        mine = fusedstep.AdamW(params, lr=COSINE_LR, backend=backend)
        with pytest.raises(ValueError, match=why):
            mine.add_param_group({"params": parameters(((1,),)), "lr": schedule})
        assert len(mine.param_groups) == 1
        mine.param_groups[0]["lr"] = schedule
        with pytest.raises(ValueError, match=why):
            step(mine)
    with pytest.raises(TypeError, match="learning rate"):
        fusedstep.AdamW(params, lr=schedules.ScheduleLR, backend=backend)
    with pytest.raises(TypeError, match="must be a number"):  # which the decay is divided by
        fusedstep.Lion(params, lr=COSINE_LR, decoupled_weight_decay=True, backend=backend)


def test_one_kernel_call_more_for_all_groups():
    params = parameters()
    mine = fusedstep.AdamW([{"params": [p]} for p in params], lr=COSINE_LR, backend="cpu")
    step(mine)
    assert mine.kernel_calls == len(params) + 1


def test_modes_of_torch_do_not_reach_the_schedule(backend):
    for mode in (torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            params = [torch.nn.Parameter(torch.ones(3, device="cpu"))]
            mine = fusedstep.AdamW(params, lr=COSINE_LR, backend=backend)
            params[0].grad = torch.ones(3, device="cpu")
            mine.step()
            mine.step()
            assert mine.get_last_lr() == [COSINE_LR(2)]


# The kernels' code.


def test_triton_code_for_sm_90_has_the_same_operations():
    """Every constant in double precision, no contraction, no approximation."""
    from fusedstep import numerics

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile_schedule.py")
    ran = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["fma"] == found["approximate"] == found["single"] == found["local"] == 0
    assert found["rounded_divisions"] > 0
    assert found["rounded_roots"] > 0
    expected = {number for number in (*numerics.COS_PI, *numerics.SIN_PI) if number != 1.0}
    assert expected <= {float.fromhex(number) for number in found["constants"]}
