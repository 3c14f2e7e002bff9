"""Parameter groups that join or go while a scheduler runs: it goes on, or raises before any group has changed."""

import pytest
import torch
from kinds import each, few
from torch.optim import lr_scheduler

import fusedstep
from fusedstep import schedules
from fusedstep.schedules import GreedyLR, ReduceLROnPlateau, ScheduleLR


def group(lr=0.1):
    return {"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr}


def optimizer(*lrs, tensor=False):
    return torch.optim.SGD([group(torch.tensor(lr) if tensor else lr) for lr in lrs], lr=0.1)


def rates(made):
    return [float(each["lr"]) for each in made.param_groups]


def hugging_face(name, **options):
    return lambda made: schedules.get_scheduler(name, made, 3, 12, scheduler_specific_kwargs=options)


# With a metric that never improves, each of these changes the learning rates within a few calls.
MAKERS = {
    "greedy": lambda made: GreedyLR(made, patience=1),
    "plateau": lambda made: ReduceLROnPlateau(made, patience=1),
    "schedule": lambda made: ScheduleLR(made, schedules.CosineScheduler(max_update=12, base_lr=0.1)),
    "function": lambda made: ScheduleLR(made, lambda n: 0.1 / (n + 1)),
    "linear": hugging_face("linear"),
    "cosine": hugging_face("cosine"),
    "constant": hugging_face("constant_with_warmup"),
    "inverse_sqrt": hugging_face("inverse_sqrt"),
    "wsd": hugging_face("warmup_stable_decay", num_decay_steps=4),
    "min_lr": hugging_face("cosine_with_min_lr", min_lr=1e-3),
}
# Hugging Face's are all one factor of the groups' own learning rates.
FEW = few(MAKERS, "greedy", "plateau", "schedule", "cosine")
ignore_order = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step:UserWarning")


def step(scheduler, times=1):
    for _ in range(times):
        scheduler.step(1.0) if isinstance(scheduler, (GreedyLR, lr_scheduler.ReduceLROnPlateau)) else scheduler.step()


@ignore_order
@each(make=FEW, tensor=[False, True], when=[0, 4])
def test_a_group_that_joins_is_scheduled_and_the_others_as_without_it(make, tensor, when):
    """One that joins at the beginning with the learning rate of the first has that of the first ever after."""
    mine, alone = optimizer(0.1, tensor=tensor), optimizer(0.1, tensor=tensor)
    ours, other = make(mine), make(alone)
    step(ours, when)
    step(other, when)
    mine.add_param_group({**group(), "lr": mine.param_groups[0]["lr"]})
    if tensor:
        mine.param_groups[1]["lr"] = mine.param_groups[1]["lr"].clone()
    if when == 0 and "initial_lr" in mine.param_groups[0]:
        mine.param_groups[1]["initial_lr"] = 0.1  # a warm-up has set the first group's to 0 already
    for _ in range(9):
        step(ours)
        step(other)
        assert len(rates(mine)) == len(ours.get_last_lr()) == 2
        assert rates(mine)[:1] == rates(alone)
        assert list(map(float, ours.get_last_lr())) == rates(mine)
        assert tensor == isinstance(mine.param_groups[1]["lr"], torch.Tensor)
        if when == 0:
            assert rates(mine)[1] == pytest.approx(rates(mine)[0], rel=1e-6)


def test_greedy_has_the_plateaus_numbers():
    mine = optimizer(0.1)
    scheduler = GreedyLR(mine, patience=1)
    mine.add_param_group(group())
    step(scheduler, 9)
    assert rates(mine) == pytest.approx([0.1 * 0.95**4] * 2)
    assert rates(mine)[0] == pytest.approx(0.0814506, abs=1e-7)


@ignore_order
@each(make=FEW, gone=[0, 1])
def test_a_group_that_goes_leaves_the_others_as_they_were(make, gone):
    lrs = [0.1, 0.03]
    mine, alone = optimizer(*lrs), optimizer(lrs[1 - gone])
    ours, other = make(mine), make(alone)
    step(ours, 3)
    step(other, 3)
    del mine.param_groups[gone]
    for _ in range(9):
        step(ours)
        step(other)
        assert rates(mine) == rates(alone)


@ignore_order
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda made: GreedyLR(made, patience=1, min_lr=[1e-3]), IndexError, "1 min_lrs but 2 parameter groups"),
        (lambda made: GreedyLR(made, patience=1, max_lr=[1.0]), IndexError, "1 max_lrs but 2 parameter groups"),
        (lambda made: ReduceLROnPlateau(made, patience=1, min_lr=[1e-3]), RuntimeError, "number of param groups"),
        (lambda made: ScheduleLR(made, [lambda n: 0.1 / (n + 1)]), ValueError, "Expected 2 schedules.*but got 1"),
    ],
    ids=["greedy-min", "greedy-max", "plateau", "schedules"],
)
def test_a_list_that_is_too_short_raises_before_any_group_has_changed(make, error, words):
    mine = optimizer(0.1)
    scheduler = make(mine)
    step(scheduler)
    before = rates(mine)
    mine.add_param_group(group())
    with pytest.raises(error, match=words):
        step(scheduler, 9)
    assert rates(mine) == [*before, 0.1]
    del mine.param_groups[1]
    step(scheduler, 9)
    assert rates(mine) != before


def test_a_state_of_another_number_of_groups_changes_no_plateau():
    saved = ReduceLROnPlateau(optimizer(0.5, 0.5)).state_dict()
    mine = optimizer(0.1, 0.2, 0.3)
    scheduler = ReduceLROnPlateau(mine)
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match="it has 2 learning rates, but the optimizer 3 groups"):
        scheduler.load_state_dict(saved)
    assert rates(mine) == [0.1, 0.2, 0.3]
    assert scheduler.state_dict() == before


def test_greedy_begins_anew_with_the_learning_rate_that_a_group_joined_with():
    mine = optimizer(0.1)
    scheduler = GreedyLR(mine, patience=0, min_lr=0.09, reset_start=2)
    mine.add_param_group(group(0.0905))
    seen = []
    for _ in range(6):
        step(scheduler)
        seen.append(rates(mine))
    assert [0.09, 0.09] in seen
    assert [0.1, 0.0905] in seen


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step:UserWarning")
def test_the_schedule_of_adafactor_shows_groups_that_join_and_those_without_gradients():
    mine = fusedstep.Adafactor([torch.nn.Parameter(torch.ones(3, 2))])
    scheduler = schedules.AdafactorSchedule(mine, 0.5)
    mine.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5, 0.5]
    first, second = (each["params"][0] for each in mine.param_groups)
    first.grad = torch.ones_like(first)
    mine.step()
    second.grad = torch.ones_like(second)  # which has no step yet
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.01), 0.5]


def test_learning_rates_on_the_device_follow_for_groups_that_join_and_go(backend):
    curve = schedules.CosineScheduler(max_update=10, base_lr=0.1)
    mine = fusedstep.SGD([group(curve), group(0.2)], lr=0.3, backend=backend)
    seen = []
    for number in range(6):
        if number == 2:
            mine.add_param_group(group(curve))
        if number == 4:
            del mine.param_groups[0]
        for own in mine.param_groups:
            own["params"][0].grad = torch.ones(2)
        mine.step()
        seen.append(mine.get_last_lr())
    expected = [[curve(n + 1), 0.2, *([curve(n + 1)] if n >= 2 else [])][n >= 4 :] for n in range(6)]
    assert seen == expected
    assert mine.schedule_step == 6
