"""torch.distributed.checkpoint: to ask for a state changes nothing, and a state that came through it is whole.

One process without a process group, as on the first rank: what goes through files is the same on any number of ranks.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import ALL, KINDS, WEIGHTS, each, parameters_of
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

import fusedstep
from fusedstep.cases import CASES, REDUCING, reduces
from fusedstep.schedules import CosineScheduler

WARMUP = CosineScheduler(max_update=20, base_lr=0.1, final_lr=0.01, warmup_steps=3, warmup_begin_lr=0.0)
# The last row of each class, and of those whose state hides the number of steps, all that differ in it.
HIDING = [case for case in CASES if case.optimizer in ("SGD", "Lion")]
ROWS = list(dict.fromkeys(map(str, [*HIDING, *{case.optimizer: case for case in (*CASES, *REDUCING)}.values()])))
BY_NAME = {str(case): case for case in (*CASES, *REDUCING)}
OWN = {
    "plain": {},
    "schedule": {"lr": WARMUP},
    "average": {"ema_decay": 0.75, "weights_copy": torch.float16},
    **{name: {**WEIGHTS[name], "ema_decay": 0.5} for name in ("master", "split", "kahan")},
    "all": {**WEIGHTS["stochastic"], "state_dtype": "8bit", "ema_decay": 0.75, "lr": WARMUP},
}
FORMS = {"nested": StateDictOptions(), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}
by_form = pytest.mark.parametrize("form", FORMS)


class Model(torch.nn.Module):
    """A matrix that is stored in 8 bits where that is asked for, and parameters that sleep at first, or always."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("weight", (65, 64)), ("bias", (7,)), ("late", (3, 4)), ("never", (5,)), ("frozen", (2,))):
            values = torch.randn(shape, generator=generator).bfloat16()
            self.register_parameter(name, torch.nn.Parameter(values, requires_grad=name != "frozen"))


def make(model, case, own, backend, **options):
    options = {**case.options, **OWN[own], **options}
    if options.get("relative_step", case.optimizer == "Adafactor") and "lr" in options:
        options["relative_step"] = options["warmup_init"] = False
    if "lr" in OWN[own]:
        options.pop("decoupled_weight_decay", None)  # of Lion, which takes no schedule with it
    if reduces(case):
        options = {key: value for key, value in options.items() if key not in ("state_dtype", *PRECISION)}
    if "eta" in options:
        return getattr(fusedstep, case.optimizer)(model.named_parameters(), backend=backend, **options)
    return getattr(fusedstep, case.optimizer)(model.parameters(), backend=backend, **options)


PRECISION = ("master_weights", "kahan", "rounding", "rounding_seed")


def train(optimizer, *numbers):
    """Steps with the gradients of these numbers; the third parameter wakes at number 2, the fourth never does."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for index, param in enumerate(parameters_of(optimizer)):
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if index < 2 or (index == 2 and number >= 2):
                param.grad = grad
        optimizer.step()
        optimizer.zero_grad()


def seen(optimizer, states=True):
    """All that can be seen of a training, as bits."""
    found = {
        "params": [p.detach().clone() for p in parameters_of(optimizer)],
        "rates": [float("nan") if group["lr"] is None else float(group["lr"]) for group in optimizer.param_groups],
        "count": optimizer.schedule_step,
    }
    if optimizer.stepper.kept.copy.dtype is not None:
        found["copies"] = [optimizer.copies[p].clone() for p in parameters_of(optimizer)]
    if states:
        found["state"] = copy.deepcopy(optimizer.state_dict()["state"])
    return found


def assert_same_bits(a, b, what=""):
    assert type(a) is type(b), what
    if isinstance(a, dict):
        assert a.keys() == b.keys(), what
        for key in a:
            assert_same_bits(a[key], b[key], f"{what}.{key}")
    elif isinstance(a, list):
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same_bits(*pair, f"{what}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), what
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(a, b), what
    else:
        assert a == b or a != a, what


# Asking.


@each(case=[BY_NAME[row] for row in ROWS], own=OWN.keys())
def test_to_ask_changes_nothing(case, own, backend):
    """Before the first step, between steps, and with a schedule: an optimizer that is never asked goes the same way."""
    models = [Model() for _ in range(2)]
    asked, left_alone = (make(model, case, own, backend) for model in models)
    asked.register_step_post_hook(lambda *_: calls.append("step"))
    calls = []
    for number in range(4):
        before = seen(asked, states=number > 0)
        for form in FORMS.values():
            get_optimizer_state_dict(models[0], asked, options=form)
        assert not calls
        assert all(param.grad is None for param in models[0].parameters())
        after = seen(asked)
        if number > 0:  # states may be made for a parameter that has none, at their beginning
            after["state"] = {key: after["state"][key] for key in before["state"]}
        else:
            assert all(float(state.get("step", 0)) == 0 for state in after.pop("state").values())
            assert asked.schedule_step == 0
        assert_same_bits(before, after)
        train(asked, number)
        train(left_alone, number)
        calls.clear()
    assert_same_bits(seen(asked), seen(left_alone))
    for states in zip(*(o.state_dict()["state"] for o in (asked, left_alone)), strict=True):
        assert states[0] == states[1]


def test_the_count_of_plain_sgd_is_not_moved(backend):
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = fusedstep.SGD(model.parameters(), lr=CosineScheduler(max_update=100, base_lr=0.1), backend=backend)
    for number in range(4):
        train(optimizer, number)
        get_optimizer_state_dict(model, optimizer)
        get_state_dict(model, optimizer)
    assert optimizer.schedule_step == 4
    assert optimizer.state_dict()["state"] == {}
    with torch.inference_mode():
        get_optimizer_state_dict(model, optimizer)
    train(optimizer, 4)
    assert optimizer.schedule_step == 5


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("listed", [1, 2])
def test_to_ask_for_a_parameter_that_is_listed_twice_changes_nothing(listed, backend):
    weights = []
    for asked in (False, True):
        model = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        optimizer = fusedstep.SGD([model.weight] * listed, 0.1, momentum=0.9, dampening=0.5, backend=backend)
        if asked:
            get_optimizer_state_dict(model, optimizer)
        for _ in range(2):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def test_weights_that_are_loaded_after_the_question_are_what_averages_and_masters_begin_with(backend):
    options = {"ema_decay": 0.5, "weights_copy": torch.float16, "backend": backend}
    for own in ({"master_weights": True}, {"master_weights": "split"}, {"kahan": True}):
        models = [Model() for _ in range(2)]
        asked, expected = (fusedstep.AdamW(model.parameters(), lr=0.1, **own, **options) for model in models)
        get_optimizer_state_dict(models[0], asked)
        for model in models:
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(-3)
        for optimizer in (asked, expected):
            train(optimizer, 0, 1)
        assert_same_bits(seen(asked), seen(expected))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_that_is_made_after_the_question_begins_at_the_beginning(duplicate, backend):
    model = Model()
    first = fusedstep.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, ema_decay=0.5, backend=backend)
    get_optimizer_state_dict(model, first)
    second = duplicate(first)
    assert second.state_dict()["state"] == {}
    for optimizer in (first, second):
        train(optimizer, 0, 1)
    assert_same_bits(seen(first), seen(second))


def test_a_state_of_the_users_own_is_asked_without_a_step_too(backend):
    model = Model()
    optimizer = fusedstep.AdamW(model.parameters(), backend=backend)
    train(optimizer, 0)
    optimizer.state = type(torch.optim.SGD(model.parameters()).state)(dict)
    train(optimizer, 1)
    optimizer.state.clear()
    get_optimizer_state_dict(model, optimizer)
    assert all(float(state["step"]) == 0 for state in optimizer.state_dict()["state"].values())


def test_what_somebody_has_written_into_is_kept(backend):
    model = Model()
    optimizer = fusedstep.AdamW(model.parameters(), lr=0.1, backend=backend)
    get_optimizer_state_dict(model, optimizer)
    optimizer.state[model.bias]["exp_avg"].fill_(100.0)
    train(optimizer, 0)
    assert optimizer.state[model.bias]["exp_avg"].min() > 50
    assert model.never not in optimizer.state


def test_the_truth_of_a_state_is_that_of_a_dictionary_elsewhere(backend):
    model = Model()
    optimizer = fusedstep.AdamW(model.parameters(), backend=backend)
    assert not optimizer.state
    assert optimizer.state == {}
    train(optimizer, 0)
    assert optimizer.state
    for other in (copy.copy(optimizer.state), optimizer.state.copy(), pickle.loads(pickle.dumps(optimizer.state))):
        assert type(other).__mro__[0].__module__ == "collections"
        assert len(other) == 2
        assert other["new"] == {}


# Saving and loading.


def through_memory(given, template, directory):
    return copy.deepcopy(given)


def through_a_file(given, template, directory):
    file = io.BytesIO()
    torch.save(given, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_dcp(given, template, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        dcp.save(given, checkpoint_id=str(directory))
        dcp.load(template, checkpoint_id=str(directory))
    return template


def check_it_goes_on(case, own, form, way, backend, directory, steps):
    models = [Model() for _ in range(2)]
    old = make(models[0], case, own, backend)
    train(old, *range(steps))
    if own in ("schedule", "all"):
        old.schedule_step = 1 + 2 * steps
    models[1].load_state_dict(models[0].state_dict())
    seed = {"rounding_seed": 5} if own == "all" and not reduces(case) else {}
    new = make(models[1], case, own, backend, **seed)
    form = FORMS[form]
    template = get_optimizer_state_dict(models[1], new, options=form)
    given = get_optimizer_state_dict(models[0], old, options=form)
    assert {key for key in given if key.startswith("state.")} == {key for key in template if key.startswith("state.")}
    set_optimizer_state_dict(models[1], new, way(given, template, directory), options=form)
    assert new.schedule_step == old.schedule_step or not new.stepper.learning_rates.parts
    assert new.state_dict().get("rounding_seed") == old.state_dict().get("rounding_seed")
    for optimizer in (old, new):
        train(optimizer, 3, 4, 5)
    assert_same_bits(seen(old)["params"], seen(new)["params"])
    states = seen(old)["state"], seen(new)["state"]
    for some, others in (states, states[::-1]):  # one may have those of parameters before their first step
        for key in some.keys() - others.keys():
            assert float(some.pop(key).get("step", 0)) == 0
    assert_same_bits(*states)
    assert seen(old)["rates"] == seen(new)["rates"] or own == "plain"


@each(case=KINDS, own=OWN.keys(), form=FORMS.keys())
def test_training_goes_on_with_the_same_bits(case, own, form, backend, tmp_path):
    for steps in (0, 2):
        check_it_goes_on(case, own, form, through_memory, backend, tmp_path, steps)


@each(
    case=[BY_NAME[row] for row in ROWS[2:]] if ALL else KINDS,
    form=FORMS.keys(),
    way=[through_a_file, through_dcp],
)
def test_training_goes_on_through_files(case, form, way, tmp_path):
    check_it_goes_on(case, "all", form, way, "cpu", tmp_path, 2)


@by_form
def test_a_flat_checkpoint_of_the_parent_class(form, backend):
    models = [Model().float() for _ in range(2)]
    theirs = torch.optim.AdamW(models[0].parameters(), lr=0.1)
    train(theirs_of(theirs), 0, 1, 2)
    models[1].load_state_dict(models[0].state_dict())
    mine = fusedstep.AdamW(models[1].parameters(), lr=0.5, backend=backend, ema_decay=0.5)
    form = FORMS[form]
    form = StateDictOptions(flatten_optimizer_state_dict=form.flatten_optimizer_state_dict, strict=False)
    given = copy.deepcopy(get_optimizer_state_dict(models[0], theirs, options=form))
    with pytest.warns(UserWarning, match="without an average"):
        set_optimizer_state_dict(models[1], mine, given, options=form)
    for optimizer in (theirs, mine):
        train(theirs_of(optimizer), 3, 4)
    for a, b in zip(parameters_of(theirs), parameters_of(mine), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def theirs_of(optimizer):
    return optimizer


def test_a_lowered_count_of_a_schedule_is_kept(backend):
    """A schedule begun anew in mid-training is found there again, and torch's class in between adds to it."""
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    first, second = (fusedstep.AdamW(model.parameters(), lr=WARMUP, backend=backend) for model in models)
    train(first, 0, 1, 2)
    first.schedule_step = 1
    set_optimizer_state_dict(models[1], second, get_optimizer_state_dict(models[0], first))
    assert second.schedule_step == 1
    theirs = torch.optim.AdamW(models[0].parameters())
    theirs.load_state_dict(second.state_dict())
    train(theirs, 3, 4)
    second.load_state_dict(theirs.state_dict())
    assert second.schedule_step == 3


@by_form
def test_the_seed_of_a_checkpoint_counts(form, backend):
    """In the groups, where distributed checkpoints have it, as at the top of a state_dict."""
    model = Model()
    old, new = (
        fusedstep.SGD(model.parameters(), rounding="stochastic", rounding_seed=seed, backend=backend) for seed in (7, 0)
    )
    train(old, 0)
    set_optimizer_state_dict(model, new, get_optimizer_state_dict(model, old, options=FORMS[form]), options=FORMS[form])
    assert new.state_dict()["rounding_seed"] == 7
    assert "rounding_seed" not in new.param_groups[0]
    bad = copy.deepcopy(old.state_dict())
    bad["param_groups"][0]["rounding_seed"] = -1
    with pytest.raises(ValueError, match="'rounding_seed' is -1"):
        new.load_state_dict(bad)
