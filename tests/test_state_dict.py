"""state_dict, copies and checkpoints: what torch.optim would write, and back."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from kinds import OF_EACH_STATE
from support import (
    ADAMW,
    ELEMENTWISE,
    EXACT,
    IN_ENGINES,
    MOMENTUM,
    WITH_STATES,
    assert_same,
    assert_untouched,
    by_kind,
    by_kind_of_state,
    copies,
    each,
    ours,
    pair,
    parameters,
    parameters_of,
    snapshot,
    step,
    theirs,
)

import fusedstep
from fusedstep.cases import CASES


def another(make, case, of, *backend):
    """A new optimizer on copies of the parameters of ``of``."""
    return make(case, copies(parameters_of(of)), *backend)


@pytest.mark.parametrize("case", OF_EACH_STATE, ids=str)
def test_it_is_the_one_torch_would_write(case):
    for steps, backend in itertools.product((0, 1, 3), ("cpu", "reference")):
        optimizers = pair(case, backend)
        for number in range(steps):
            step(*optimizers, skip=(1,) if number == 0 else ())
        assert_written_alike(case, *(o.state_dict() for o in optimizers))


def assert_written_alike(case, mine, expected):
    assert list(mine) == list(expected)
    for group, right in zip(mine["param_groups"], expected["param_groups"], strict=True):
        shared = [option for option in right if option != "buffer"]  # in which AdaBelief keeps what it computed
        assert {option: group[option] for option in shared} == {option: right[option] for option in shared}
        if case.optimizer in torch.optim.__dict__:  # our own options come last
            assert [option for option in group if option in right] == list(right)
    # torch lists states in the order in which the parameters got their first gradient, as this package does.
    assert list(mine["state"]) == list(expected["state"])
    for key, state in expected["state"].items():
        assert list(mine["state"][key]) == list(state)
        for name, value in state.items():
            ours_ = mine["state"][key][name]
            assert type(ours_) is type(value)
            if not isinstance(value, torch.Tensor):
                assert ours_ == value
                continue
            assert (ours_.shape, ours_.dtype, ours_.stride(), ours_.device) == (
                value.shape,
                value.dtype,
                value.stride(),
                value.device,
            )


@each(case=ELEMENTWISE, first=["ours", "torch"])
def test_there_and_back_with_parameters_that_sleep(case, backend, first):
    """Every two steps the other class takes over through a file; step counts differ between parameters."""
    expected = theirs(case, parameters())
    current = another(ours, case, expected, backend) if first == "ours" else another(theirs, case, expected)
    for number in range(8):
        step(current, expected, skip=(number % 3,))
        if number % 2:
            file = io.BytesIO()
            torch.save(current.state_dict(), file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            is_ours = isinstance(current, fusedstep.FusedOptimizer)
            current = another(theirs, case, current) if is_ours else another(ours, case, current, backend)
            current.load_state_dict(loaded)
    assert_same(current, expected)


@each(case=ELEMENTWISE, number=[int, float, torch.tensor, lambda n: torch.tensor([n], dtype=torch.int64)])
def test_step_counts_of_old_checkpoints(case, backend, number):
    """torch has written the count as a Python number, and as integer tensors."""
    optimizers = pair(case, backend)
    for _ in range(3):
        step(*optimizers)
    old = copy.deepcopy(optimizers[1].state_dict())
    for state in old["state"].values():
        if "step" in state:
            state["step"] = number(int(state["step"]))
    for group in old["param_groups"]:
        for option in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            if not case.options.get(option):
                group.pop(option, None)
    new = another(ours, case, optimizers[0], backend)
    new.load_state_dict(old)
    for _ in range(2):
        step(new, optimizers[1])
    assert_same(new, optimizers[1])


def test_sgd_buffers_that_are_none(backend):
    """torch up to 2.0 wrote momentum_buffer: None for a parameter that had not started, and without momentum."""
    optimizers = pair(MOMENTUM, backend)
    step(*optimizers)
    old = copy.deepcopy(optimizers[1].state_dict())
    old["state"][1]["momentum_buffer"] = None
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(old))
    for _ in range(2):
        step(*optimizers)
    assert_same(*optimizers)
    plain = ours(CASES[0], parameters(), backend)
    plain.load_state_dict({**plain.state_dict(), "state": {i: {"momentum_buffer": None} for i in range(4)}})
    step(plain)


@each(case=IN_ENGINES, state_dtype=[torch.float32, torch.float64])
def test_the_dtype_of_a_state_is_kept_and_used(case, backend, state_dtype):
    """fp32 states of bf16 parameters: torch would cast them to bf16."""
    wide = ours(case, parameters(dtype=state_dtype), backend)
    step(wide)
    low = ours(case, [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters_of(wide)], backend)
    saved = wide.state_dict()
    low.load_state_dict(saved)
    for _ in range(2):
        step(low)
    for key, state in low.state_dict()["state"].items():
        for name, value in state.items():
            assert value.dtype == saved["state"][key][name].dtype
            if name != "step":
                # Two steps on from the wide state, with more than bf16's eight bits.
                assert not torch.equal(value, value.bfloat16().to(value.dtype)) or value.numel() == 1
    again = ours(case, [torch.nn.Parameter(torch.zeros_like(p)) for p in parameters_of(low)], backend)
    again.load_state_dict(low.state_dict())
    for (_, a), (_, b) in zip(low.state.items(), again.state.items(), strict=True):
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@by_kind_of_state
def test_states_take_the_strides_of_the_parameter(case, backend):
    model = torch.nn.Conv2d(3, 4, 3, dtype=torch.float64)
    mine = ours(case, model.parameters(), backend)
    step(mine)
    step(mine)
    moved = copy.deepcopy(model).to(memory_format=torch.channels_last)
    other = ours(case, moved.parameters(), backend)
    other.load_state_dict(mine.state_dict())
    for param, state in other.state.items():
        for name, value in state.items():
            if name != "step":
                assert value.stride() == param.stride()
    for _ in range(2):
        step(mine, other)
    assert_same(mine, other)


@by_kind_of_state
def test_loaded_tensors_are_copies(case, backend):
    mine = ours(case, parameters(), backend)
    step(mine)
    saved = mine.state_dict()
    kept = copy.deepcopy(saved)
    other = another(ours, case, mine, backend)
    other.load_state_dict(saved)
    step(other)
    step(other)
    for key, state in kept["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(saved["state"][key][name], value, rtol=0, atol=0)
    assert saved["param_groups"] == kept["param_groups"]


def test_options_come_with_the_state(backend):
    mine = ours(ADAMW, parameters(), backend)
    mine.param_groups[0]["lr"] = 0.5
    mine.param_groups[0]["betas"] = (0.5, 0.6)
    mine.param_groups[0]["mine"] = "kept"
    other = fusedstep.AdamW(copies(parameters_of(mine)), backend=backend)
    other.load_state_dict(mine.state_dict())
    assert other.param_groups[0]["mine"] == "kept"
    step(mine, other)
    assert_same(mine, other)


def test_adam_and_adamw_checkpoints_are_exchanged_as_in_torch(backend):
    for first, second in (("Adam", "AdamW"), ("AdamW", "Adam")):
        optimizers = []
        params = parameters()
        for module in (fusedstep, torch.optim):
            a = getattr(module, first)(copies(params), weight_decay=0.3)
            b = getattr(module, second)(copies(params), weight_decay=0.1)
            b.load_state_dict(a.state_dict())
            optimizers.append(b)
        step(*optimizers)
        assert_same(*optimizers)
        assert optimizers[0].state_dict()["param_groups"] == optimizers[1].state_dict()["param_groups"]


# Errors.


@pytest.mark.parametrize("case", WITH_STATES, ids=str)
def test_a_state_of_another_shape(case, backend):
    mine = ours(case, parameters([(3,), (4,)]), backend)
    other = ours(case, parameters([(3,), (5,)]), backend)
    step(mine)
    step(other)
    before, options = snapshot(mine), copy.deepcopy(mine.state_dict()["param_groups"])
    saved = other.state_dict()
    saved["param_groups"][0]["lr"] = 77.0
    with pytest.raises(ValueError, match=r"of parameter 1 has shape \(5,\), expected \(4,\)"):
        mine.load_state_dict(saved)
    assert_untouched(before, mine)
    assert mine.state_dict()["param_groups"] == options
    step(mine)


@pytest.mark.parametrize(
    ("key", "bad", "words"),
    [
        ("step", torch.ones(2), r"is a tensor of shape \(2,\) and dtype torch.float32, expected a number"),
        ("step", "3", "is '3' of type str, expected a number"),
        ("step", None, "is None of type NoneType, expected a number"),
        ("exp_avg", torch.ones(7, dtype=torch.int64), "has dtype torch.int64, expected a floating one"),
        ("exp_avg", torch.ones(7, dtype=torch.complex64), "has dtype torch.complex64, expected a floating one"),
        ("exp_avg", "x", r"is 'x' of type str, expected a tensor of shape \(7,\)"),
    ],
    ids=str,
)
def test_a_state_that_cannot_be_one_is_refused(key, bad, words, backend):
    mine = ours(ADAMW, parameters(), backend)
    step(mine)
    saved, before = copy.deepcopy(mine.state_dict()), snapshot(mine)
    saved["state"][1][key] = bad
    with pytest.raises(ValueError, match=f"'{key}' of parameter 1 {words}"):
        mine.load_state_dict(saved)
    assert_untouched(before, mine)


def test_groups_that_do_not_match(backend):
    mine, expected = pair(ADAMW, backend)
    step(mine, expected)
    two = ours(ADAMW, [{"params": p} for p in parameters()], backend)
    fewer = ours(ADAMW, parameters()[1:], backend)
    for wrong in (two, fewer):
        step(wrong)
        before = snapshot(mine)
        errors = []
        for optimizer in (mine, expected):
            with pytest.raises(ValueError, match="loaded state dict") as error:
                optimizer.load_state_dict(wrong.state_dict())
            errors.append(str(error.value))
        assert errors[0] == errors[1]
        assert_untouched(before, mine)
    step(mine, expected)
    assert_same(mine, expected)


# Hooks.


@by_kind
def test_hooks_run_in_torchs_order_and_see_what_torch_shows(case, backend):
    logs = []
    for optimizer in pair(case, backend):
        step(optimizer)
        saved = optimizer.state_dict()
        log = []

        def seen(state, log=log):
            log.append({k: sorted(v) if isinstance(v, dict) else v for k, v in state.items()})

        def replace(optimizer, state_dict, log=log):
            log.append("pre 1")
            state = {**state_dict["state"], "mine": 5}
            state.pop(0, None)
            return {**state_dict, "state": state}

        def second(optimizer, state_dict, log=log, seen=seen):
            log.append("pre 2")
            seen(state_dict["state"])

        def post(optimizer, log=log):
            log.append("post")
            ids = {param: index for index, param in enumerate(parameters_of(optimizer))}
            log.append(sorted(str(ids.get(key, key)) for key in optimizer.state))

        optimizer.register_load_state_dict_pre_hook(second)
        optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
        optimizer.register_load_state_dict_post_hook(lambda _, log=log: log.append("post 2"))
        optimizer.register_load_state_dict_post_hook(post, prepend=True)
        optimizer.register_state_dict_pre_hook(lambda _, log=log: log.append("state pre"))
        optimizer.register_state_dict_post_hook(lambda _, sd: {**sd, "extra": sorted(map(str, sd["state"]))})
        optimizer.load_state_dict(saved)
        log.append(sorted(optimizer.state_dict()["extra"]))
        optimizer.load_state_dict(optimizer.state_dict())
        logs.append(log)
        assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 2
        assert len(optimizer._optimizer_load_state_dict_post_hooks) == 2
    assert logs[0] == logs[1]


# Copies.


def through_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def through_torch_save(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each(case=ELEMENTWISE, duplicate=[copy.deepcopy, through_pickle, through_torch_save], steps=[0, 1, 3])
def test_a_copy_goes_on_alone(case, backend, duplicate, steps):
    mine = ours(case, parameters(), backend)
    for number in range(steps):
        step(mine, skip=(number,))
    other = duplicate(mine)
    assert type(other) is type(mine)
    for a, b in zip(parameters_of(mine), parameters_of(other), strict=True):
        assert a is not b
        assert a.data_ptr() != b.data_ptr()
    for _ in range(3):
        step(mine, other)
    assert_same(mine, other)
    step(mine)
    assert not torch.equal(parameters_of(mine)[0], parameters_of(other)[0])
    assert other.backends_used == {backend}


def test_a_model_and_its_optimizer_are_copied_together(backend):
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    mine = ours(ADAMW, model.parameters(), backend)
    step(mine)
    model2, mine2 = copy.deepcopy((model, mine))
    assert parameters_of(mine2)[0] is model2.weight
    step(mine, mine2)
    torch.testing.assert_close(model.weight, model2.weight, **EXACT)


# Names.


def test_names_are_saved_and_told(backend):
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    groups = [{"params": [("w", model.weight)], "lr": 0.1}, {"params": [("b", model.bias)]}]
    expected = [{"params": [("w", copies([model.weight])[0])], "lr": 0.1}, {"params": [("b", copies([model.bias])[0])]}]
    optimizers = ours(ADAMW, groups, backend), theirs(ADAMW, expected)
    for _ in range(2):
        step(*optimizers)
    assert_same(*optimizers)
    mine, saved = (o.state_dict() for o in optimizers)
    assert mine["param_groups"] == saved["param_groups"]
    assert [group["param_names"] for group in mine["param_groups"]] == [["w"], ["b"]]
    optimizers[0].load_state_dict(saved)
    step(*optimizers)
    assert_same(*optimizers)


# A tensor learning rate is an option like the others.


def test_a_tensor_lr_survives(backend):
    lr = torch.tensor(0.25, dtype=torch.float64)
    optimizers = pair(ADAMW, backend, lr=lr)
    step(*optimizers)
    saved = optimizers[0].state_dict()
    assert saved["param_groups"][0]["lr"] is lr
    other = another(ours, ADAMW, optimizers[0], backend)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] is not lr
    lr.fill_(0.5)
    other.param_groups[0]["lr"].fill_(0.5)
    step(other, *optimizers)
    assert_same(other, optimizers[1])


def test_states_of_no_parameter_are_kept(backend):
    optimizers = pair(ADAMW, backend)
    for optimizer in optimizers:
        step(optimizer)
        optimizer.state["mine"] = {"count": 3}
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        assert optimizer.state["mine"] == {"count": 3}
        assert optimizer.state_dict()["state"]["mine"] == {"count": 3}
    step(*optimizers)
