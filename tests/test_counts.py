"""Step counts go on where the parent class's fp32 number stops, at 2^24."""

import copy

import pytest
import torch
from support import ADAMW, MOMENTUM, ours, parameters, precision_modes, step

import fusedstep
from fusedstep.cases import CASES, REDUCING
from fusedstep.schedules import CosineScheduler

ROWS = [*{case.optimizer: case for case in (*CASES, *REDUCING)}.values(), CASES[0], MOMENTUM]


# Beyond 2^24.

MANY = 2**24
backends = pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])


def at(optimizer, count):
    """Go on as if so many steps had been done, at most 2^24."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(count)
    for counter in optimizer._counters.values():
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


@backends
@pytest.mark.parametrize("case", ROWS, ids=str)
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
