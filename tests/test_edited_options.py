"""An option that is edited between steps counts from the next step on: every key of a group of every class."""

import copy

import pytest
import torch
from support import copies, parameters, parameters_of, step

import fusedstep
from fusedstep.cases import CASES, REDUCING

PLAIN = {str(case): case for case in (*CASES, *REDUCING)}
ROWS = [*{case.optimizer: case for case in PLAIN.values()}.values(), CASES[0], CASES[2], CASES[24], REDUCING[0]]
NAMES = ["weight", "bias", "norm"]
SHAPES = ((6, 4), (4, 3), (5,))
NO_EFFECT = {
    "foreach": [True],
    "capturable": [True],
    "fused": [True],
    "buffer": [[]],
    "initial_accumulator_value": [3.0],
}
VALUES = {
    **NO_EFFECT,
    "lr": [0.5, 0, torch.tensor(0.25)],
    **{"betas": [(0.5, 0.6), [0.9, 0.7]], "beta": [0.5], "alpha": [0.5], "beta1": [None, 0.25], "momentum": [0, 0.5]},
    **{"eps": [0.25], "dampening": [0, 0.5], "lr_decay": [0.5], "momentum_decay": [0.25], "decay": [0.5]},
    **{"weight_decay": [0, 0.25], "weight_decay_rate": [0.25], "weight_decay_divisor": [2.0]},
    **{flag: [True, False] for flag in ("maximize", "nesterov", "amsgrad", "decoupled_weight_decay", "centered")},
    **{flag: [True, False] for flag in ("weight_decouple", "fixed_decay", "rectify", "degenerated_to_sgd")},
    **{flag: [True, False] for flag in ("scale_parameter", "relative_step", "warmup_init", "differentiable")},
    **{"clip_value": [None, 0.25], "extra_l2": [0.25], "c_coef": [0.75], "d_coef": [0.75], "clip_threshold": [0.25]},
    **{"eta": [0.125, {"weight": 0.125, "bias": 0.5, "norm": 2.0}, {"weight": 1.0}], "decay_rate": [-0.25]},
    **{"reduce": [None, (0,), (-1,), {"norm": (0,)}, {"weight": [1], "bias": [1], "norm": [0]}, (5,)]},
    **{"include_in_weight_decay": [None, ["norm"]], "exclude_from_weight_decay": [None, ["w", "norm"], ["bias"]]},
    **{"clipvalue": [0.25, -1], "clipnorm": [0.25], "global_clipnorm": [0.25], "beta2_decay": [-0.25], "d": [3.0]},
    **{"param_names": [["norm", "bias", "weight"]]},
}
EPS = {"Adafactor": [(0.25, 0.5), (1e-30, 0.75)], "TorchAdafactor": [(0.25, 0.5), (None, 0.5), [0.125, 0.75]]}


def optimizer_of(case, params, backend, **group):
    options = {key: group.pop(key) for key in ("global_clipnorm",) if key in group}
    groups = [{"params": list(zip(NAMES, params, strict=True)), **group}]
    return getattr(fusedstep, case.optimizer)(groups, backend=backend, **{**case.options, **options})


def edits(case):
    group = optimizer_of(case, parameters(SHAPES), "cpu").param_groups[0]
    for key in group:
        if key != "params":
            for value in EPS.get(case.optimizer, VALUES["eps"]) if key == "eps" else VALUES[key]:
                yield key, value


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_the_next_step_has_the_new_value(case, backend):
    """Against an optimizer made with it that loaded the state; or both refuse it, and nothing has changed."""
    first = optimizer_of(case, parameters(SHAPES, torch.float32), backend)
    step(first)
    step(first)
    state = copy.deepcopy(first.state_dict())
    start = [param.detach().clone() for param in parameters_of(first)]
    plain = steps_from(first)
    changed = set()
    for key, value in edits(case):
        edited = copy.deepcopy(first)
        step(edited)  # has plans now, and a state that it shall not keep
        edited.load_state_dict(state)
        restore(edited, start)
        step(edited, skip=(0, 1, 2))
        edited.param_groups[0][key] = copy.deepcopy(value)
        new_state = copy.deepcopy(state)
        new_state["param_groups"][0][key] = copy.deepcopy(value)
        made = made_with(case, start, backend, key, value)
        try:
            made.load_state_dict(new_state)
            made.param_groups[0][key] = copy.deepcopy(value)  # AdamW, as torch's, loads one of them as it likes
            expected = steps_from(made, start)
        except (ValueError, TypeError, RuntimeError):
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                steps_from(edited, start)
            for param, before in zip(parameters_of(edited), start, strict=True):
                assert torch.equal(param, before), key
            continue
        found = steps_from(edited, start)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b), (key, value)
        if any(not torch.equal(a, b) for a, b in zip(found, plain, strict=True)):
            changed.add(key)
    assert {"lr", "maximize"} <= changed or case.options.get("relative_step", True) is True


def made_with(case, values, backend, key, value):
    """An optimizer with an option of its own; without, where a constructor refuses what torch's steps take."""
    params = copies(map(torch.nn.Parameter, values))
    try:
        return optimizer_of(case, params, backend, **({} if key == "param_names" else {key: value}))
    except ValueError:
        return optimizer_of(case, params, backend)


def restore(optimizer, values):
    with torch.no_grad():
        for param, value in zip(parameters_of(optimizer), values, strict=True):
            param.copy_(value)


def steps_from(optimizer, start=None):
    if start is not None:
        restore(optimizer, start)
    torch.manual_seed(3)
    for _ in range(3):
        step(optimizer)
    return [param.detach().clone() for param in parameters_of(optimizer)]


@pytest.mark.parametrize(
    ("name", "options", "edit", "value"),
    [
        ("AdamWeightDecay", {"weight_decay_rate": 0.5, "exclude_from_weight_decay": ["norm"]}, "append", "bias"),
        ("AdamWeightDecay", {"weight_decay_rate": 0.5, "exclude_from_weight_decay": ["norm", "bias"]}, "pop", -1),
        ("Amos", {"eta": {"weight": 1.0, "bias": 0.5, "norm": 0.25}}, "update", {"bias": 2.0}),
    ],
)
def test_containers_are_edited_in_place(name, options, edit, value, backend):
    key = next(key for key in options if key in ("exclude_from_weight_decay", "eta"))
    make = getattr(fusedstep, name)
    params = parameters(SHAPES, torch.float32)
    first = make(list(zip(NAMES, params, strict=True)), lr=0.1, backend=backend, **copy.deepcopy(options))
    step(first)
    getattr(first.param_groups[0][key], edit)(value)
    second = make(list(zip(NAMES, copies(params), strict=True)), lr=0.1, backend=backend)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        step(first, second)
    for a, b in zip(parameters_of(first), parameters_of(second), strict=True):
        assert torch.equal(a, b)


def test_a_norm_of_all_groups_is_edited_in_all(backend):
    params = parameters(SHAPES)
    first = fusedstep.AdamWeightDecay([{"params": params[:1]}, {"params": params[1:]}], 0.1, backend=backend)
    step(first)
    before = [param.detach().clone() for param in params]
    first.param_groups[1]["global_clipnorm"] = 0.5
    with pytest.raises(ValueError, match="set it in every group"):
        step(first)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    first.param_groups[0]["global_clipnorm"] = 0.5
    second = fusedstep.AdamWeightDecay(copies(params), 0.1, global_clipnorm=0.5, backend=backend)
    state = copy.deepcopy(first.state_dict())
    state["param_groups"] = [{**state["param_groups"][0], "params": [0, 1, 2]}]
    second.load_state_dict(state)
    step(first, second)
    assert torch.equal(first.grad_norm, second.grad_norm)
    for a, b in zip(params, parameters_of(second), strict=True):
        assert torch.equal(a, b)
    for group in first.param_groups:
        group["global_clipnorm"] = None
    first.param_groups[1]["global_clipnorm"], norm = None, first.grad_norm
    step(first)
    assert torch.equal(first.grad_norm, norm)  # of the last step that needed one


def test_patterns_need_names(backend):
    optimizer = fusedstep.AdamWeightDecay(parameters(SHAPES), 0.1, backend=backend)
    step(optimizer)
    optimizer.param_groups[0]["exclude_from_weight_decay"] = ["bias"]
    with pytest.raises(ValueError, match="need the parameters' names"):
        step(optimizer)
