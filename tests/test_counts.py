"""Step counts: they outlive all that rebuilds plans, and go on where the parent class's fp32 number stops, at 2^24."""

import copy

import pytest
import torch
from kinds import OF_EACH_KIND
from support import ADAMW, MOMENTUM, copies, each, ours, parameters, parameters_of, precision_modes, step

import fusedstep
from fusedstep.cases import CASES
from fusedstep.schedules import CosineScheduler

ROWS = [*OF_EACH_KIND, CASES[0], MOMENTUM]
COSINE = CosineScheduler(max_update=100, base_lr=0.1)


def move(optimizer):
    for param in parameters_of(optimizer):
        param.data = param.data.clone()


def join(optimizer):
    optimizer.add_param_group({"params": [("new", p) for p in parameters([(2,)])]})


def edit(optimizer):
    group = optimizer.param_groups[0]
    for key, value in {"momentum": 0.5, "amsgrad": True, "eta": 0.25, "eps": None, "beta1": 0.5}.items():
        if key in group and not (key == "eps" and not isinstance(group["eps"], tuple)):
            group[key] = value if key != "eps" else (group["eps"][0], 0.125)


def change_dtype(optimizer):
    for param in parameters_of(optimizer):
        param.data = param.data.float()
        for key, value in optimizer.state.get(param, {}).items():
            if key != "step":
                optimizer.state[param][key] = value.float()


def wake(optimizer):
    parameters_of(optimizer)[0].grad = None


@each(case=ROWS, rebuild=[move, join, edit, change_dtype, wake, copy.deepcopy])
def test_a_count_outlives_what_rebuilds_plans(case, rebuild, backend):
    optimizer = ours(case, [(f"p{i}", p) for i, p in enumerate(parameters())], backend)
    for _ in range(3):
        step(optimizer)
    optimizer = rebuild(optimizer) or optimizer
    step(optimizer)
    assert optimizer.schedule_step == 4
    optimizer.param_groups[0]["lr"] = COSINE
    if case.optimizer != "Adafactor":
        step(optimizer)
        assert optimizer.get_last_lr()[0] == COSINE(5)


@each(options=[{}, {"rounding": "stochastic"}], dampening=[0.0, 0.5])
def test_momentum_that_is_turned_on_begins_as_torchs(dampening, options, backend):
    dtype = torch.bfloat16 if options else torch.float64
    mine = fusedstep.SGD(parameters(dtype=dtype), lr=0.1, dampening=dampening, backend=backend, **options)
    theirs = torch.optim.SGD(copies(parameters_of(mine)), lr=0.1, dampening=dampening)
    for number in range(6):
        if number in (3, 5):
            for optimizer in (mine, theirs):
                optimizer.param_groups[0]["momentum"] = 0.75 if number == 3 else 0.5
        step(mine, theirs)
        assert mine.schedule_step == number + 1
    for a, b in zip(parameters_of(mine), parameters_of(theirs), strict=True):
        tolerance = {"rtol": 0.05, "atol": 0.05} if options else {"rtol": 1e-12, "atol": 1e-13}
        torch.testing.assert_close(a, b, **tolerance)


# Beyond 2^24.

MANY = 2**24
backends = pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])


def at(optimizer, count):
    """Go on as if so many steps had been done, at most 2^24."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(count)
    for counter in optimizer.stepper.kept.step.beside.values():
        counter.fill_(count)


@backends
def test_stochastic_rounding_draws_anew(backend):
    param = torch.nn.Parameter(torch.ones(256, dtype=torch.bfloat16))
    optimizer = fusedstep.SGD([param], lr=2.0**-10, maximize=True, rounding="stochastic", backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    at(optimizer, MANY)
    for _ in range(40):
        optimizer.step()
    assert (param == 1).sum() <= 2  # of 256, each of which stays with the probability 0.875^40
    assert optimizer.schedule_step == MANY + 40
    saved = optimizer.state_dict()["state"][0]["step"]
    assert (saved.dtype, saved.item()) == (torch.float32, MANY + 40)


@each(case=ROWS, backend=["cpu", "reference", "triton"])
def test_counts_go_on(case, backend):
    optimizer = ours(case, parameters([(3, 4), (5,)], torch.float32), backend)
    step(optimizer)
    at(optimizer, MANY)
    for _ in range(3):
        step(optimizer)
    assert optimizer.schedule_step == MANY + 3
    assert optimizer.step_form == "int" or case.optimizer not in ("Adafactor", "AdaBelief")
    for state in optimizer.state_dict()["state"].values():
        if "step" in state:
            count = state["step"]
            if optimizer.step_form == "int":
                assert count == MANY + 3
                assert type(count) is int
            else:
                assert (count.dtype, count.item()) == (torch.float32, float(MANY + 4))  # to nearest even
    optimizer.param_groups[0]["lr"] = 0.5
    other = copy.deepcopy(optimizer)
    assert other.schedule_step == MANY + 3


def test_what_depends_on_the_count_moves(backend):
    """A decay of the learning rate by the number of steps, against its formula."""
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = fusedstep.Adagrad([param], lr=1.0, lr_decay=1.0, eps=0.0, backend=backend)
    at(optimizer, MANY)
    for number in range(3):
        optimizer.state[param]["sum"].zero_()
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        torch.testing.assert_close(before - param, torch.full_like(param, 1 / (MANY + 1 + number)), rtol=1e-12, atol=0)


def test_a_schedule_by_itself_goes_on(backend):
    schedule = CosineScheduler(max_update=2 * MANY, base_lr=1.0)
    optimizer = ours(ADAMW, parameters(), backend, lr=schedule)
    optimizer.schedule_step = MANY
    for number in range(3):
        assert optimizer.get_last_lr() == [schedule(MANY + number)]
        step(optimizer)


@pytest.mark.parametrize("number", [int, float, torch.tensor, lambda n: torch.tensor([float(n)])], ids=range(4))
def test_a_large_count_is_loaded_in_every_form(number, backend):
    mine = ours(ADAMW, parameters(), backend)
    step(mine)
    saved = copy.deepcopy(mine.state_dict())
    for state in saved["state"].values():
        state["step"] = number(MANY + 2)
    mine.load_state_dict(saved)
    step(mine)
    assert mine.schedule_step == MANY + 3


def test_modes_of_precision_count_alike(backend):
    for mode in precision_modes("own", "8bit").values():
        optimizer = ours(ADAMW, parameters([(4,)], torch.bfloat16), backend, **mode)
        step(optimizer)
        at(optimizer, MANY)
        step(optimizer)
        step(optimizer)
        assert optimizer.schedule_step == MANY + 2
