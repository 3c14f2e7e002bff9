"""Clipping in the step, judged by torch.nn.utils.clip_grad_norm_ and torch.optim; and `clip_grad_norm_`."""

import contextlib
import copy
import math
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import (
    ADAMW,
    BY_KIND,
    ELEMENTWISE,
    MOMENTUM,
    WITH_STATES,
    assert_same,
    assert_untouched,
    copies,
    each,
    examples,
    give_grads,
    normal,
    ours,
    pair,
    parameters,
    parameters_of,
    snapshot,
    step,
    theirs,
)

import fusedstep
from fusedstep import backends

pytestmark = pytest.mark.plans

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
torch_clip = torch.nn.utils.clip_grad_norm_


def norm_of(optimizer, norm_type=2.0):
    grads = [param.grad for param in parameters_of(optimizer) if param.grad is not None]
    return torch.nn.utils.get_total_norm(grads, norm_type)


@each(case=BY_KIND, limit=[0.1, 5.0, 1e6, 0], norm_type=[2.0, math.inf, "inf", 2])
def test_a_clipped_step_is_torchs_clipping_and_step(case, backend, norm_type, limit):
    mine = ours(case, parameters(), backend, max_grad_norm=limit, norm_type=norm_type)
    expected = theirs(case, copies(parameters_of(mine)))
    for number in range(4):
        give_grads(mine, expected, skip=(number,))
        kept = [None if p.grad is None else p.grad.clone() for p in parameters_of(mine)]
        mine.step()
        norm = torch_clip(parameters_of(expected), limit, norm_type)
        expected.step()
        torch.testing.assert_close(mine.grad_norm, norm, rtol=1e-12, atol=0)
        for param, grad in zip(parameters_of(mine), kept, strict=True):
            assert param.grad is grad is None or torch.equal(param.grad, grad)
    assert_same(mine, expected, **CLOSE)


@each(
    count=[1, 7, 1023, 1024, 1025, 65537, 200_001],
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
)
def test_the_norm_of_every_dtype_and_size(dtype, count, backend):
    params = parameters(((count,), (3, 1), (0,)), dtype)
    mine = ours(ADAMW, params, backend, max_grad_norm=1.0)
    give_grads(mine)
    exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
    mine.step()
    assert mine.grad_norm.item() == pytest.approx(exact, rel=1e-6 if dtype != torch.float64 else 1e-14)
    assert mine.grad_norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert mine.grad_norm.shape == ()


def test_the_step_has_the_same_bits_given_the_same_coefficient():
    """0.5 of every gradient, exactly: the backends then differ in nothing."""
    params = parameters(((17, 33), (5,)), torch.float32)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    total = 2.0 * math.sqrt(sum(p.numel() for p in params))
    optimizers = [
        ours(ADAMW, params, "cpu", max_grad_norm=total / 2),
        ours(ADAMW, copies(params), "reference", max_grad_norm=total / 2),
    ]
    for a, b in zip(params, parameters_of(optimizers[1]), strict=True):
        b.grad = a.grad.clone()
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert_same(*optimizers, rtol=0, atol=0)


@each(limit=[3.0, 0.3, 0.7, 1e-30, 1e300], dtype=[torch.float64, torch.float32])
def test_the_coefficient_is_rounded_once(limit, dtype):
    """The largest gradient is the same number on both backends, in whatever order it is found."""
    params = parameters(((1000,), (7, 11)), dtype)
    optimizers = [
        fusedstep.SGD(group, lr=1.0, max_grad_norm=limit, norm_type=math.inf, write_grads=True, backend=name)
        for group, name in ((params, "cpu"), (copies(params), "reference"))
    ]
    for _ in range(3):
        give_grads(*optimizers)
        for optimizer in optimizers:
            optimizer.step()
        max_abs = optimizers[0].stepper.gradients.last.max_abs.item()
        coefficients = [optimizer.stepper.gradients.last.coefficient.item() for optimizer in optimizers]
        assert coefficients == [min(1.0, limit / (max_abs + 1e-6))] * 2
        for a, b in zip(*map(parameters_of, optimizers), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_norm_does_not_depend_on_the_number_of_threads(threads):
    params = parameters(((300_000,), (7, 11), (131_073,)), torch.float32)
    mine = ours(ADAMW, params, "cpu", max_grad_norm=1.0)
    give_grads(mine)
    norms = []
    before = torch.get_num_threads()
    for n in (1, threads):
        torch.set_num_threads(n)
        try:
            mine.step()
        finally:
            torch.set_num_threads(before)
        norms.append(mine.stepper.gradients.last.numbers.clone())
    assert torch.equal(*norms)


@pytest.mark.parametrize("isa", ["v2", "v3", "v4"])
def test_the_norm_does_not_depend_on_the_instruction_set(isa):
    from fusedstep import _C

    if isa not in _C.cpu_isas():
        pytest.skip("this processor lacks it")
    params = parameters(((70_000,), (7, 11)), torch.float32)
    mine = ours(ADAMW, params, "cpu", max_grad_norm=1.0)
    give_grads(mine)
    norms, before = [], _C.cpu_isa()
    for name in (before, isa):
        _C.set_cpu_isa(name)
        try:
            mine.step()
        finally:
            _C.set_cpu_isa(before)
        norms.append(mine.stepper.gradients.last.numbers.clone())
    assert torch.equal(*norms)


def test_groups_dtypes_layouts_and_missing_gradients_count_together(backend):
    params = [
        torch.nn.Parameter(normal(4, 6, dtype=torch.float32).t()),
        torch.nn.Parameter(normal(5, dtype=torch.bfloat16)),
        torch.nn.Parameter(normal(3, 3)),
        torch.nn.Parameter(normal(2, 4, 4, 4, dtype=torch.float32).contiguous(memory_format=torch.channels_last)),
        torch.nn.Parameter(normal(9, dtype=torch.float32)[::2]),
        torch.nn.Parameter(normal(3)),
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    mine = ours(MOMENTUM, groups, backend, max_grad_norm=0.3)
    other = copies(params)
    expected = theirs(MOMENTUM, [{"params": other[:2]}, {"params": other[2:], "lr": 0.5}])
    for _ in range(3):
        for a, b in zip(params, other, strict=True):
            if a is not params[5]:
                a.grad = torch.randn(a.shape).to(a.dtype).contiguous()  # another layout than some parameters'
                b.grad = a.grad.clone()
        mine.step()
        torch_clip(other, 0.3)
        expected.step()
        for a, b in zip(params, other, strict=True):
            tolerance = 0.02 if a.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert mine.grad_norm.dtype == torch.float32


def test_parameters_of_two_backends_have_one_norm():
    """Complex ones take the reference."""
    params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(4, dtype=torch.complex64))]
    with pytest.warns(UserWarning, match="slow reference"):
        mine = fusedstep.SGD(params, 0.1, max_grad_norm=0.5)
    other = copies(params)
    expected = torch.optim.SGD(other, 0.1)
    for a, b in zip(params, other, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    mine.step()
    norm = torch_clip(other, 0.5)
    expected.step()
    assert mine.backends_used == {"cpu", "reference"}
    torch.testing.assert_close(mine.grad_norm, norm.real)
    for a, b in zip(params, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_the_norm_of_complex_gradients_is_as_wide_as_they_are(dtype):
    param = torch.nn.Parameter(torch.randn(4, dtype=dtype))
    mine = fusedstep.SGD([param], 0.1, max_grad_norm=0.5, backend="reference")
    param.grad = torch.randn_like(param)
    mine.step()
    norm = torch.linalg.vector_norm(param.grad)
    torch.testing.assert_close(mine.grad_norm, norm)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_the_coalesced_values_of_a_sparse_gradient_count(name, backend):
    params = [torch.nn.Parameter(normal(6, 3)), torch.nn.Parameter(normal(4))]
    mine = getattr(fusedstep, name)(params, 0.1, max_grad_norm=0.5, backend=backend)
    other = copies(params)
    expected = getattr(torch.optim, name)(other, 0.1)
    indices = torch.tensor([[1, 4, 1]])
    for _ in range(3):
        values = normal(3, 3)
        params[0].grad = torch.sparse_coo_tensor(indices, values, (6, 3), check_invariants=True)
        params[1].grad = normal(4)
        other[0].grad = params[0].grad.to_dense()
        other[1].grad = params[1].grad.clone()
        mine.step()
        torch.testing.assert_close(mine.grad_norm, torch_clip(other, 0.5), rtol=1e-12, atol=0)
        expected.step()
    for a, b in zip(params, other, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_adafactor_clips_too(backend):
    params = parameters(((8, 6), (7,), (40, 50)))
    mine = fusedstep.TorchAdafactor(params, max_grad_norm=0.1, backend=backend)
    other = copies(params)
    expected = fusedstep.TorchAdafactor(other, backend="reference")
    for _ in range(3):
        give_grads(mine, expected)
        mine.step()
        torch_clip(other, 0.1)
        expected.step()
    assert_same(mine, expected, rtol=1e-8, atol=1e-9)


def test_a_step_can_have_its_own_limit(backend):
    mine, expected = pair(ADAMW, backend)
    for limit in (0.01, None, 0.2):
        give_grads(mine, expected)
        mine.step(max_grad_norm=limit)
        if limit is not None:
            torch_clip(parameters_of(expected), limit)
        expected.step()
    assert_same(mine, expected, **CLOSE)
    clipping = ours(ADAMW, parameters(), backend, max_grad_norm=0.1)
    plain = ours(ADAMW, copies(parameters_of(clipping)), backend)
    give_grads(clipping, plain)
    clipping.step(max_grad_norm=math.inf)
    plain.step()
    assert_same(clipping, plain, rtol=0, atol=0)


def test_hooks_see_the_limit_and_a_closure_is_called(backend):
    mine = ours(ADAMW, parameters(), backend)
    seen = []
    mine.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(kwargs))
    give_grads(mine)
    assert mine.step(lambda: 3.0, max_grad_norm=1.0) == 3.0
    mine.step()
    assert seen == [{"max_grad_norm": 1.0}, {}]


def test_there_is_no_norm_until_a_step_needs_one(backend):
    mine = ours(ADAMW, parameters(), backend)
    step(mine)
    assert mine.grad_norm is None
    give_grads(mine)
    norm = norm_of(mine)
    mine.step(max_grad_norm=1.0)
    torch.testing.assert_close(mine.grad_norm, norm)
    kept = mine.grad_norm
    give_grads(mine)
    mine.step(max_grad_norm=1.0)
    torch.testing.assert_close(kept, norm)  # a number of its own, not a view of the last one
    for param in parameters_of(mine):
        param.grad = None
    mine.step(max_grad_norm=1.0)
    assert mine.grad_norm == 0


@each(case=BY_KIND, bad=[math.inf, -math.inf, math.nan])
def test_a_non_finite_norm_raises_before_anything_is_written(case, backend, bad):
    mine = ours(case, parameters(), backend, max_grad_norm=1.0, error_if_nonfinite=True)
    for number in range(3):
        give_grads(mine)
        if number == 1:
            parameters_of(mine)[2].grad.fill_(bad)
            before = snapshot(mine)
            with pytest.raises(RuntimeError, match=r"The total norm of order 2\.0 .* is non-finite"):
                mine.step()
            assert_untouched(before, mine)
        else:
            mine.step()


@each(case=ELEMENTWISE, option=["error_if_nonfinite", "skip_nonfinite"])
def test_a_non_finite_norm_creates_no_state(case, option, backend):
    """Neither in the first step nor in the first one of a parameter."""
    mine = ours(case, parameters(), backend, ema_decay=0.9, **{option: True})
    refused = pytest.raises(RuntimeError, match="is non-finite") if "error" in option else contextlib.nullcontext()
    for skip in ((3,), ()):
        give_grads(mine, skip=skip)
        before, saved = snapshot(mine), copy.deepcopy(mine.state_dict()["state"])
        parameters_of(mine)[0].grad.fill_(math.nan)
        with refused:
            mine.step()
        assert_untouched(before, mine)
        assert mine.state_dict()["state"].keys() == saved.keys()
        assert not mine.grad_norm.isfinite()
        step(mine, skip=skip)


@each(case=ELEMENTWISE, bad=[math.inf, math.nan], when=[0, 1])
def test_a_step_with_a_non_finite_norm_can_be_skipped(case, backend, bad, when):
    mine = ours(case, parameters(), backend, skip_nonfinite=True)
    expected = theirs(case, copies(parameters_of(mine)))
    for number in range(3):
        give_grads(mine, expected)
        if number == when:
            parameters_of(mine)[0].grad[1, 2] = bad
            before, versions = snapshot(mine), [p._version for p in parameters_of(mine)]
            mine.step()
            assert_untouched(before, mine)
            assert versions == [p._version for p in parameters_of(mine)]
            assert not mine.grad_norm.isfinite()
        else:
            mine.step()
            expected.step()
    assert_same(mine, expected)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_otherwise_a_non_finite_norm_does_what_torch_does(backend, bad):
    mine = ours(ADAMW, parameters(), backend, max_grad_norm=1.0)
    expected = theirs(ADAMW, copies(parameters_of(mine)))
    give_grads(mine, expected)
    for optimizer in (mine, expected):
        parameters_of(optimizer)[0].grad[0, 0] = bad
    mine.step()
    torch_clip(parameters_of(expected), 1.0)
    expected.step()
    for a, b in zip(parameters_of(mine), parameters_of(expected), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **CLOSE)


def test_a_norm_that_overflows_is_one_of_finite_gradients(backend):
    """clip_grad_norm_ then makes every gradient zero; a scaler sees nothing wrong with it."""
    params = [torch.nn.Parameter(torch.ones(4))]
    mine = fusedstep.SGD(params, 1.0, max_grad_norm=1.0, backend=backend)
    params[0].grad = torch.full((4,), 3e38)
    mine.step()
    assert mine.grad_norm == math.inf
    assert torch.equal(params[0], torch.ones(4))
    scaler = fusedstep.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.step(mine)
    scaler.update()
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "AdamW", "TorchAdafactor"])
def test_gradients_are_written_if_asked_for(name, backend):
    params = parameters(((4, 5), (3,), (6, 2)))
    mine = getattr(fusedstep, name)(params, max_grad_norm=0.1, write_grads=True, maximize=True, backend=backend)
    other = copies(params)
    for _ in range(3):
        for index, (a, b) in enumerate(zip(params, other, strict=True)):
            grad = normal(*a.shape)
            if index == 2:
                grad = grad.t().contiguous().t()  # laid out otherwise than the parameter
            a.grad, b.grad = 4 * grad, grad.clone()
        mine.grad_scale = torch.tensor(4.0)
        versions = [p.grad._version for p in params]
        mine.step()
        assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))
        torch_clip(other, 0.1)
        for a, b in zip(params, other, strict=True):
            torch.testing.assert_close(a.grad, b.grad, **CLOSE)


def test_sparse_gradients_are_written_and_zeroed(backend):
    for options in ({"write_grads": True}, {"zero_grads": True}):
        param = torch.nn.Parameter(normal(6, 3))
        mine = fusedstep.SGD([param], 0.1, max_grad_norm=0.5, backend=backend, **options)
        grad = torch.sparse_coo_tensor(torch.tensor([[1, 4, 1]]), normal(3, 3), (6, 3), check_invariants=True)
        param.grad = grad.clone()
        mine.step()
        expected = grad.to_dense() * (0.5 / (mine.grad_norm + 1e-6)) if "write_grads" in options else torch.zeros(6, 3)
        torch.testing.assert_close(param.grad.to_dense(), expected.double(), **CLOSE)


@each(name=["SGD", "AdamW", "Amos", "TorchAdafactor", "Adafactor"], limit=[None, 0.5])
def test_gradients_are_zeroed_in_the_step(name, limit, backend):
    params = parameters(((4, 5), (3,), (40, 50), (1030,), (3, 3)), torch.float32)
    options = {"lr": 0.1} if name == "Amos" else {}
    mine = getattr(fusedstep, name)(params, max_grad_norm=limit, zero_grads=True, backend=backend, **options)
    other = getattr(fusedstep, name)(copies(params), max_grad_norm=limit, backend=backend, **options)
    for _ in range(3):
        for index, (a, b) in enumerate(zip(params, parameters_of(other), strict=True)):
            grad = torch.randn(a.shape)
            b.grad = grad.t().contiguous().t() if index == 4 else grad
            if a.grad is None:
                a.grad = b.grad.clone(memory_format=torch.preserve_format)
            else:
                assert not a.grad.any()
                a.grad += b.grad
        places = [p.grad.data_ptr() for p in params]
        mine.step()
        other.step()
        assert places == [p.grad.data_ptr() for p in params]
        assert not any(p.grad.any() for p in params)
    assert_same(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("option", ["write_grads", "zero_grads"])
def test_a_parameter_that_is_listed_twice_has_its_gradient_twice(option, backend):
    params = parameters(dtype=torch.float32)
    twins = copies(params)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        mine = fusedstep.SGD([params[0], *params], 0.1, backend=backend, **{option: True})
    with pytest.warns(UserWarning, match="duplicate parameters"):
        expected = torch.optim.SGD([twins[0], *twins], 0.1)
    for _ in range(2):
        for a, b in zip(params, twins, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.grad_scale = torch.tensor(0.5)
        mine.step()
        for b in twins:
            b.grad.mul_(2.0)
        expected.step()
        for a, b in zip(params, twins, strict=True):
            torch.testing.assert_close(a, b)
            assert torch.equal(a.grad, b.grad if option == "write_grads" else torch.zeros_like(b))


def test_a_scale_may_be_any_tensor_of_one_number(backend):
    options = {"max_grad_norm": 0.1}
    params, shapes = parameters(), ((), (1,), (1, 1))
    optimizers = [ours(ADAMW, copies(params), backend, **options) for _ in shapes]
    give_grads(*optimizers)
    for optimizer, shape in zip(optimizers, shapes, strict=True):
        optimizer.grad_scale = torch.full(shape, 4.0)
        optimizer.found_inf = torch.zeros(shape)
        optimizer.step()
        assert_same(optimizer, optimizers[0], rtol=0, atol=0)


def test_a_skipped_step_zeroes_gradients_too(backend):
    mine = ours(ADAMW, parameters(), backend, zero_grads=True)
    scaler = fusedstep.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    for number in range(3):
        give_grads(mine)
        if number != 2:
            parameters_of(mine)[1].grad.fill_(math.inf)
        scaler.step(mine)
        scaler.update()
        assert not any(p.grad.any() for p in parameters_of(mine))
    assert all(state["step"] == 1 for state in mine.state.values())


def test_the_options_survive_copies_and_stay_out_of_the_state_dict(backend):
    for case in WITH_STATES:
        mine = ours(case, parameters(), backend, max_grad_norm=0.1, zero_grads=True)
        plain = ours(case, copies(parameters_of(mine)), backend)
        assert mine.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
        step(mine)
        for copier in (copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))):
            copied = copier(mine)
            give_grads(mine, copied)
            for optimizer in (mine, copied):
                optimizer.step()
            assert_same(mine, copied, rtol=0, atol=0)
            assert copied.grad_norm == mine.grad_norm


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_grad_norm": -1.0}, ValueError, "Invalid max_grad_norm: -1.0 .it must be 0 or larger"),
        ({"max_grad_norm": math.nan}, ValueError, "Invalid max_grad_norm: nan"),
        ({"max_grad_norm": "1"}, TypeError, "Invalid max_grad_norm: '1' is a str"),
        ({"norm_type": 1}, ValueError, "Invalid norm_type: 1 .it must be 2 or inf"),
        ({"norm_type": "two"}, ValueError, "Invalid norm_type: 'two'"),
        ({"zero_grads": "yes"}, TypeError, "Invalid zero_grads value: 'yes'"),
        ({"error_if_nonfinite": True, "skip_nonfinite": True}, ValueError, "error_if_nonfinite=True and skip_nonfinit"),
        ({"write_grads": True, "zero_grads": True}, ValueError, "write_grads=True and zero_grads=True contradict"),
    ],
    ids=str,
)
def test_bad_options_raise_at_construction(options, error, words):
    with pytest.raises(error, match=words):
        fusedstep.AdamW(parameters(), **options)


def test_a_bad_limit_of_a_step_raises_before_anything_is_written(backend):
    mine = ours(ADAMW, parameters(), backend)
    step(mine)
    give_grads(mine)
    before, called = snapshot(mine), []
    for bad, error in ((-1, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="Invalid max_grad_norm"):
            mine.step(lambda: called.append(1), max_grad_norm=bad)
    assert_untouched(before, mine)
    assert not called


def test_two_ways_of_clipping_contradict_each_other():
    for own in ({"clipvalue": 1.0}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}):
        with pytest.raises(ValueError, match="contradict each other: clip in one way"):
            fusedstep.AdamWeightDecay(parameters(), max_grad_norm=1.0, **own)
    with pytest.raises(ValueError, match="write_grads=True cannot go with clipvalue or clipnorm"):
        fusedstep.AdamWeightDecay(parameters(), clipnorm=1.0, write_grads=True)


@pytest.mark.parametrize("own", ["clipvalue", "clipnorm", "global_clipnorm"])
def test_two_ways_of_clipping_contradict_each_other_in_a_group_and_a_step(own):
    mine = fusedstep.AdamWeightDecay(parameters(), max_grad_norm=1.0)
    words = "it is the norm of all groups together" if "global" in own else "contradict each other: clip in one way"
    with pytest.raises(ValueError, match=words):
        mine.add_param_group({"params": parameters(), own: 1.0})
    assert len(mine.param_groups) == 1
    if own != "global_clipnorm":  # of which a step can have its own
        mine = fusedstep.AdamWeightDecay(parameters(), **{own: 1.0})
        give_grads(mine)
        before = snapshot(mine)
        with pytest.raises(ValueError, match=r"step\(max_grad_norm=0.5\) contradicts .*: clip in one way"):
            mine.step(max_grad_norm=0.5)
        assert_untouched(before, mine)


@each(option=["error_if_nonfinite", "skip_nonfinite"], also=[{}, {"global_clipnorm": 0.5}])
def test_gradients_that_clipping_makes_finite_are_seen_before(option, also, backend):
    mine = fusedstep.AdamWeightDecay(parameters(), clipvalue=0.3, backend=backend, **also, **{option: True})
    plain = fusedstep.AdamWeightDecay(copies(parameters_of(mine)), clipvalue=0.3, backend=backend, **also)
    refused = pytest.raises(RuntimeError, match="is non-finite") if "error" in option else contextlib.nullcontext()
    for _ in range(2):
        give_grads(mine, plain)
        plain.step()
        mine.step()
        give_grads(mine)
        parameters_of(mine)[0].grad[0, 0] = math.inf
        before = snapshot(mine)
        with refused:
            mine.step()
        assert_untouched(before, mine)
    assert_same(mine, plain, rtol=0, atol=0)


@examples(60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), min_size=6),
    limit=st.just(0.0) | st.floats(1e-6, 100),
    inf=st.booleans(),
    power=st.integers(-8, 8),
)
def test_any_gradients_are_clipped_as_torch_clips_them(shapes, dtypes, limit, inf, power):
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes, strict=False)]
    for param in params:
        param.grad = (torch.randn(param.shape, dtype=torch.float64) * 2.0**power).to(param.dtype)
    twins = copies(params)
    for a, b in zip(params, twins, strict=True):
        b.grad = a.grad.clone()
    assume(not inf or all(param.numel() for param in params))  # torch has no such norm of nothing
    norm_type = math.inf if inf else 2.0
    grads = [p.grad.double().clone() for p in params]
    exact = torch.nn.utils.get_total_norm(grads, norm_type)
    factor = (limit / (exact + 1e-6)).clamp(max=1)
    norm = fusedstep.clip_grad_norm_(params, limit, norm_type)
    expected = torch_clip(twins, limit, norm_type)
    assert norm.dtype == expected.dtype
    assert norm.shape == expected.shape
    for param, grad in zip(params, grads, strict=True):
        unit = torch.finfo(param.dtype).eps
        smallest = torch.finfo(param.dtype).smallest_normal * unit
        error = (param.grad.double() - grad * factor).abs()
        assert (error <= 2 * max(unit, 1e-6) * (grad * factor).abs() + smallest).all()


@each(norm_type=[1.0, 2.0, 3, math.inf, "inf"], limit=[0.5, 1e9], foreach=[None, True, False])
def test_clip_grad_norm_is_torchs(norm_type, limit, foreach):
    params = parameters(dtype=torch.float32)
    params[1].grad = None
    twins = copies(params)
    for a, b in zip(params[:1] + params[2:], twins[:1] + twins[2:], strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = fusedstep.clip_grad_norm_(iter(params), limit, norm_type, foreach=foreach)
    torch.testing.assert_close(norm, torch_clip(twins, limit, norm_type, foreach=foreach))
    for a, b in zip(params, twins, strict=True):
        assert a.grad is b.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-6, atol=0)


def test_clip_grad_norm_of_an_empty_generator_says_so():
    with pytest.warns(UserWarning, match="`parameters` is an empty generator") as told:
        assert fusedstep.clip_grad_norm_((p for p in ()), 1.0) == 0
    assert told[0].filename == __file__


def test_clip_grad_norm_scales_a_gradient_as_often_as_it_is_given():
    params = [torch.nn.Parameter(torch.zeros(400_000)), torch.nn.Parameter(torch.zeros(7))]
    for param in params:
        param.grad = torch.randn_like(param)
    first, second = (param.grad.clone() for param in params)
    norm = fusedstep.clip_grad_norm_([params[0], *params, params[0]], 1.0)
    every = torch.cat([first, first, second, first]).double()  # torch's own norm of so many is 2e-6 off
    exact = torch.linalg.vector_norm(every)
    torch.testing.assert_close(norm.double(), exact, rtol=2e-7, atol=0)
    coefficient = (1.0 / (exact + 1e-6)).float()
    assert torch.equal(params[0].grad, first * coefficient * coefficient * coefficient)
    assert torch.equal(params[1].grad, second * coefficient)


def test_clip_grad_norm_of_gradients_that_are_not_plain():
    part = torch.nn.Parameter(torch.zeros(8)[::2])
    part.grad = torch.ones(8)[::2]
    meta = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    meta.grad = torch.ones(3, dtype=torch.complex64)
    for param in (part, meta):
        twin = copies([param])[0]
        twin.grad = param.grad.clone()
        torch.testing.assert_close(fusedstep.clip_grad_norm_(param, 0.5), torch_clip(twin, 0.5))
        torch.testing.assert_close(param.grad, twin.grad)
    assert fusedstep.clip_grad_norm_([], 1.0) == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clip_grad_norm_of_non_finite_gradients(bad):
    params = parameters(dtype=torch.float32)
    for param in params:
        param.grad = torch.randn_like(param)
    params[0].grad[0, 0] = bad
    before = [p.grad.clone() for p in params]
    with pytest.raises(RuntimeError, match=r"The total norm of order 2\.0"):
        fusedstep.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    for param, grad in zip(params, before, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=0, atol=0, equal_nan=True)
    twins = copies(params)
    for a, b in zip(params, twins, strict=True):
        b.grad = a.grad.clone()
    versions = [p.grad._version for p in params]
    fusedstep.clip_grad_norm_(params, 1.0)
    torch_clip(twins, 1.0)
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad, equal_nan=True)
    assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))


def test_every_backend_takes_a_norm():
    for name, made in backends.BACKENDS.items():
        assert callable(made.norm), name
