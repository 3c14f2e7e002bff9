"""`load_state_dict` refuses what is no state."""

import copy
import math

import pytest
import torch
from support import ADAMW, MOMENTUM, ours, parameters, parameters_of, step
from test_distributed_checkpoint import assert_same_bits

from fusedstep.cases import CASES

SHAPES = ((6, 4), (5,))


def trained(case, backend, params=None, **options):
    optimizer = ours(case, params or parameters(SHAPES, torch.float32), backend, **options)
    for _ in range(2):
        step(optimizer)
    return optimizer


def seen(optimizer):
    params = [p.detach().clone() for p in parameters_of(optimizer)]
    return {"params": params, "state": optimizer.state_dict()["state"]}


@pytest.mark.parametrize("number", [-1, 2.5, math.inf, math.nan, 2.0**60, 10**400])
@pytest.mark.parametrize("form", [lambda n: n, torch.tensor], ids=["number", "tensor"])
def test_a_number_of_steps_is_whole_and_not_negative(number, form, backend):
    if form is torch.tensor and number == 10**400:
        pytest.skip("no tensor holds it")
    for case in (ADAMW, MOMENTUM, CASES[0]):
        optimizer = trained(case, backend)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"].setdefault(0, {})["step"] = form(number)
        before = seen(optimizer)
        with pytest.raises(ValueError, match="'step' of parameter 0"):
            optimizer.load_state_dict(saved)
        assert_same_bits(before, seen(optimizer))
