"""Schedules as functions and as torch schedulers, against the published formulas and the classes of d2l's book."""

import copy
import math
import pickle

import pytest
import torch
from kinds import ALL, each, one_of_each
from torch.optim import lr_scheduler

import fusedstep
from fusedstep.numerics import cos_pi
from fusedstep.schedules import (
    ConstantScheduler,
    CosineScheduler,
    FactorScheduler,
    LinearScheduler,
    MultiFactorScheduler,
    PolyScheduler,
    ScheduleLR,
    SquareRootScheduler,
    WarmUp,
)

# The book's formulas, written from its text, with libm's functions.


def warmed(t, warmup_steps, begin, base):
    return begin + (base - begin) * t / warmup_steps


def cosine(t, max_update, base=0.01, final=0.0, warmup=0, begin=0.0):
    if t < warmup:
        return warmed(t, warmup, begin, base)
    if t > max_update:
        return final
    return final + (base - final) / 2 * (1 + math.cos(math.pi * (t - warmup) / (max_update - warmup)))


def polynomial(t, max_update, base=0.01, power=2.0, final=0.0, warmup=0, begin=0.0):
    if t < warmup:
        return warmed(t, warmup, begin, base)
    if t > max_update:
        return final
    return final + (base - final) * (1 - (t - warmup) / (max_update - warmup)) ** power


def factor_calls(count, factor, stop, base):
    """What `count` calls, one after the other, return."""
    seen = []
    for _ in range(count):
        base = max(stop, base * factor)
        seen.append(base)
    return seen


def multi_factor_calls(count, milestones, factor, base):
    """eta_{t+1} = alpha eta_t whenever t is a milestone."""
    seen = []
    for t in range(count):
        seen.append(base)
        base = base * factor if t in milestones else base
    return seen


N = 45
WITH_WARMUP = {"base_lr": 0.5, "final_lr": 0.01, "warmup_steps": 5, "warmup_begin_lr": 0.1}
BOOK = [
    (ConstantScheduler(0.3), [0.3] * N),
    (SquareRootScheduler(lr=1.0), [(t + 1.0) ** -0.5 for t in range(N)]),
    (SquareRootScheduler(), [0.1 * (t + 1.0) ** -0.5 for t in range(N)]),
    (FactorScheduler(factor=0.9, stop_factor_lr=1e-2, base_lr=2.0), factor_calls(N, 0.9, 1e-2, 2.0)),
    (FactorScheduler(factor=0.5, stop_factor_lr=1e-2, base_lr=2.0), factor_calls(N, 0.5, 1e-2, 2.0)),
    (FactorScheduler(), [0.1] * N),
    (MultiFactorScheduler([15, 30], 0.5, 0.5), multi_factor_calls(N, [15, 30], 0.5, 0.5)),
    (MultiFactorScheduler((1, 2, 40), 0.3, 0.5), multi_factor_calls(N, [1, 2, 40], 0.3, 0.5)),
    (PolyScheduler(20), [polynomial(t, 20) for t in range(N)]),
    (PolyScheduler(20, 0.5, 3, 0.01), [polynomial(t, 20, 0.5, 3, 0.01) for t in range(N)]),
    (PolyScheduler(20, pwr=0.5, **WITH_WARMUP), [polynomial(t, 20, 0.5, 0.5, 0.01, 5, 0.1) for t in range(N)]),
    (PolyScheduler(20, pwr=0.7, **WITH_WARMUP), [polynomial(t, 20, 0.5, 0.7, 0.01, 5, 0.1) for t in range(N)]),
    (LinearScheduler(20), [polynomial(t, 20, power=1) for t in range(N)]),
    (LinearScheduler(20, **WITH_WARMUP), [polynomial(t, 20, 0.5, 1, 0.01, 5, 0.1) for t in range(N)]),
    (CosineScheduler(20), [cosine(t, 20) for t in range(N)]),
    (CosineScheduler(max_update=20, base_lr=0.5, final_lr=0.01), [cosine(t, 20, 0.5, 0.01) for t in range(N)]),
    (CosineScheduler(20, **WITH_WARMUP), [cosine(t, 20, 0.5, 0.01, 5, 0.1) for t in range(N)]),
]
SCHEDULES = [schedule for schedule, _ in BOOK]
# What is done with a schedule is one text for all: a formula, a product that grows, a list, and one with a warm-up.
FEW = SCHEDULES if ALL else [SCHEDULES[k] for k in (1, 3, 7, 16)]
by_schedule = pytest.mark.parametrize("schedule", FEW, ids=str)


@pytest.mark.parametrize(("schedule", "expected"), BOOK, ids=[str(s) for s in SCHEDULES])
def test_the_numbers_are_the_books(schedule, expected):
    """A cosine near its end is a small difference of large numbers, so it is judged beside the largest number."""
    largest = max(expected)
    for t, number in enumerate(expected):
        assert schedule(t) == pytest.approx(number, rel=2e-14, abs=4e-16 * largest), t
    assert schedule(10**12) <= expected[-1]


@by_schedule
def test_a_schedule_can_be_asked_in_any_order(schedule):
    forward = [schedule(t) for t in range(N)]
    assert [schedule(t) for t in reversed(range(N))] == forward[::-1]
    with pytest.raises(ValueError, match="num_update: -1"):
        schedule(-1)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if "max_update" in vars(s)], ids=str)
def test_ends_are_met_exactly(schedule):
    options = vars(schedule)
    begin = options["warmup_begin_lr"] if options["warmup_steps"] else options["base_lr"]
    assert schedule(0) == begin
    assert schedule(options["warmup_steps"]) == options["base_lr"]
    assert schedule(options["max_update"]) == options["final_lr"]


@by_schedule
def test_equality_pickling_and_text(schedule):
    for other in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), eval(repr(schedule))):
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert [other(t) for t in range(N)] == [schedule(t) for t in range(N)]
    assert sum(schedule == other for other in SCHEDULES) == 1
    assert schedule != 3


def test_the_cosine_is_right_to_two_units_in_the_last_place():
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    pi = Decimal("3.14159265358979323846264338327950288419716939937510")
    for i in range(-400, 1200):
        x = i / 399.0
        angle, term, total, k = (Decimal(x) % 2) * pi, Decimal(1), Decimal(0), 0
        while abs(term) > Decimal(10) ** -40:
            total += term
            k += 2
            term = -term * angle * angle / (k * (k - 1))
        assert abs(Decimal(cos_pi(x)) - total) <= 2 * Decimal(math.ulp(float(total))), x
    for x, exact in ((0, 1), (0.5, 0), (1, -1), (1.5, 0), (2, 1), (1e15, 1), (2.0**60, 1), (-0.5, 0)):
        assert cos_pi(x) == exact
    assert all(cos_pi(-x) == cos_pi(x) == cos_pi(x + 2) == -cos_pi(x + 1) for x in (0.0625, 0.25, 0.375, 0.75))


# Warm-up around any schedule.


@each(schedule=FEW, warmup_steps=[0, 1, 7], power=[1.0, 2, 0.5, 1.7])
def test_warm_up_is_hugging_faces(schedule, warmup_steps, power):
    """lr (t / w)^power, then the schedule from its own beginning."""
    warm = WarmUp(schedule, warmup_steps, power)
    for t in range(warmup_steps + 30):
        if t < warmup_steps:
            assert warm(t) == pytest.approx(schedule(0) * (t / warmup_steps) ** power, rel=1e-15, abs=0)
        else:
            assert warm(t) == schedule(t - warmup_steps)
    assert pickle.loads(pickle.dumps(warm)) == warm
    assert eval(repr(warm)) == warm


def quadratic(t):
    return 1.0 - 0.01 * t * t


def test_warm_up_around_functions_and_numbers():
    warm = WarmUp(quadratic, 4)
    assert [warm(t) for t in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 0.99]
    assert [WarmUp(0.5, 2)(t) for t in range(4)] == [0.0, 0.25, 0.5, 0.5]
    assert [WarmUp(quadratic, 2, initial_learning_rate=3.0)(t) for t in range(3)] == [0.0, 1.5, 1.0]
    assert [WarmUp(WarmUp(1.0, 2), 2, initial_learning_rate=1.0)(t) for t in range(6)] == [0, 0.5, 0, 0.5, 1, 1]
    assert pickle.loads(pickle.dumps(warm))(5) == 0.99
    assert WarmUp(quadratic, 4) != WarmUp(math.cos, 4)


def test_warm_up_around_a_warm_up_around_a_function():
    warm = WarmUp(WarmUp(quadratic, 2), 3, initial_learning_rate=0.5)
    assert [warm(t) for t in range(3)] == pytest.approx([0.0, 0.5 / 3, 1.0 / 3])
    assert [warm(t) for t in range(3, 12)] == [0.0, 0.5, *(quadratic(t) for t in range(7))]
    assert WarmUp(WarmUp(quadratic, 0), 0)(4) == quadratic(4)
    assert warm == WarmUp(WarmUp(quadratic, 2), 3, initial_learning_rate=0.5)
    assert warm != WarmUp(WarmUp(math.cos, 2), 3, initial_learning_rate=0.5)
    with pytest.raises(ValueError, match="num_update: -1"):
        warm(-1)


@by_schedule
def test_a_schedule_that_starts_later(schedule):
    """It holds its first learning rate, and then has the bits of the schedule itself; so has its warm-up."""
    for one in (schedule, WarmUp(schedule, 4, 2)):
        late = one.starting_at(6)
        assert [late(t) for t in range(6 + N)] == [one(0)] * 6 + [one(t) for t in range(N)]
        assert [one.starting_at(0)(t) for t in range(N)] == [one(t) for t in range(N)]
        assert pickle.loads(pickle.dumps(late)) == late == one.starting_at(6.0)


@pytest.mark.parametrize(
    ("schedule", "num_update", "error", "match"),
    [
        (WarmUp(1.0, 2), -1, ValueError, "num_update: -1"),
        (WarmUp(1.0, 2), 1.5, ValueError, "num_update: 1.5"),
        (WarmUp(1.0, 2), "1", TypeError, "num_update: '1'"),
        (WarmUp(quadratic, 2), 3, ValueError, "cannot start later"),
        (WarmUp(WarmUp(quadratic, 2), 2), 3, ValueError, "cannot start later"),
    ],
    ids=range(5),
)
def test_what_cannot_start_later(schedule, num_update, error, match):
    with pytest.raises(error, match=match):
        schedule.starting_at(num_update)


def test_the_recipe_of_hugging_faces_tensorflow_helpers():
    """Linear decay from the end of the warm-up to a share of the learning rate, as Keras computes it."""
    init_lr, steps, warmup, ratio = 5e-5, 100, 10, 0.1
    schedule = WarmUp(PolyScheduler(steps - warmup, init_lr, 1, init_lr * ratio), warmup)
    for t in range(130):
        if t < warmup:
            expected = init_lr * t / warmup
        else:
            done = min(t - warmup, steps - warmup) / (steps - warmup)
            expected = (init_lr - init_lr * ratio) * (1 - done) + init_lr * ratio
        assert schedule(t) == pytest.approx(expected, rel=1e-14)


BAD = [
    (lambda: CosineScheduler(0), ValueError, "max_update: 0 .*1 or larger"),
    (lambda: CosineScheduler(2.5), ValueError, "max_update: 2.5"),
    (lambda: CosineScheduler("9"), TypeError, "max_update: '9' is a str"),
    (lambda: CosineScheduler(5, warmup_steps=5), ValueError, "larger than warmup_steps, 5"),
    (lambda: CosineScheduler(5, warmup_steps=-1), ValueError, "warmup_steps: -1"),
    (lambda: CosineScheduler(5, 0.1, warmup_steps=1, warmup_begin_lr=0.2), ValueError, "no more than base_lr, 0.1"),
    (lambda: CosineScheduler(5, base_lr=-0.1), ValueError, "base_lr: -0.1"),
    (lambda: LinearScheduler(5, base_lr=float("nan")), ValueError, "base_lr: nan"),
    (lambda: LinearScheduler(5, final_lr=float("inf")), ValueError, "final_lr: inf"),
    (lambda: PolyScheduler(5, pwr=0), ValueError, "pwr: 0"),
    (lambda: PolyScheduler(5, pwr="1"), TypeError, "pwr: '1'"),
    (lambda: SquareRootScheduler(None), TypeError, "lr: None"),
    (lambda: ConstantScheduler([1]), TypeError, "base_lr"),
    (lambda: FactorScheduler(1.1), ValueError, "factor: 1.1 .*no more than 1"),
    (lambda: FactorScheduler(0), ValueError, "factor: 0"),
    (lambda: FactorScheduler(0.5, -1), ValueError, "stop_factor_lr: -1"),
    (lambda: MultiFactorScheduler([]), ValueError, "increasing list"),
    (lambda: MultiFactorScheduler([5, 5]), ValueError, "increasing list"),
    (lambda: MultiFactorScheduler([0]), ValueError, "step at index 0: 0"),
    (lambda: MultiFactorScheduler(5), TypeError, "list of integers"),
    (lambda: MultiFactorScheduler([5], 2), ValueError, "factor: 2"),
    (lambda: WarmUp("linear", 5), TypeError, "neither a schedule"),
    (lambda: WarmUp(-1.0, 5), ValueError, "learning rate: -1.0"),
    (lambda: WarmUp(0.1, -5), ValueError, "warmup_steps: -5"),
    (lambda: WarmUp(0.1, 5, power=-1), ValueError, "power: -1"),
    (lambda: WarmUp(0.1, 5, initial_learning_rate=-1), ValueError, "initial_learning_rate: -1"),
    (lambda: ScheduleLR("sgd", ConstantScheduler()), TypeError, "str is not an Optimizer"),
    (lambda: ScheduleLR(optimizer(2), [ConstantScheduler()]), ValueError, "Expected 2 schedules"),
    (lambda: ScheduleLR(optimizer(), 0.1), TypeError, "should be a function"),
]


# Each argument's each message.
FEW_BAD = one_of_each(BAD, lambda call, error, match: (error, match.split(":")[0]))


@pytest.mark.parametrize(("call", "error", "match"), FEW_BAD, ids=[match for _, _, match in FEW_BAD])
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


# As torch schedulers.


def optimizer(groups=1, make=torch.optim.SGD, lr=0.7):
    return make([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(groups)], lr=lr)


def walk(scheduler, count):
    seen = []
    for _ in range(count):
        seen.append([float(lr) for lr in scheduler.get_last_lr()])
        assert seen[-1] == [float(group["lr"]) for group in scheduler.optimizer.param_groups]
        scheduler.optimizer.step()
        scheduler.step()
    return seen


@by_schedule
def test_a_scheduler_sets_the_learning_rate_of_all_groups(schedule):
    assert walk(ScheduleLR(optimizer(2), schedule), N) == [[schedule(t)] * 2 for t in range(N)]


def test_a_schedule_for_each_group_and_factors_of_the_groups_own_rates():
    first, second = CosineScheduler(9, 1.0), WarmUp(quadratic, 3)
    assert walk(ScheduleLR(optimizer(2), [first, second]), 15) == [[first(t), second(t)] for t in range(15)]
    made = optimizer(2)
    made.param_groups[1]["lr"] = 0.1
    assert walk(lr_scheduler.LambdaLR(made, first), 15) == [[0.7 * first(t), 0.1 * first(t)] for t in range(15)]


@each(schedule=FEW, make=[torch.optim.SGD, fusedstep.AdamW])
def test_resuming_pickling_copying(schedule, make, tmp_path):
    whole = [[schedule(t)] for t in range(30)]
    first = ScheduleLR(optimizer(make=make), schedule)
    assert walk(first, 8) == whole[:8]
    torch.save((first.optimizer.state_dict(), first.state_dict()), tmp_path / "saved")
    states = torch.load(tmp_path / "saved", weights_only=True)
    second = ScheduleLR(optimizer(make=make), schedule)
    second.optimizer.load_state_dict(states[0])
    second.load_state_dict(states[1])
    third = optimizer(make=make)
    third.param_groups[0]["initial_lr"] = 0.7
    resumed = ScheduleLR(third, schedule, last_epoch=7)
    for scheduler in (second, resumed, pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):
        assert walk(scheduler, 20) == whole[8:28]


@by_schedule
def test_a_tensor_lr_that_groups_share(schedule):
    lr = torch.tensor(0.7, dtype=torch.float64)
    scheduler = ScheduleLR(optimizer(2, lr=lr), schedule)
    assert walk(scheduler, 20) == [[schedule(t)] * 2 for t in range(20)]
    assert scheduler.optimizer.param_groups[0]["lr"] is lr


def test_in_sequence_and_chained():
    first, second = ConstantScheduler(0.2), CosineScheduler(6, 0.5)
    made = optimizer()
    sequence = lr_scheduler.SequentialLR(made, [ScheduleLR(made, first), ScheduleLR(made, second)], [4])
    assert walk(sequence, 12) == [[0.2]] * 4 + [[second(t)] for t in range(8)]
    made = optimizer()
    chain = lr_scheduler.ChainedScheduler([ScheduleLR(made, first), ScheduleLR(made, second)], made)
    assert walk(chain, 12) == [[second(t)] for t in range(12)]
