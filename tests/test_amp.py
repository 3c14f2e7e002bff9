"""torch.amp.GradScaler: scaled training is the unscaled one, and a skipped step changes nothing."""

import copy

import pytest
import torch
from support import (
    ADAMW,
    BY_KIND,
    ELEMENTWISE,
    IN_ENGINES,
    MOMENTUM,
    assert_same,
    assert_untouched,
    by_kind_in_engines,
    by_kind_of_state,
    copies,
    each,
    give_grads,
    ours,
    pair,
    parameters,
    parameters_of,
    snapshot,
    step,
)

from fusedstep.cases import CASES


def scaler(scale=1024.0, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def backward(scaler, *optimizers, bad=()):
    """Scaled gradients of the same loss for each; infinite for the parameters in ``bad``."""
    for index, params in enumerate(zip(*map(parameters_of, optimizers), strict=True)):
        weight = torch.randn(params[0].shape, dtype=torch.float64)
        for param in params:
            param.grad = None
            scaler.scale((param * weight).sum()).backward()
            if index in bad:
                param.grad.reshape(-1)[0] = float("inf") if index % 2 else float("nan")


@each(case=BY_KIND, scale=[1.0, 1024.0, 3.7, 1e-3])
def test_scaled_training_is_torchs_and_leaves_unscaled_gradients(case, backend, scale):
    mine, expected = pair(case, backend)
    scale = scaler(scale, growth_interval=2, growth_factor=1.5)
    for _ in range(6):
        give_grads(mine, expected)
        factor = scale.scale(torch.ones((), dtype=torch.float64))
        unscaled = [p.grad.clone() for p in parameters_of(mine)]
        for optimizer in (mine, expected):
            for param in parameters_of(optimizer):
                param.grad.mul_(factor)
            scale.step(optimizer)
        for param, grad in zip(parameters_of(mine), unscaled, strict=True):
            torch.testing.assert_close(param.grad, grad, rtol=1e-7, atol=0)
        scale.update()
    assert_same(mine, expected)
    assert not hasattr(mine, "grad_scale")
    assert not hasattr(mine, "found_inf")


@each(case=ELEMENTWISE, when=[(0,), (0, 1, 4), (2,), (1, 3, 5)])
def test_a_skipped_step_changes_nothing(case, backend, when):
    """Judged by torch.optim, whose step the scaler does not even call then."""
    mine, expected = pair(case, backend)
    scale = scaler()
    for number in range(6):
        bad = (number % 4,) if number in when else ()
        backward(scale, mine, bad=bad)
        for a, b in zip(*map(parameters_of, (mine, expected)), strict=True):
            b.grad = a.grad / scale.get_scale()
        before, versions = snapshot(mine), [p._version for p in parameters_of(mine)]
        scale.step(mine)
        if bad:
            assert_untouched(before, mine)
            assert versions == [p._version for p in parameters_of(mine)]
        else:
            expected.step()
        scale.update()
        assert_same(mine, expected)
    assert scale.get_scale() == 1024.0 * 0.5 ** len(when)


@by_kind_of_state
def test_only_skipped_steps_leave_no_trace_in_the_state_dict(case, backend):
    mine, expected = pair(case, backend)
    fresh = copy.deepcopy(mine.state_dict()["state"])  # only some have states from the start
    scale = scaler()
    for _ in range(3):
        backward(scale, mine, bad=(1,))
        scale.step(mine)
        scale.update()
    torch.testing.assert_close(mine.state_dict()["state"], fresh, rtol=0, atol=0)
    other = ours(case, copies(parameters_of(mine)), backend)
    other.load_state_dict(mine.state_dict())
    step(other, expected)
    assert_same(other, expected)


@by_kind_in_engines
def test_unscale_and_clip(case, backend):
    mine, expected = pair(case, backend)
    scale = scaler(3.0)
    for number in range(4):
        backward(scale, mine, expected, bad=(2,) if number == 1 else ())
        for optimizer in (mine, expected):
            scale.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), 0.1)
            scale.step(optimizer)
        scale.update()
        assert_same(mine, expected)


def test_several_optimizers_and_one_of_them_skips(backend):
    pairs = [pair(ADAMW, backend), pair(MOMENTUM, backend)]
    scale = scaler()
    for number in range(5):
        for index, optimizers in enumerate(pairs):
            backward(scale, *optimizers, bad=(0,) if number % 2 == index else ())
            for optimizer in optimizers:
                scale.step(optimizer)
        scale.update()
    for optimizers in pairs:
        assert_same(*optimizers)


def test_a_scale_of_the_users_own(backend):
    """GradScaler multiplies its scale with an attribute that the user may have set, as torch documents."""
    mine, expected = pair(ADAMW, backend)
    for _ in range(3):
        give_grads(mine, expected)
        for param in parameters_of(mine):
            param.grad.mul_(6.0)
        mine.grad_scale = torch.tensor(6.0)
        mine.step()
        del mine.grad_scale
        expected.step()
    assert_same(mine, expected)


@pytest.mark.parametrize("found", [0.0, 1.0, 2.0])
def test_found_inf_by_hand(backend, found):
    mine = ours(ADAMW, parameters(), backend)
    give_grads(mine)
    before = snapshot(mine)
    mine.found_inf = torch.tensor([found])
    mine.step()
    if found:
        assert_untouched(before, mine)
    else:
        assert all(state["step"] == 1 for state in mine.state.values())


def observe(optimizer, dtype):
    """What a caller can see of steps under torch's scaler, of which two overflow and one has no gradients."""
    seen, grads = [], []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which notes on the optimizer whether it made a step
    scale = scaler(4.0, growth_interval=2)
    generator = torch.Generator().manual_seed(1)
    for number in range(6):
        for param in parameters_of(optimizer):
            grad = torch.randn(param.shape, generator=generator).to(dtype)
            param.grad = None if number == 5 else scale.scale(grad / (number not in (0, 3))).to(dtype)
        try:
            seen.append(scale.step(optimizer))
            scale.update()
        except (AssertionError, ValueError) as error:
            seen.append((type(error), str(error)))
            scale._per_optimizer_states.clear()
        seen += [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf", "_opt_called")]
        seen.append(scale.get_scale())
        grads += [param.grad for param in parameters_of(optimizer) if number != 5]
    return seen, grads


@each(case=IN_ENGINES, dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_torchs_scaler_sees_an_optimizer_of_torchs(case, backend, dtype):
    """Hooks, gradients, the scale, errors (torch refuses fp16 gradients), and what schedulers go by."""
    params = parameters(dtype=dtype)
    seen, grads = observe(ours(case, params, backend), dtype)
    others = observe(torch.optim.SGD(copies(params), 0.1, foreach=False), dtype)
    assert seen == others[0]
    torch.testing.assert_close(grads, others[1], rtol=0, atol=0, equal_nan=True)
    assert seen.count("before") == (0 if dtype == torch.float16 else 3)


def test_an_optimizer_leaves_unscaling_to_the_caller(backend):
    """Lightning, for one, clips by gradient norm only then; it asks for this attribute."""
    assert not getattr(ours(ADAMW, parameters(), backend), "_step_supports_amp_scaling", False)


def test_accelerate_sees_a_skipped_step(backend):
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    mine = ours(ADAMW, parameters(), backend)
    scale = scaler(4.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(mine, device_placement=False, scaler=scale)
    for number in range(4):
        backward(scale, mine, bad=(1,) if number in (0, 2) else ())
        wrapped.step()
        assert wrapped.step_was_skipped == (number in (0, 2))


def test_a_disabled_scaler(backend):
    mine, expected = pair(ADAMW, backend)
    scale = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(2):
        give_grads(mine, expected)
        scale.step(mine)
        expected.step()
        scale.update()
    assert_same(mine, expected)


@each(case=BY_KIND, dtype=[torch.float32, torch.float16, torch.bfloat16])
def test_both_backends_unscale_to_the_same_bits(case, dtype):
    params = parameters(dtype=dtype)
    optimizers = ours(case, params, "cpu"), ours(case, copies(params), "reference")
    for _ in range(4):
        give_grads(*optimizers)
        for optimizer in optimizers:
            optimizer.grad_scale = torch.tensor(3.3)
            optimizer.step()
    assert_same(*optimizers, rtol=0, atol=0)


def test_training_in_half_precision_as_users_do(backend):
    """Autocast, a scaler that starts far too high, and a schedule: the loss goes down and no NaN enters."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    mine = ours(CASES[8], model.parameters(), backend)
    scale = scaler(2.0**40)
    x = torch.randn(64, 8)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(60):
        mine.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        scale.scale(loss).backward()
        scale.step(mine)
        scale.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert scale.get_scale() < 2.0**40
    steps = {state["step"].item() for state in mine.state.values()}
    assert len(steps) == 1
    assert 30 < steps.pop() < 60
