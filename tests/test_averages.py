"""What follows the weights: averages, judged by torch's AveragedModel, and copies in a narrower dtype."""

import copy
import pickle

import pytest
import torch
from support import (
    ADAMW,
    BY_KIND,
    MOMENTUM,
    WITH_STATES,
    assert_same,
    assert_untouched,
    by_kind_of_state,
    copies,
    each,
    give_grads,
    normal,
    ours,
    parameters,
    parameters_of,
    snapshot,
    step,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedstep

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Model(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = torch.nn.ParameterList(params)


def averaged(params, decay):
    """torch's average of these parameters, as it is after they were seen once."""
    model = AveragedModel(Model(params), multi_avg_fn=get_ema_multi_avg_fn(decay))
    model.update_parameters(Model(params))
    return model


def averages(optimizer):
    return [optimizer.state[param]["ema"] for param in parameters_of(optimizer)]


@each(case=BY_KIND, decay=[0.0, 0.9, 0.999])
def test_averages_are_torchs(case, backend, decay):
    mine = ours(case, parameters(), backend, ema_decay=decay)
    expected = averaged(parameters_of(mine), decay)
    for _ in range(5):
        step(mine)
        expected.update_parameters(Model(parameters_of(mine)))
    for average, theirs in zip(averages(mine), expected.module.params, strict=True):
        torch.testing.assert_close(average, theirs.detach(), rtol=1e-13, atol=1e-14)


@each(case=BY_KIND, dtype=FLOATS)
def test_every_dtype_and_size_has_the_references_bits_and_the_same_step(case, dtype):
    shapes = [(), (1,), (15,), (33,), (3, 5), (70, 61), (9001,), (0,)]
    params = parameters(shapes, dtype)
    options = {"ema_decay": 0.7, "weights_copy": torch.bfloat16}
    mine, reference = ours(case, params, "cpu", **options), ours(case, copies(params), "reference", **options)
    plain = ours(case, copies(params), "cpu")
    for _ in range(3):
        step(mine, reference, plain)
    for a, b in zip(averages(mine), averages(reference), strict=True):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(a, b)
    for a, b, c in zip(*map(parameters_of, (mine, reference, plain)), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(mine.copies[a], a.detach().to(torch.bfloat16))
        assert torch.equal(reference.copies[b], b.detach().to(torch.bfloat16))


@each(name=["Adafactor", "TorchAdafactor"], dtype=[torch.float32, torch.bfloat16])
def test_rules_that_reduce(name, dtype, backend):
    params = parameters(((), (33,), (3, 5), (70, 61), (2, 40, 50), (1100,), (4, 6, 3, 3)), dtype)
    mine = getattr(fusedstep, name)(params, ema_decay=0.7, weights_copy=torch.float16, backend=backend)
    expected = [p.detach().clone().float() for p in params]
    for _ in range(3):
        step(mine)
        expected = [a + (1 - 0.7) * (p.detach().float() - a) for a, p in zip(expected, params, strict=True)]
    for param, average, truth in zip(params, averages(mine), expected, strict=True):
        assert torch.equal(average, truth)
        assert torch.equal(mine.copies[param], param.detach().to(torch.float16))


@pytest.mark.parametrize("name", ["AdamW", "TorchAdafactor"])
def test_any_layout(name, backend):
    params = [
        torch.nn.Parameter(normal(6, 4).t()),
        torch.nn.Parameter(normal(9, 3)[::2]),
        torch.nn.Parameter(normal(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)),
    ]
    mine = getattr(fusedstep, name)(params, ema_decay=0.5, weights_copy=torch.float16, backend=backend)
    held = mine.copies
    expected = averaged(params, 0.5)
    for _ in range(3):
        step(mine)
        expected.update_parameters(Model(params))
    for param, average, theirs in zip(params, averages(mine), expected.module.params, strict=True):
        torch.testing.assert_close(average, theirs.detach(), rtol=1e-13, atol=1e-14)
        assert mine.copies[param] is held[param]
        assert torch.equal(held[param], param.detach().to(torch.float16))


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients(name, backend):
    """Rows without a gradient stay, but their averages go on towards them."""
    param = torch.nn.Parameter(normal(6, 3))
    mine = getattr(fusedstep, name)([param], 0.5, ema_decay=0.6, weights_copy=torch.bfloat16, backend=backend)
    expected = averaged([param], 0.6)
    for row in (1, 4, 1):
        param.grad = torch.sparse_coo_tensor(torch.tensor([[row, 2]]), normal(2, 3), (6, 3), check_invariants=True)
        mine.step()
        expected.update_parameters(Model([param]))
        assert torch.equal(mine.copies[param], param.detach().to(torch.bfloat16))
    torch.testing.assert_close(averages(mine)[0], expected.module.params[0].detach(), rtol=1e-13, atol=1e-14)


def test_complex_parameters():
    param = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
    mine = fusedstep.SGD([param], 0.1, ema_decay=0.5, backend="reference")
    expected = param.detach().clone()
    for _ in range(3):
        param.grad = torch.randn_like(param)
        mine.step()
        expected = 0.5 * expected + 0.5 * param.detach()
    torch.testing.assert_close(mine.state[param]["ema"], expected)
    refused = fusedstep.SGD([param], 0.1, weights_copy=torch.bfloat16, backend="reference")
    with pytest.raises(RuntimeError, match="cannot copy a complex parameter"):
        refused.step()
    both = fusedstep.SGD([param], 0.1, ema_decay=0.5, weights_copy=torch.bfloat16, backend="reference")
    with pytest.raises(RuntimeError, match="cannot copy a complex parameter"), both.swap_ema():
        pass


def test_a_parameter_that_joins_late_or_misses_a_step(backend):
    mine = ours(MOMENTUM, parameters(), backend, ema_decay=0.8)
    params = parameters_of(mine)
    expected = [p.detach().clone() for p in params]
    for skip in ((0, 1), (1,), (0,), ()):
        step(mine, skip=skip)
        for index, param in enumerate(params):
            if index not in skip:
                expected[index] += 0.2 * (param.detach() - expected[index])
    for average, truth in zip(averages(mine), expected, strict=True):
        torch.testing.assert_close(average, truth, rtol=1e-13, atol=1e-14)


@each(momentum=[0, 0.9], dtype=[torch.float32, torch.float16])
def test_a_skipped_step_with_a_sparse_gradient_leaves_every_byte(momentum, dtype, backend):
    param = torch.nn.Parameter(normal(6, 3, dtype=dtype))
    options = {"ema_decay": 0.6, "weights_copy": torch.bfloat16, "skip_nonfinite": True, "write_grads": True}
    mine = fusedstep.SGD([param], 0.5, momentum, backend=backend, **options)
    rows = normal(2, 3, dtype=dtype)
    param.grad = torch.sparse_coo_tensor(torch.tensor([[1, 2]]), rows, (6, 3), check_invariants=True)
    mine.step()
    averages(mine)[0][4:] = -0.0
    with torch.no_grad():
        param[4:] = -0.0
    values = torch.tensor([[1.0, 2048, 3], [0.1, 1, float("nan")]], dtype=dtype)
    param.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), values, (6, 3), check_invariants=True)
    memory = [param, averages(mine)[0], mine.copies[param]]
    before, versions = [t.detach().clone() for t in memory], [t._version for t in memory]
    mine.step()
    assert versions == [t._version for t in memory]
    for new, old in zip(memory, before, strict=True):
        assert torch.equal(new, old)
        assert torch.equal(new.signbit(), old.signbit())
    assert torch.equal(param.grad._values().nan_to_num(), values.nan_to_num())


@by_kind_of_state
def test_a_skipped_step_leaves_the_averages(case, backend):
    mine = ours(case, parameters(), backend, ema_decay=0.8, weights_copy=torch.bfloat16, skip_nonfinite=True)
    step(mine)
    before = [a.clone() for a in averages(mine)] + [c.clone() for c in mine.copies.values()]
    give_grads(mine)
    parameters_of(mine)[0].grad.fill_(float("nan"))
    mine.step()
    after = [*averages(mine), *mine.copies.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@each(dtype=FLOATS, fails=[False, True])
def test_weights_and_averages_change_places_and_come_back(dtype, fails, backend):
    mine = ours(ADAMW, parameters(dtype=dtype), backend, ema_decay=0.9, weights_copy=torch.bfloat16)
    twin = ours(ADAMW, copies(parameters_of(mine)), backend, ema_decay=0.9)
    for _ in range(3):
        step(mine, twin)
    params = parameters_of(mine)
    places = [p.data_ptr() for p in params]
    weights, means = [p.detach().clone() for p in params], [a.clone() for a in averages(mine)]
    outcome = pytest.raises(KeyError) if fails else pytest.warns(UserWarning, match="seen")
    with outcome, mine.swap_ema():
        for param, weight, mean, average in zip(params, weights, means, averages(mine), strict=True):
            assert torch.equal(param, mean.to(dtype))
            assert torch.equal(average, weight.to(average.dtype))
            assert torch.equal(mine.copies[param], param.detach().to(torch.bfloat16))
        with pytest.raises(RuntimeError, match=r"step\(\) inside swap_ema"):
            mine.step()
        with pytest.raises(RuntimeError, match="already exchanged"), mine.swap_ema():
            pass
        if fails:
            raise KeyError
        __import__("warnings").warn("seen", stacklevel=1)
    assert places == [p.data_ptr() for p in params]
    for param, weight, mean, average in zip(params, weights, means, averages(mine), strict=True):
        assert torch.equal(param, weight)
        assert torch.equal(average, mean)
        assert torch.equal(mine.copies[param], weight.to(torch.bfloat16))
    step(mine, twin)
    assert_same(mine, twin, rtol=0, atol=0)


def test_parameters_that_share_memory_change_places_and_come_back(backend):
    first = torch.nn.Parameter(normal(5))
    params = [first, torch.nn.Parameter(first.detach()), torch.nn.Parameter(normal(3))]
    mine = ours(MOMENTUM, params, backend, ema_decay=0.5)
    for _ in range(2):
        step(mine)
    weights, means = [p.detach().clone() for p in params], [a.clone() for a in averages(mine)]
    with mine.swap_ema():
        assert torch.equal(params[2], means[2])
    for param, weight, mean, average in zip(params, weights, means, averages(mine), strict=True):
        assert torch.equal(param, weight)
        assert torch.equal(average, mean)


def test_a_parameter_that_is_listed_twice_changes_places_once(backend):
    param = torch.nn.Parameter(normal(5))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        mine = fusedstep.SGD([param, param], 0.1, ema_decay=0.5, backend=backend)
    param.grad = normal(5)
    mine.step()
    weight, mean = param.detach().clone(), averages(mine)[0].clone()
    with mine.swap_ema():
        assert torch.equal(param, mean)
    assert torch.equal(param, weight)
    assert torch.equal(averages(mine)[0], mean)


def test_what_would_take_averages_for_weights_is_refused_meanwhile(backend):
    mine = ours(ADAMW, parameters(), backend, ema_decay=0.5)
    step(mine)
    saved, called = copy.deepcopy(mine.state_dict()), []
    acts = {
        r"load_state_dict\(\)": lambda: mine.load_state_dict(saved),
        "copying or pickling the optimizer": lambda: copy.deepcopy(mine),
        r"step\(\)": lambda: mine.step(lambda: called.append(1)),
    }
    with mine.swap_ema():
        before = snapshot(mine)
        for words, act in acts.items():
            with pytest.raises(RuntimeError, match=words + r" inside swap_ema\(\)"):
                act()
        assert_untouched(before, mine)
    assert not called
    copy.deepcopy(mine).load_state_dict(saved)


def test_an_average_that_does_not_fit_stays_and_so_do_the_weights(backend):
    mine = ours(ADAMW, parameters(), backend, ema_decay=0.5)
    step(mine)
    mine.state[parameters_of(mine)[1]]["ema"] = torch.zeros(1)
    before = snapshot(mine)
    with (
        pytest.raises(RuntimeError, match=r"state 'ema' has shape \(1,\).* parameter 1, shape \(7,\)"),
        mine.swap_ema(),
    ):
        pass
    assert_untouched(before, mine)


def test_without_averages_there_is_nothing_to_exchange(backend):
    mine = ours(ADAMW, parameters(), backend)
    with pytest.raises(RuntimeError, match="give the optimizer ema_decay"), mine.swap_ema():
        pass
    with pytest.raises(RuntimeError, match="give the optimizer weights_copy"):
        mine.copies  # noqa: B018
    early = ours(ADAMW, parameters(), backend, ema_decay=0.5)
    with early.swap_ema():  # before the first step each parameter is its own average
        pass


@pytest.mark.parametrize("case", WITH_STATES, ids=str)
def test_averages_are_checkpointed(case, backend):
    mine = ours(case, parameters(), backend, ema_decay=0.9)
    for _ in range(2):
        step(mine)
    other = ours(case, copies(parameters_of(mine)), backend, ema_decay=0.9)
    saved = copy.deepcopy(mine.state_dict())
    assert all(list(state)[-1] == "ema" for state in saved["state"].values())
    other.load_state_dict(saved)
    third = pickle.loads(pickle.dumps(mine))
    for _ in range(2):
        step(mine, other, third)
    assert_same(mine, other, rtol=0, atol=0)
    assert_same(mine, third, rtol=0, atol=0)


@pytest.mark.parametrize("case", WITH_STATES, ids=str)
def test_checkpoints_with_and_without_averages_load_into_each_other(case, backend):
    plain = ours(case, parameters(), backend)
    mine = ours(case, copies(parameters_of(plain)), backend, ema_decay=0.9)
    for _ in range(2):
        step(plain, mine)
    saved = copy.deepcopy(mine.state_dict())
    with pytest.warns(UserWarning, match=r"without an average of the weights \('ema'\): theirs begins") as told:
        mine.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert len(told) == 1
    start = [p.detach().clone() for p in parameters_of(mine)]
    with pytest.warns(UserWarning, match=r"has averages of the weights \('ema'\), which are dropped") as told:
        plain.load_state_dict(saved)
    assert len(told) == 1
    assert not any("ema" in state for state in plain.state.values())
    step(plain, mine)
    for param, average, weight in zip(parameters_of(mine), averages(mine), start, strict=True):
        torch.testing.assert_close(average, 0.9 * weight + 0.1 * param.detach(), rtol=1e-13, atol=1e-14)
    for a, b in zip(parameters_of(plain), parameters_of(mine), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["AdamW", "Adagrad"])
def test_a_checkpoint_from_before_the_first_step_needs_no_words(name, backend):
    make = getattr(fusedstep, name)
    mine = make(parameters(), ema_decay=0.9, backend=backend)
    mine.load_state_dict(make(parameters(), backend=backend).state_dict())
    make(parameters(), backend=backend).load_state_dict(mine.state_dict())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(3, 3), r"has shape \(3, 3\), expected \(7,\)"),
        (torch.zeros(7, dtype=torch.complex64), "has dtype torch.complex64, expected a floating one"),
        (torch.zeros(7, dtype=torch.int64), "has dtype torch.int64, expected a floating one"),
        ("mean", r"is 'mean' of type str, expected a tensor of shape \(7,\)"),
    ],
    ids=str,
)
def test_a_loaded_average_that_does_not_fit_is_refused(bad, words, backend):
    """By an optimizer that would drop it too."""
    mine = ours(ADAMW, parameters(), backend, ema_decay=0.9)
    step(mine)
    saved = copy.deepcopy(mine.state_dict())
    saved["state"][1]["ema"] = bad
    for ema_decay in (None, 0.9):
        other = ours(ADAMW, copies(parameters_of(mine)), backend, ema_decay=ema_decay)
        step(other)
        before = snapshot(other)
        with pytest.raises(ValueError, match="'ema' of parameter 1 " + words):
            other.load_state_dict(saved)
        assert_untouched(before, other)


def test_a_loaded_average_in_a_narrower_dtype_is_widened(backend):
    mine = ours(ADAMW, parameters(), backend, ema_decay=0.9)
    step(mine)
    saved = copy.deepcopy(mine.state_dict())
    saved["state"][1]["ema"] = torch.zeros(7, dtype=torch.bfloat16)
    mine.load_state_dict(saved)
    step(mine)
    assert averages(mine)[1].dtype == torch.float64


def test_copies_are_there_before_the_first_step_and_renewed_on_demand(backend):
    mine = ours(ADAMW, parameters(dtype=torch.float32), backend, weights_copy=torch.float16)
    for param, narrow in mine.copies.items():
        assert narrow.dtype == torch.float16
        assert torch.equal(narrow, param.detach().half())
        with torch.no_grad():
            param.mul_(2.0)
    mine.renew_copies()
    assert all(torch.equal(narrow, param.detach().half()) for param, narrow in mine.copies.items())
    with torch.no_grad():
        for param in parameters_of(mine):
            param.mul_(2.0)
    mine.load_state_dict(mine.state_dict())  # with the weights of the checkpoint, in most cases
    assert all(torch.equal(narrow, param.detach().half()) for param, narrow in mine.copies.items())
    assert mine.state_dict()["state"] == {}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ema_decay": 1.0}, ValueError, r"Invalid ema_decay: 1.0 \(it must be in \[0, 1\)\)"),
        ({"ema_decay": -0.1}, ValueError, "Invalid ema_decay: -0.1"),
        ({"ema_decay": "0.9"}, TypeError, "Invalid ema_decay: '0.9' is a str"),
        ({"weights_copy": torch.float32}, ValueError, r"Invalid weights_copy: torch.float32 \(it must be torch.bfloat"),
        ({"weights_copy": "bf16"}, ValueError, "Invalid weights_copy: 'bf16'"),
    ],
    ids=str,
)
def test_bad_options_raise_at_construction(options, error, words):
    with pytest.raises(error, match=words):
        fusedstep.AdamW(parameters(), **options)
