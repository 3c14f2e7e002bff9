"""What may happen to parameters, gradients, states and options between two steps; torch.optim is the judge."""

import copy
import gc
import weakref

import numpy as np
import pytest
import support
import torch
from support import (
    ADAMW,
    EXACT,
    IN_ENGINES,
    MOMENTUM,
    WITH_STATES,
    assert_same,
    assert_untouched,
    by_kind,
    by_kind_in_engines,
    by_kind_of_state,
    by_one_kind,
    copies,
    each,
    give_grads,
    normal,
    ours,
    pair,
    parameters,
    parameters_of,
    parametrize_cases,
    snapshot,
    step,
    theirs,
)

from fusedstep.cases import CASES

pytestmark = pytest.mark.plans

# Gradients that come and go.


@by_kind_of_state
def test_parameters_without_a_gradient_do_not_age(case, backend):
    pattern = [(0, 1), (1,), (), (0, 2, 3), (0, 1, 2, 3), (), (3,)]
    optimizers = pair(case, backend)
    for skip in pattern:
        step(*optimizers, skip=skip)
        assert_same(*optimizers)


@by_kind_in_engines
def test_no_gradient_at_all(case, backend):
    mine = ours(case, parameters(), backend)
    before = snapshot(mine)
    mine.step()
    assert_untouched(before, mine)
    assert mine.step(lambda: 5) == 5
    step(mine)
    before = snapshot(mine)
    mine.zero_grad()
    mine.step()
    assert_untouched(before, mine)


@by_one_kind
def test_freezing_and_unfreezing(case, backend):
    optimizers = pair(case, backend)
    for frozen in (True, False, True, False):
        for optimizer in optimizers:
            for param in parameters_of(optimizer)[1:]:
                param.requires_grad_(not frozen)
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in parameters_of(optimizer))
            loss.backward()
            optimizer.step()
        assert_same(*optimizers)


@by_one_kind
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(case, backend, set_to_none):
    optimizers = pair(case, backend)
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
            for param in parameters_of(optimizer)[1:]:
                (param.sin() * 2).sum().backward()
            optimizer.step()
        assert_same(*optimizers)


@by_one_kind
def test_accumulated_gradients(case, backend):
    optimizers = pair(case, backend)
    for _ in range(3):
        for optimizer in optimizers:
            for _ in range(2):
                for param in parameters_of(optimizer):
                    param.cos().sum().backward()
            optimizer.step()
        assert_same(*optimizers)


def expanded(grad):
    return torch.full((), 0.5, dtype=grad.dtype).expand(grad.shape)


def reversed_dimensions(grad):
    dims = tuple(reversed(range(grad.dim())))
    return grad.permute(dims).contiguous().permute(dims)


def every_second(grad):
    larger = torch.zeros((*grad.shape, 2), dtype=grad.dtype)
    larger[..., 1] = grad
    return larger[..., 1]


def negated(grad):
    return torch._neg_view(grad)


def zeros_without_memory(grad):
    return torch._efficientzerotensor(grad.shape, dtype=grad.dtype)


def with_history(grad):
    return (grad.requires_grad_() * 2.0).clone()


@each(
    change=[expanded, reversed_dimensions, every_second, negated, zeros_without_memory, with_history],
    case=IN_ENGINES,
)
def test_gradients_of_every_kind_from_one_step_to_the_next(case, backend, change):
    optimizers = pair(case, backend)
    for number in range(5):
        give_grads(*optimizers)
        if number in (1, 2, 4):
            for optimizer in optimizers:
                for param in parameters_of(optimizer)[number % 2 :]:
                    param.grad = change(param.grad)
        kept = [p.grad.clone() for p in parameters_of(optimizers[0])]
        with torch.no_grad():
            for optimizer in optimizers:
                optimizer.step()
        for param, grad in zip(parameters_of(optimizers[0]), kept, strict=True):
            assert torch.equal(param.grad, grad)
        assert_same(*optimizers)


def test_a_lazily_negated_gradient_of_one_element_comes_from_autograd(backend):
    """For one element the strides say nothing: only the sign bit of the tensor tells that memory holds -grad."""
    optimizers = pair(ADAMW, backend, [torch.nn.Parameter(torch.ones(1, dtype=torch.float64))])
    for optimizer in optimizers:
        (param,) = parameters_of(optimizer)
        param.grad = torch.complex(param.detach(), param.detach()).conj().imag
        assert param.grad.is_neg()
        optimizer.step()
    assert_same(*optimizers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gradients_dtype_may_change(backend, dtype):
    optimizers = pair(ADAMW, backend)
    for number in range(4):
        give_grads(*optimizers)
        for mine, expected in zip(*map(parameters_of, optimizers), strict=True):
            rounded = mine.grad.to(dtype)
            expected.grad = rounded.double()
            if number % 2:
                mine.grad_dtype = None
                mine.grad = rounded
            else:
                mine.grad = rounded.double()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(*optimizers)


@by_one_kind
def test_gradients_are_let_go_after_the_step(case, backend):
    mine = ours(case, parameters(), backend)
    for _ in range(3):
        step(mine)
        refs = [weakref.ref(p.grad.untyped_storage()) for p in parameters_of(mine)]
        grads = [weakref.ref(p.grad) for p in parameters_of(mine)]
        mine.zero_grad()
        assert all(ref() is None for ref in refs)
        assert all(ref() is None for ref in grads)


# Parameters that move.


def new_data(param):
    param.data = normal(*param.shape, dtype=param.dtype)


def same_memory_again(param):
    param.data = param.data.view(param.shape)


def into_a_flat_buffer(param):
    flat = torch.zeros(param.numel() + 20, dtype=param.dtype)
    flat[11 : 11 + param.numel()] = param.data.reshape(-1)
    param.data = flat[11 : 11 + param.numel()].view(param.shape)


def not_dense(param):
    param.data = every_second(param.data)


def other_order(param):
    param.data = reversed_dimensions(param.data)


def storage_moved(param):
    values = param.data.clone()
    size = param.untyped_storage().nbytes()
    param.untyped_storage().resize_(0)
    torch.zeros(size, dtype=torch.uint8)
    param.untyped_storage().resize_(size + 4096)
    with torch.no_grad():
        param.copy_(values)


def swapped(param):
    param.data, spare = param.data.clone(), param.data
    spare.fill_(float("nan"))


@each(
    change=[new_data, same_memory_again, into_a_flat_buffer, not_dense, other_order, storage_moved, swapped],
    case=IN_ENGINES,
)
def test_parameters_move(case, backend, change):
    """Twice each, so that what a step prepared for the changed tensor is changed once more."""
    optimizers = pair(case, backend)
    step(*optimizers)
    for _ in range(3):
        for param, expected in zip(*map(parameters_of, optimizers), strict=True):
            change(param)
            expected.data = param.data.clone()
        addresses = [(p.data_ptr(), p.stride()) for p in parameters_of(optimizers[0])]
        for _ in range(2):
            step(*optimizers)
            assert_same(*optimizers)
        assert addresses == [(p.data_ptr(), p.stride()) for p in parameters_of(optimizers[0])]


@by_kind
def test_parameters_change_between_dense_and_not(case, backend):
    optimizers = pair(case, backend)
    for change in (not_dense, other_order, not_dense, new_data, negated_data, swapped):
        step(*optimizers)
        for param, expected in zip(*map(parameters_of, optimizers), strict=True):
            change(param)
            expected.data = param.data.clone()
        step(*optimizers)
        assert_same(*optimizers)


def negated_data(param):
    param.data = torch._neg_view(param.data)


@each(case=IN_ENGINES, dense=[True, False], dtypes=[(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_a_model_changes_its_dtype(case, backend, dense, dtypes):
    """State keeps its own dtype, and the parameter is not rounded on the way through anything narrower."""
    params = parameters(dtype=dtypes[0])
    optimizers = [ours(case, p, backend) for p in (params, copies(params))]
    if not dense:
        for param in parameters_of(optimizers[0]):
            not_dense(param)
    step(*optimizers)
    for optimizer in optimizers:
        for param in parameters_of(optimizer):
            param.grad = None
    for mine, expected in zip(*map(parameters_of, optimizers), strict=True):
        values = torch.randn(mine.shape, dtype=torch.float64).to(dtypes[1])
        mine.data = values.clone() if dense else every_second(values)
        expected.data = values.clone()
    # Judged by an optimizer that meets the changed parameters for the first time with the same state.
    fresh = ours(case, parameters_of(optimizers[1]), "reference")
    fresh.load_state_dict(optimizers[1].state_dict())
    for _ in range(2):
        step(optimizers[0], fresh)
        assert all(p.dtype == dtypes[1] for p in parameters_of(optimizers[0]))
        for state in optimizers[0].state.values():
            assert all(v.dtype == dtypes[0] for k, v in state.items() if k != "step")
        tolerance = EXACT if torch.float32 not in dtypes else {"rtol": 1e-6, "atol": 1e-7}
        assert_same(optimizers[0], fresh, **tolerance)


def test_a_model_changes_its_memory_format(backend):
    model, other = (torch.nn.Conv2d(3, 4, 3, dtype=torch.float64) for _ in range(2))
    other.load_state_dict(model.state_dict())
    mine, expected = ours(ADAMW, model.parameters(), backend), theirs(ADAMW, other.parameters())
    for memory_format in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        step(mine, expected)
        model.to(memory_format=memory_format)
        step(mine, expected)
        assert_same(mine, expected)
        assert model.weight.is_contiguous(memory_format=memory_format)


def test_a_parameter_gets_another_shape(backend):
    """Its old state cannot go with it: an error that changes nothing, then a fresh start once the state is gone."""
    mine = ours(ADAMW, [torch.nn.Parameter(normal(4, 3)), torch.nn.Parameter(normal(2))], backend)
    for _ in range(2):
        step(mine)
    first = parameters_of(mine)[0]
    first.grad = None
    first.data = normal(1, 3)
    give_grads(mine)
    before = snapshot(mine)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"state 'exp_avg' has shape \(4, 3\), it must be that of parameter 0"):
            mine.step()
        assert_untouched(before, mine)
    del mine.state[first]
    expected = theirs(ADAMW, copies([first]))
    step(mine)
    parameters_of(expected)[0].grad = first.grad.clone()
    expected.step()
    torch.testing.assert_close(first.detach(), parameters_of(expected)[0].detach(), **EXACT)


def test_a_non_dense_parameter_gets_another_shape(backend):
    mine = ours(ADAMW, [torch.nn.Parameter(every_second(normal(4, 3)))], backend)
    step(mine)
    (param,) = parameters_of(mine)
    param.grad = None
    param.data = every_second(normal(1, 3))
    give_grads(mine)
    before = snapshot(mine)
    with pytest.raises(RuntimeError, match=r"state 'exp_avg' has shape \(4, 3\)"):
        mine.step()
    assert_untouched(before, mine)


def test_two_parameters_share_memory(backend):
    """Tied weights that are one object, and a parameter that is a view of another's memory."""
    weight = torch.nn.Parameter(normal(5, 4))
    optimizers = pair(ADAMW, backend, [weight])
    for optimizer in optimizers:
        (tied,) = parameters_of(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            ((normal(2, 5).new_ones(2, 5) @ tied) @ tied.t()).square().mean().backward()
            optimizer.step()
    assert_same(*optimizers)


def test_a_parameter_listed_twice_is_updated_twice(backend):
    optimizers = []
    value = normal(6)
    for make in (ours, theirs):
        param = torch.nn.Parameter(value.clone())
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizers.append(make(ADAMW, [param, param], *([backend] if make is ours else [])))
    for _ in range(3):
        grad = normal(6)
        for optimizer in optimizers:
            parameters_of(optimizer)[0].grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(*(parameters_of(o)[0] for o in optimizers), **EXACT)
    for optimizer in optimizers:
        assert optimizer.state[parameters_of(optimizer)[0]]["step"] == 6
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


class MyParameter(torch.nn.Parameter):
    """A subclass as several libraries have them."""


@by_one_kind
def test_subclass_of_parameter(case, backend):
    params = [MyParameter(normal(3, 4)), torch.nn.Parameter(normal(5)), torch.ones(3).double().requires_grad_()]
    optimizers = pair(case, backend, params)
    for _ in range(3):
        step(*optimizers)
    assert_same(*optimizers)
    assert type(params[0]) is MyParameter


@parametrize_cases([ADAMW], CASES)
def test_empty_and_0_dimensional(case, backend):
    params = parameters([(), (0,), (1,), (3, 0, 2), (1, 1, 1)])
    optimizers = pair(case, backend, params)
    for _ in range(3):
        step(*optimizers)
    assert_same(*optimizers)


@parametrize_cases(
    [c for c in IN_ENGINES if c.optimizer in vars(torch.optim)], [c for c in CASES if c.optimizer in vars(torch.optim)]
)
def test_complex_parameters_take_the_reference_and_say_so(case):
    values = [torch.randn(3, 4, dtype=torch.complex128), torch.randn((), dtype=torch.complex128)]
    mine = [torch.nn.Parameter(v.clone()) for v in values]
    theirs_ = [torch.nn.Parameter(v.clone()) for v in values]
    with pytest.warns(UserWarning, match="slow reference implementation") as caught:
        a = ours(case, mine)
    assert len(caught) == 1
    assert caught[0].filename == support.__file__
    b = theirs(case, theirs_)
    for _ in range(3):
        for x, y in zip(mine, theirs_, strict=True):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        a.step()
        b.step()
        for x in mine:  # a state whose memory moved
            for name, state in a.state.get(x, {}).items():
                if name != "step":
                    state.data = state.data.clone()
    for x, y in zip(mine, theirs_, strict=True):
        torch.testing.assert_close(x, y, **EXACT)
        for name, state in b.state.get(y, {}).items():
            torch.testing.assert_close(a.state[x][name], state, **EXACT)
    assert a.backends_used == {"reference"}


# States that are exchanged.


def replaced(state, name):
    state[name] = state[name].clone()


def data_replaced(state, name):
    state[name].data = state[name].data.clone()


def data_elsewhere_in_its_own_storage(state, name):
    size = state[name].numel()
    if state[name].untyped_storage().size() < 3 * size * state[name].element_size():
        both = torch.full((3 * size,), float("nan"), dtype=state[name].dtype)
        both[:size] = state[name].reshape(-1)
        state[name].data = both[:size].view(state[name].shape)
    else:
        offset = state[name].storage_offset()
        both = state[name].as_strided((3 * size,), (1,), 0)
        other = size if offset == 0 else 0
        both[other : other + size] = state[name].reshape(-1)
        both[offset : offset + size] = float("nan")
        state[name].data = both[other : other + size].view(state[name].shape)


def other_layout(state, name):
    state[name] = reversed_dimensions(state[name])


def not_dense_state(state, name):
    state[name] = every_second(state[name])


def negated_state(state, name):
    state[name] = torch._neg_view(-state[name])


def storage_of_state_moved(state, name):
    values = state[name].clone()
    size = values.untyped_storage().nbytes()
    state[name].untyped_storage().resize_(0)
    state[name].untyped_storage().resize_(size + 1000)
    state[name].copy_(values)


@each(
    change=[
        replaced,
        data_replaced,
        data_elsewhere_in_its_own_storage,
        other_layout,
        not_dense_state,
        negated_state,
        storage_of_state_moved,
    ],
    case=WITH_STATES,
)
def test_states_are_exchanged(case, backend, change):
    optimizers = pair(case, backend)
    step(*optimizers)
    for _ in range(3):
        mine = optimizers[0]
        for param in parameters_of(mine):
            for name in mine.state[param]:
                if name != "step":
                    change(mine.state[param], name)
        step(*optimizers)
        assert_same(*optimizers)


@pytest.mark.parametrize("case", [MOMENTUM, ADAMW], ids=str)
def test_a_state_is_edited_in_place_or_through_a_number(case, backend):
    optimizers = pair(case, backend)
    for _ in range(3):
        step(*optimizers)
        for optimizer in optimizers:
            for param in parameters_of(optimizer):
                for name, value in optimizer.state[param].items():
                    value.mul_(2) if name != "step" else value.add_(3)
    step(*optimizers)
    assert_same(*optimizers)
    for param in parameters_of(optimizers[0]):
        if "step" in optimizers[0].state[param]:
            optimizers[0].state[param]["step"] = 20
    for param in parameters_of(optimizers[1]):
        if "step" in optimizers[1].state[param]:
            optimizers[1].state[param]["step"].fill_(20)
    step(*optimizers)
    assert_same(*optimizers)


@by_kind_of_state
def test_state_cleared(case, backend):
    optimizers = pair(case, backend)
    for _ in range(3):
        step(*optimizers)
        step(*optimizers)
        for optimizer in optimizers:
            optimizer.state.clear()
    step(*optimizers)
    assert_same(*optimizers)


@by_kind_of_state
def test_state_of_one_parameter_removed(case, backend):
    optimizers = pair(case, backend)
    for number in range(4):
        step(*optimizers)
        for optimizer in optimizers:
            optimizer.state.pop(parameters_of(optimizer)[number], None)
    step(*optimizers)
    for a, b in zip(*map(parameters_of, optimizers), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_momentum_buffer_from_the_user(backend):
    optimizers = pair(MOMENTUM, backend)
    buffers = [normal(*p.shape) for p in parameters_of(optimizers[0])]
    for optimizer in optimizers:
        for param, buffer in zip(parameters_of(optimizer), buffers, strict=True):
            optimizer.state[param]["momentum_buffer"] = buffer.clone()
    for _ in range(2):
        step(*optimizers)
    assert_same(*optimizers)


# Groups and options that are edited.

EDITS = [
    ("SGD", {"lr": 0.5}),
    ("SGD", {"momentum": 0.9, "dampening": 0.4}),
    ("SGD", {"weight_decay": 0.3}),
    ("SGD", {"maximize": True}),
    ("SGD", {"momentum": 0.0, "dampening": 0.0, "nesterov": False}),
    ("SGD", {"momentum": 0.7, "dampening": 0.0, "nesterov": True}),
    ("AdamW", {"lr": np.float64(0.25)}),
    ("AdamW", {"betas": (0.3, 0.4)}),
    ("AdamW", {"betas": [0.3, 0.4], "eps": 1e-2, "weight_decay": 1}),
    ("AdamW", {"maximize": True, "lr": 1}),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.2}),
]


@pytest.mark.parametrize(("name", "edit"), EDITS, ids=str)
def test_options_edited_in_mid_training(name, edit, backend):
    for case in [case for case in CASES if case.optimizer == name]:
        optimizers = pair(case, backend)
        for number in range(5):
            if number in (1, 3):
                for optimizer in optimizers:
                    group = optimizer.param_groups[0]
                    group.update(edit if number == 1 else {key: optimizer.defaults[key] for key in edit})
            step(*optimizers)
            assert_same(*optimizers)


def test_amsgrad_switched_on_and_off(backend):
    """torch has no state for it and fails; here the largest second moment is counted from then on."""
    mine = ours(ADAMW, parameters(), backend)
    step(mine)
    mine.param_groups[0]["amsgrad"] = True
    expected = theirs(ADAMW, copies(parameters_of(mine)), amsgrad=True)
    expected.load_state_dict(copy.deepcopy(mine.state_dict()))
    for param in parameters_of(expected):
        expected.state[param]["max_exp_avg_sq"] = torch.zeros_like(param)
    for _ in range(3):
        step(mine, expected)
    assert_same(mine, expected)
    for optimizer in (mine, expected):
        optimizer.param_groups[0]["amsgrad"] = False
    step(mine, expected)
    assert_same(mine, expected)


@by_one_kind
def test_parameter_lists_are_edited(case, backend):
    optimizers = pair(case, backend)
    step(*optimizers)
    added = parameters([(4, 2)])
    for optimizer, more in zip(optimizers, (added, copies(added)), strict=True):
        optimizer.param_groups[0]["params"].extend(more)
    step(*optimizers)
    for optimizer in optimizers:
        del optimizer.param_groups[0]["params"][0]
    step(*optimizers)
    for optimizer in optimizers:
        params = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = [params[1], params[0], *params[2:]]
    step(*optimizers)
    for a, b in zip(*map(parameters_of, optimizers), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_named_list_is_edited(backend):
    mine = ours(ADAMW, [("w", parameters([(3,)])[0])], backend)
    mine.param_groups[0]["params"].append(parameters([(2,)])[0])
    before = snapshot(mine)
    step(mine)
    assert not torch.equal(before[0][0][1], parameters_of(mine)[1])


@by_kind_of_state
def test_several_groups_and_one_that_joins_later(case, backend):
    def groups(params):
        return [{"params": params[:2], "lr": 0.3}, {"params": params[2:], "weight_decay": 0.4}]

    params = parameters()
    optimizers = ours(case, groups(params), backend), theirs(case, groups(copies(params)))
    added = parameters([(3, 3), (5,)])
    for number in range(5):
        if number == 2:
            for optimizer, new in zip(optimizers, (added, copies(added)), strict=True):
                optimizer.add_param_group({"params": new, "lr": 0.05})
        step(*optimizers)
        assert_same(*optimizers)
    if backend == "cpu":
        assert optimizers[0].kernel_calls == 3


def test_an_empty_group(backend):
    params = parameters()
    optimizers = [
        ours(ADAMW, [{"params": []}, {"params": params}], backend),
        theirs(ADAMW, [{"params": []}, {"params": copies(params)}]),
    ]
    for _ in range(2):
        step(*optimizers)
    assert_same(*optimizers)


# What autograd sees.


@by_one_kind
def test_a_step_counts_as_one_change_in_place(case, backend):
    params = [*parameters(), torch.nn.Parameter(every_second(normal(4)))]
    mine = ours(case, params, backend)
    give_grads(mine, skip=(1,))
    versions = [p._version for p in params]
    for number in range(1, 4):
        mine.step()
        changes = [p._version - v for p, v in zip(params, versions, strict=True)]
        assert changes == [number, 0, number, number, number]


@by_one_kind
def test_autograd_notices_a_parameter_changed_under_a_saved_graph(case, backend):
    param = torch.nn.Parameter(normal(3, 3))
    mine = ours(case, [param], backend)
    loss = (param**2).sum()
    step(mine)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@by_one_kind
def test_a_step_under_every_grad_mode(case, backend):
    optimizers = pair(case, backend)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            step(optimizers[0])
        for a, b in zip(*map(parameters_of, optimizers), strict=True):
            b.grad = a.grad.clone()
        optimizers[1].step()
        assert all(p.requires_grad and p.is_leaf for p in parameters_of(optimizers[0]))
    assert_same(*optimizers)


def test_inference_parameters(backend):
    with torch.inference_mode():
        optimizers = pair(ADAMW, backend)
        for _ in range(2):
            step(*optimizers)
    assert_same(*optimizers)


# Memory.


@by_one_kind
def test_everything_is_freed_with_the_optimizer(case, backend):
    params = parameters()
    mine = ours(case, params, backend)
    for _ in range(3):
        step(mine)
    refs = [weakref.ref(t) for t in [*params, *(v for s in mine.state.values() for v in s.values()), mine]]
    gc.disable()  # without the help of the cycle collector
    try:
        del params, mine
        assert [ref() for ref in refs] == [None] * len(refs)
    finally:
        gc.enable()


def test_memory_does_not_grow():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    params = [torch.nn.Parameter(torch.randn(64, 1024)), torch.nn.Parameter(torch.randn(64, 2048)[:, ::2])]
    mine = ours(CASES[10], params, "cpu")
    for number in range(220):
        for param in params:
            param.grad = torch.zeros(1024, 64).t() if number % 3 == 0 else torch.zeros(64, 1024)
        if number % 10 == 0:
            params[0].data = params[0].data.clone()
        mine.step()
        mine.zero_grad()
        if number == 20:
            start = resident()
    assert resident() - start < 8 << 20  # a step's gradients are 0.5 MiB
