"""Hugging Face's schedulers, against transformers: every number, error and signature."""

import copy
import inspect
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from kinds import ALL, each, few
from torch.optim import lr_scheduler

import fusedstep
from fusedstep import schedules

transformers = pytest.importorskip("transformers")
from transformers import optimization as theirs  # noqa: E402

LR = 3e-4
STEPS = [(0, 10), (1, 10), (3, 10), (7, 40), (10, 10), (0, 1)]
WSD = {"num_decay_steps": 6}

# Scheduler, further arguments; each with every pair of warm-up and training steps.
VARIANTS = [
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 2}),
    ("cosine", {"num_cycles": 1.3}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("polynomial", {"lr_end": 0.0, "power": 0.7}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 5}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.0, "num_cycles": 0.7}),
    *[
        ("warmup_stable_decay", {"num_decay_steps": 4, "warmup_type": w, "decay_type": d, "min_lr_ratio": 0.1})
        for w in ("linear", "cosine", "1-sqrt")
        for d in ("linear", "cosine", "1-sqrt")
    ],
    ("warmup_stable_decay", {"num_decay_steps": 5, "num_cycles": 1.5}),
]


def ident(variant):
    name, options = variant
    return "-".join([name, *(f"{k}={v}" for k, v in options.items())])


# What is done with a scheduler is one text for all: one is constant, one ends, one begins anew, and the warm-up of one
# does not begin at zero.
KINDS = few(
    {ident(variant): variant for variant in VARIANTS},
    "constant",
    "linear",
    "cosine_with_restarts-num_cycles=3",
    "cosine_warmup_with_min_lr-min_lr_rate=0.1-warmup_lr_rate=0.2",
)
by_scheduler = pytest.mark.parametrize("variant", KINDS.values(), ids=KINDS)


def optimizer(lr=LR, scales=(1.0,), make=torch.optim.SGD, **options):
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": lr * scale} for scale in scales]
    return make(groups, lr=lr, **options)


def shared(lr, groups=2):
    """An optimizer whose groups share one tensor as their learning rate."""
    made = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(groups)], lr=lr)
    assert all(group["lr"] is lr for group in made.param_groups)
    return made


def lrs(scheduler):
    return [float(lr) for lr in scheduler.get_last_lr()]


def advance(scheduler, *args):
    """Both steps, in torch's order."""
    scheduler.optimizer.step()
    scheduler.step(*args)


def walk(scheduler, count):
    seen = [lrs(scheduler)]
    for _ in range(count):
        advance(scheduler)
        assert lrs(scheduler) == [float(group["lr"]) for group in scheduler.optimizer.param_groups]
        seen.append(lrs(scheduler))
    return seen


@pytest.mark.parametrize("variant", VARIANTS, ids=ident)
def test_every_number_is_that_of_transformers(variant):
    """Twice as far as the last step, of schedulers and of the same curves from pieces."""
    for warmup, total in STEPS:
        check_numbers(variant, warmup, total)
    for warmup, total in (*STEPS, (10, 3)):
        check_curve(variant, warmup, total)


def check_numbers(variant, warmup, total):
    """Several groups with learning rates of their own."""
    name, options = variant
    results = []
    for module, name_type in ((schedules, schedules.SchedulerType), (theirs, theirs.SchedulerType)):
        scheduler = module.get_scheduler(
            name_type(name), optimizer(scales=(1.0, 0.1, 7.0)), warmup, total, scheduler_specific_kwargs=options
        )
        assert isinstance(scheduler, lr_scheduler.LambdaLR)
        try:
            results.append(walk(scheduler, 2 * total + 5))
        except (ZeroDivisionError, ValueError) as error:  # a schedule without steps for its decay
            results.append((type(error), str(error)))
    assert results[0] == results[1]


def check_curve(variant, warmup, total):
    """Judged beside the largest number; the original's cosine sees pi times many turns, rounded."""
    name, options = variant
    try:
        expected = walk(theirs.get_scheduler(name, optimizer(), warmup, total, options), 2 * total + 5)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="must not be num_warmup_steps"):
            schedules.get_schedule(name, LR, warmup, total, options)
        return
    schedule = schedules.get_schedule(theirs.SchedulerType(name), LR, warmup, total, options)
    for t, (lr,) in enumerate(expected):
        assert schedule(t) == pytest.approx(lr, rel=1e-14, abs=1e-14 * LR), t
    assert eval(repr(schedule), {"Schedule": schedules.Schedule}) == schedule == pickle.loads(pickle.dumps(schedule))


def test_signatures_are_those_of_transformers():
    """Same names, order and defaults; what is added is keyword-only."""
    for name in (function for function in dir(theirs) if function.startswith("get_")):
        mine = inspect.signature(getattr(schedules, name)).parameters
        expected = inspect.signature(getattr(theirs, name)).parameters
        assert [(p.name, p.kind, p.default) for p in expected.values()] == [
            (p.name, p.kind, p.default) for p in mine.values() if p.name in expected
        ], name
        assert all(p.kind == p.KEYWORD_ONLY for p in mine.values() if p.name not in expected), name


def test_types_and_functions_are_those_of_transformers():
    assert {t.name: t.value for t in schedules.SchedulerType} == {t.name: t.value for t in theirs.SchedulerType}
    mine = {t.value: f.__name__ for t, f in schedules.TYPE_TO_SCHEDULER_FUNCTION.items()}
    assert mine == {t.value: f.__name__ for t, f in theirs.TYPE_TO_SCHEDULER_FUNCTION.items()}
    assert schedules.get_scheduler(theirs.SchedulerType.LINEAR, optimizer(), 1, 5).get_last_lr() == [0.0]


ERRORS = [
    lambda m: m.get_scheduler("nope", optimizer()),
    lambda m: m.get_scheduler("cosine", optimizer()),
    lambda m: m.get_scheduler("cosine", optimizer(), 3),
    lambda m: m.get_scheduler("constant_with_warmup", optimizer()),
    lambda m: m.get_scheduler("linear", optimizer(), 3, 9, {"lr_end": 0}),
    lambda m: m.get_scheduler("inverse_sqrt", optimizer(), 3, 9, {"nope": 0}),
    lambda m: m.get_scheduler("warmup_stable_decay", optimizer(), 3, 9),
    lambda m: m.get_scheduler("warmup_stable_decay", optimizer(), 3, None, WSD),
    lambda m: m.get_scheduler("warmup_stable_decay", optimizer(), 3, 9, {**WSD, "decay_type": "nope"}),
    lambda m: m.get_scheduler("warmup_stable_decay", optimizer(), 3, 9, {**WSD, "warmup_type": "nope"}),
    lambda m: m.get_scheduler("polynomial", optimizer(), 3, 9, {"lr_end": 1.0}),
    lambda m: m.get_scheduler("polynomial", optimizer(), 3, 9, {"lr_end": LR}),
    lambda m: m.get_scheduler("cosine_with_min_lr", optimizer(), 3, 9),
    lambda m: m.get_scheduler("cosine_with_min_lr", optimizer(), 3, 9, {"min_lr": 0, "min_lr_rate": 0}),
    lambda m: m.get_scheduler("cosine_warmup_with_min_lr", optimizer(), 3, 9),
    lambda m: m.get_scheduler("cosine_warmup_with_min_lr", optimizer(), 3, 9, {"min_lr": 0, "min_lr_rate": 0}),
    lambda m: m.get_scheduler("reduce_lr_on_plateau", optimizer(), scheduler_specific_kwargs={"factor": 1.0}),
    lambda m: m.get_scheduler("greedy", optimizer(), scheduler_specific_kwargs={"factor": 1.0}),
    lambda m: m.get_greedy_schedule("no optimizer"),
    lambda m: m.get_greedy_schedule(optimizer(), mode="nope"),
    lambda m: m.get_greedy_schedule(optimizer(), threshold_mode="nope"),
    lambda m: m.get_greedy_schedule(optimizer(), min_lr=[0.0, 0.0]),
    lambda m: m.get_greedy_schedule(optimizer(), max_lr=[1.0, 1.0]),
    lambda m: m.get_reduce_on_plateau_schedule("no optimizer"),
    lambda m: m.get_constant_schedule(optimizer(), last_epoch=3),
]


@pytest.mark.parametrize("call", ERRORS)
def test_errors_are_those_of_transformers(call):
    with pytest.raises(Exception) as expected:  # noqa: PT011 - of whatever type
        call(theirs)
    with pytest.raises(expected.type) as mine:
        call(schedules)
    assert str(mine.value) == str(expected.value)
    assert mine.type is expected.type


def test_two_lengths_of_the_stable_phase_are_warned_of():
    for module in (theirs, schedules):
        with pytest.warns(UserWarning, match="num_stable_steps will be used"):
            scheduler = module.get_wsd_schedule(optimizer(), 2, 3, num_training_steps=100, num_stable_steps=4)
        assert walk(scheduler, 12)[-1] == [0.0]


def test_an_optimizer_of_optimizers_is_refused():
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    with pytest.raises(ValueError, match="a scheduler for each"):
        schedules.get_scheduler("linear", LayerWiseDummyOptimizer({}), 1, 5)


CLAMPED = [
    (schedules.get_cosine_schedule_with_warmup, {}, 10),
    (schedules.get_cosine_schedule_with_warmup, {"num_cycles": 0.75}, 10),
    (schedules.get_cosine_with_min_lr_schedule_with_warmup, {"min_lr_rate": 0.1}, 10),
    (schedules.get_cosine_with_min_lr_schedule_with_warmup_lr_rate, {"min_lr_rate": 0.1}, 9),
]


@pytest.mark.parametrize(("make", "options", "last"), CLAMPED)
def test_clamp_holds_the_last_value(make, options, last):
    plain = walk(make(optimizer(), 3, 10, **options), 20)
    clamped = walk(make(optimizer(), 3, 10, clamp=True, **options), 20)
    assert clamped[: last + 1] == plain[: last + 1]
    assert all(lr == plain[last] for lr in clamped[last:])
    assert plain[15] != plain[last]
    if "num_cycles" not in options:
        assert min(clamped[3:]) == clamped[last]


def test_clamp_by_name():
    scheduler = schedules.get_scheduler("cosine", optimizer(), 3, 10, {"clamp": True})
    assert walk(scheduler, 15)[-1] == [0.0]


# The same curves from pieces.


@each(clamped=dict(zip("abcd", CLAMPED, strict=True)), warmup=[0, 3, 10, 15])
def test_clamped_curves_are_those_of_the_schedulers(clamped, warmup):
    make, options, _ = clamped
    name = next(t for t, f in schedules.TYPE_TO_SCHEDULER_FUNCTION.items() if f is make)
    expected = walk(make(optimizer(), warmup, 10, clamp=True, **options), 25)
    schedule = schedules.get_schedule(name, LR, warmup, 10, {**options, "clamp": True})
    assert [schedule(t) for t in range(26)] == pytest.approx([lr for (lr,) in expected], rel=1e-14, abs=1e-15 * LR)


def test_a_stable_phase_of_its_own_length():
    for total in (None, 40):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"num_decay_steps": 4, "num_stable_steps": 3}
            expected = walk(theirs.get_scheduler("warmup_stable_decay", optimizer(), 5, total, options), 20)
            schedule = schedules.get_schedule("warmup_stable_decay", LR, 5, total, options)
        assert [schedule(t) for t in range(21)] == pytest.approx([lr for (lr,) in expected], rel=1e-14, abs=1e-15 * LR)


CURVE_ERRORS = [
    (("nope", LR), ValueError, "select one of"),
    (("greedy", LR), ValueError, "depends on a metric"),
    (("reduce_lr_on_plateau", LR), ValueError, "depends on a metric"),
    (("linear", -1.0, 1, 5), ValueError, "learning rate: -1.0"),
    (("linear", LR), ValueError, "requires `num_warmup_steps`"),
    (("linear", LR, 1), ValueError, "requires `num_training_steps`"),
    (("linear", LR, -1, 5), ValueError, "num_warmup_steps: -1"),
    (("linear", LR, 1, 5, {"nope": 1}), TypeError, "nope"),
    (("polynomial", LR, 1, 5, {"lr_end": 1.0}), ValueError, "smaller than initial lr"),
    (("inverse_sqrt", LR, 1, 5, {"timescale": 0}), ValueError, "timescale: 0"),
    (("cosine_with_min_lr", LR, 1, 5), ValueError, "One of min_lr"),
    (("cosine_with_min_lr", LR, 1, 5, {"min_lr_rate": -1}), ValueError, "min_lr: -"),
    (("warmup_stable_decay", LR, 1, None, {"num_decay_steps": 2}), ValueError, "must be specified"),
    (("warmup_stable_decay", LR, 1, 5, {"num_decay_steps": 2, "decay_type": "x"}), ValueError, "Unknown decay type"),
]


@pytest.mark.parametrize(("args", "error", "match"), CURVE_ERRORS, ids=str)
def test_errors_of_curves(args, error, match):
    with pytest.raises(error, match=match):
        schedules.get_schedule(*args)


# State, resuming.


@each(variant=KINDS, make=[torch.optim.SGD, fusedstep.SGD, fusedstep.AdamW])
def test_resuming_goes_on_with_the_same_numbers(variant, make, tmp_path):
    name, options = variant

    def new():
        made = optimizer(scales=(1.0, 0.5), make=make)
        return made, schedules.get_scheduler(name, made, 4, 12, options)

    whole = walk(new()[1], 20)
    first, scheduler = new()
    assert walk(scheduler, 6) == whole[:7]
    torch.save((first.state_dict(), scheduler.state_dict()), tmp_path / "saved")
    states = torch.load(tmp_path / "saved", weights_only=True)
    second, scheduler = new()
    second.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert walk(scheduler, 14) == whole[6:]


@by_scheduler
def test_states_go_to_transformers_and_back(variant):
    name, options = variant
    whole = walk(theirs.get_scheduler(name, optimizer(), 4, 12, options), 20)
    for source, target in ((schedules, theirs), (theirs, schedules)):
        first = source.get_scheduler(name, optimizer(), 4, 12, options)
        walk(first, 6)
        second = target.get_scheduler(name, optimizer(), 4, 12, options)
        assert first.state_dict().keys() == second.state_dict().keys()
        second.load_state_dict(first.state_dict())
        assert walk(second, 14)[1:] == whole[7:]


def test_resuming_by_last_epoch():
    whole = walk(schedules.get_linear_schedule_with_warmup(optimizer(), 3, 10), 12)
    made = optimizer()
    made.param_groups[0]["initial_lr"] = LR
    assert walk(schedules.get_linear_schedule_with_warmup(made, 3, 10, last_epoch=4), 7) == whole[5:]


@by_scheduler
def test_pickling_and_copying(variant):
    name, options = variant
    scheduler = schedules.get_scheduler(name, optimizer(), 4, 12, options)
    walk(scheduler, 5)
    others = pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler)
    expected = walk(scheduler, 10)
    for other in others:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch does not see that the copy's optimizer has stepped
            assert walk(other, 10) == expected


# Tensors.


@each(variant=KINDS, dtype=[torch.float32, torch.float64])
def test_a_tensor_lr_is_written_in_place(variant, dtype):
    name, options = variant
    expected = walk(schedules.get_scheduler(name, optimizer(), 3, 10, options), 20)
    lr = torch.tensor(LR, dtype=dtype)
    made = shared(lr, 1)
    seen = walk(schedules.get_scheduler(name, made, 3, 10, options), 20)
    assert made.param_groups[0]["lr"] is lr
    close = {"rtol": 1e-6 if dtype == torch.float32 else 1e-15, "atol": 1e-12 if dtype == torch.float32 else 0}
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), **close)


@by_scheduler
def test_a_tensor_lr_that_groups_share_is_not_compounded(variant):
    name, options = variant
    lr = torch.tensor(LR, dtype=torch.float64)
    expected = walk(schedules.get_scheduler(name, optimizer(), 3, 10, options), 20)
    made = shared(lr)
    seen = walk(schedules.get_scheduler(name, made, 3, 10, options), 20)
    assert made.param_groups[0]["lr"] is lr
    assert made.param_groups[1]["lr"] is not lr
    for (first, second), (number,) in zip(seen, expected, strict=True):
        assert first == second == pytest.approx(number, rel=1e-14, abs=0)


@pytest.mark.parametrize("make", [schedules.get_reduce_on_plateau_schedule, schedules.get_greedy_schedule])
def test_a_tensor_lr_that_groups_share_is_reduced_once(make):
    options = {"factor": 0.5, "patience": 1, "min_lr": 0.0}
    lr = torch.tensor(0.5, dtype=torch.float64)
    scheduler, expected = make(shared(lr), **options), make(optimizer(0.5), **options)
    for _ in range(9):
        scheduler.step(1.0)
        expected.step(1.0)
        assert lrs(scheduler) == lrs(expected) * 2
    assert scheduler.optimizer.param_groups[0]["lr"] is lr
    assert lr.item() < 0.1


def test_the_last_lrs_are_copies():
    made = shared(torch.tensor(LR, dtype=torch.float64))
    for scheduler in (schedules.get_greedy_schedule(made), schedules.get_linear_schedule_with_warmup(made, 2, 4)):
        before = float(made.param_groups[0]["lr"])
        scheduler.get_last_lr()[0].fill_(7.0)
        assert made.param_groups[0]["lr"] == before


# In torch's combinations.


@pytest.mark.parametrize("make", [torch.optim.SGD, fusedstep.AdamW], ids=lambda c: c.__module__)
def test_a_tensor_lr_in_sequence_is_a_number_in_sequence(make):
    """The second scheduler, and a group that joins, find the constructor's learning rate, not what the first wrote."""
    results = []
    for lr in (LR, torch.tensor(LR, dtype=torch.float64)):
        made = make([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)], lr=lr)
        warmup = schedules.get_scheduler("constant_with_warmup", made, 3)
        decay = schedules.get_scheduler("polynomial", made, 0, 10)
        scheduler = lr_scheduler.SequentialLR(made, [warmup, decay], [4])
        results.append(walk(scheduler, 12))
        made.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        assert float(made.param_groups[2]["lr"]) == LR
    assert results[0] == [pytest.approx(rates, rel=1e-12) for rates in results[1]]
    assert made.param_groups[0]["lr"] is lr


def test_in_sequence():
    """Half of it transformers' own numbers."""

    def both(module):
        made = optimizer()
        parts = [
            module.get_constant_schedule_with_warmup(made, 3),
            module.get_cosine_schedule_with_warmup(made, 0, 6),
        ]
        return lr_scheduler.SequentialLR(made, parts, [5])

    assert walk(both(schedules), 15) == walk(both(theirs), 15)


def test_chained():
    def both(module):
        made = optimizer()
        parts = [module.get_linear_schedule_with_warmup(made, 3, 12), lr_scheduler.ExponentialLR(made, 0.9)]
        return lr_scheduler.ChainedScheduler(parts, made)

    assert walk(both(schedules), 15) == walk(both(theirs), 15)


# Driven by a metric.

METRICS = [
    *[1.0 / (i + 1) for i in range(30)],
    *[0.5 + 0.01 * (i % 3) for i in range(40)],
    *[0.4 - 0.004 * i for i in range(30)],
    *[0.7] * 40,
]
PLATEAU = [{}, {"patience": 1, "factor": 0.7, "cooldown": 2}, {"mode": "max", "patience": 0, "min_lr": 1e-3, "eps": 0}]
GREEDY = [
    {},
    {"patience": 1, "factor": 0.8, "min_lr": 1e-5, "max_lr": 1.0},
    {"patience": 1, "factor": 0.8, "min_lr": 1e-3, "reset_start": 3, "warmup": 2, "cooldown": 3},
    {"patience": 2, "min_lr": [1e-3, 1e-4], "max_lr": [0.3, 0.2], "threshold_mode": "rel", "threshold": 0.01},
    {"patience": 1, "mode": "max", "smooth": True, "window_size": 5, "min_lr": 1e-3, "reset_start": 2},
    {"patience": 1, "mode": "max", "threshold_mode": "rel", "min_lr": 1.0, "max_lr": 0.0},
]
DRIVEN = [("reduce_lr_on_plateau", o) for o in PLATEAU] + [("greedy", o) for o in GREEDY]
by_driven = pytest.mark.parametrize(("name", "options"), DRIVEN, ids=str)


def driven(module, name, options, metrics, scheduler=None):
    scheduler = scheduler or module.get_scheduler(
        name, optimizer(0.1, (1.0, 0.5)), scheduler_specific_kwargs=copy.deepcopy(options)
    )
    seen = []
    for metric in metrics:
        scheduler.step(torch.tensor(metric) if module is schedules else float(torch.tensor(metric)))
        seen.append((lrs(scheduler), [group["lr"] for group in scheduler.optimizer.param_groups]))
    return scheduler, seen


@by_driven
def test_driven_schedules_have_the_numbers_of_transformers(name, options):
    mine, seen = driven(schedules, name, options, METRICS)
    expected, numbers = driven(theirs, name, options, METRICS)
    assert seen == numbers
    assert isinstance(mine, lr_scheduler.LRScheduler)
    drop = "_is_initial", "_get_lr_called_within_step"
    states = [{k: v for k, v in s.state_dict().items() if k not in drop} for s in (mine, expected)]
    assert states[0] == states[1]
    if name == "greedy" and len(options) > 1 and options["min_lr"] != 1.0:
        assert len({lr for (lr, _), _ in numbers}) > 5


@each(driven_by=DRIVEN if ALL else [DRIVEN[1], DRIVEN[5], DRIVEN[7]], at=[1, 25, 61])
def test_driven_schedules_resume_from_their_state_alone(driven_by, at, tmp_path):
    """On an optimizer whose learning rates are those of the beginning."""
    name, options = driven_by
    _, whole = driven(schedules, name, options, METRICS)
    first, _ = driven(schedules, name, options, METRICS[:at])
    torch.save(first.state_dict(), tmp_path / "saved")
    state = torch.load(tmp_path / "saved", weights_only=True)
    second, _ = driven(schedules, name, options, [])
    second.load_state_dict(state)
    assert driven(schedules, name, options, METRICS[at:], second)[1] == whole[at:]
    third = pickle.loads(pickle.dumps(first))
    assert driven(schedules, name, options, METRICS[at:], third)[1] == whole[at:]


@pytest.mark.parametrize(("name", "options"), DRIVEN if ALL else DRIVEN[2:4], ids=str)
def test_driven_states_go_to_transformers_and_back(name, options):
    _, whole = driven(theirs, name, options, METRICS)
    for source, target in ((schedules, theirs), (theirs, schedules)):
        first, _ = driven(source, name, options, METRICS[:33])
        second, _ = driven(target, name, options, [])
        second.load_state_dict(first.state_dict())
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        assert driven(target, name, options, METRICS[33:], second)[1] == whole[33:]


def test_a_greedy_schedule_says_what_it_does(capsys):
    options = {"patience": 1, "factor": 0.5, "min_lr": 0.02, "reset_start": 2, "verbose": True}
    texts = []
    for module in (schedules, theirs):
        driven(module, "greedy", options, METRICS)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "reset" in texts[0]


def test_a_greedy_schedule_keeps_a_tensor_lr_and_its_numbers():
    options = {"patience": 1, "factor": 0.8, "min_lr": 1e-3, "reset_start": 3}
    for dtype, rel in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        lr = torch.tensor(0.1, dtype=dtype)
        scheduler = schedules.get_greedy_schedule(shared(lr, 1), **options)
        expected = theirs.get_greedy_schedule(optimizer(0.1), **options)
        for metric in METRICS:
            scheduler.step(metric)
            expected.step(metric)
            assert float(lr) == pytest.approx(expected.get_last_lr()[0], rel=rel)
        assert scheduler.optimizer.param_groups[0]["lr"] is lr


def test_infinities_and_nan_as_metrics():
    metrics = [1.0, math.nan, math.inf, -math.inf, math.nan, 0.0, 0.0, math.nan] * 4
    for name in ("greedy", "reduce_lr_on_plateau"):
        options = {"patience": 1, "factor": 0.5, "min_lr": 1e-5}
        assert driven(schedules, name, options, metrics)[1] == driven(theirs, name, options, metrics)[1]


# Inside training.


@by_scheduler
def test_training_is_that_of_torch_and_transformers(variant, backend):
    name, options = variant
    params = [torch.nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2)]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    mine = fusedstep.AdamW(params, lr=0.01, backend=backend)
    expected = torch.optim.AdamW(copies, lr=0.01)
    pairs = (
        (mine, schedules.get_scheduler(name, mine, 3, 8, options)),
        (expected, theirs.get_scheduler(name, expected, 3, 8, options)),
    )
    for _ in range(12):
        for a, b in zip(params, copies, strict=True):
            a.grad = torch.randn(5, dtype=torch.float64)
            b.grad = a.grad.clone()
        for made, scheduler in pairs:
            made.step()
            scheduler.step()
    torch.testing.assert_close(params, copies, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "relative_step": False, "warmup_init": False}], ids=str)
def test_the_learning_rates_of_adafactor_are_those_that_transformers_shows(options, tmp_path):
    """Before the first gradient and in training; there the scheduler can be saved and pickled."""
    results = []
    for module in (schedules, theirs):
        params = [torch.nn.Parameter(torch.full((4, 3), float(i + 1))) for i in range(2)]
        made = theirs.Adafactor([{"params": [param]} for param in params], **options)
        scheduler = module.get_adafactor_schedule(made, 0.25)
        seen = [lrs(scheduler)]
        for step in range(5):
            for param in params:
                param.grad = param.detach() * (step - 2.5)
            advance(scheduler)
            seen.append(lrs(scheduler))
            if step == 2 and module is schedules:
                torch.save(scheduler.state_dict(), tmp_path / "saved")
                other = pickle.loads(pickle.dumps(scheduler))
                other.load_state_dict(torch.load(tmp_path / "saved", weights_only=True))
                assert lrs(other) == seen[-1]
        results.append((seen, [param.tolist() for param in params], list(made.param_groups[0])))
    assert results[0] == results[1]


def test_transformers_is_not_needed():
    code = (
        "import sys; sys.modules['transformers'] = None; import fusedstep.schedules as s; print(s.SchedulerType.GREEDY)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "SchedulerType.GREEDY\n"), ran.stderr
