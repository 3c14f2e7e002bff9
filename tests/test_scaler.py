"""fusedstep.GradScaler, whose finite check is part of the step, judged by torch.amp.GradScaler."""

import math

import pytest
import torch
from support import (
    ADAMW,
    ELEMENTWISE,
    MOMENTUM,
    SHAPES,
    assert_same,
    assert_untouched,
    copies,
    each,
    give_grads,
    normal,
    ours,
    pair,
    parameters,
    parameters_of,
    snapshot,
    theirs,
)
from torch.amp.grad_scaler import OptState

import fusedstep


def scalers(scale=1024.0, **options):
    options = {"init_scale": scale, "growth_interval": 2, **options}
    return fusedstep.GradScaler("cpu", **options), torch.amp.GradScaler("cpu", **options)


def give_scaled_grads(number, when, *pairs):
    """The same scaled gradients to the optimizer of each (scaler, optimizer); not finite in the steps ``when``."""
    grads = [normal(*p.shape) for p in parameters_of(pairs[0][1])]
    for scaler, optimizer in pairs:
        factor = scaler.scale(torch.ones((), dtype=torch.float64))
        for index, (param, grad) in enumerate(zip(parameters_of(optimizer), grads, strict=True)):
            param.grad = (grad * factor).to(param.dtype)
            if number in when and index == number % len(grads):
                param.grad.reshape(-1)[0] = (math.inf, -math.inf, math.nan)[number % 3]


@each(case=ELEMENTWISE, when=[(), (0,), (0, 1, 4), (2,), (1, 3, 5)], limit=[None, 0.5])
def test_unscale_check_clip_and_step_are_torchs_four_calls(case, backend, when, limit):
    mine = ours(case, parameters(), backend, max_grad_norm=limit)
    expected = theirs(case, copies(parameters_of(mine)))
    scaler, torchs = scalers()
    for number in range(7):
        give_scaled_grads(number, when, (scaler, mine), (torchs, expected))
        before, versions = snapshot(mine), [p._version for p in parameters_of(mine)]
        grads = [p.grad.clone() for p in parameters_of(mine)]
        scaler.step(mine)
        torchs.unscale_(expected)
        if limit is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters_of(expected), limit)
            torch.testing.assert_close(mine.grad_norm, norm, equal_nan=True, rtol=1e-9, atol=0)
        torchs.step(expected)
        if number in when:
            assert_untouched(before, mine)
            assert versions == [p._version for p in parameters_of(mine)]
        for param, grad in zip(parameters_of(mine), grads, strict=True):
            torch.testing.assert_close(param.grad, grad, rtol=0, atol=0, equal_nan=True)
        scaler.update()
        torchs.update()
        assert scaler.state_dict() == torchs.state_dict()
        assert_same(mine, expected, rtol=1e-9, atol=1e-10)
    assert not hasattr(mine, "grad_scale")
    assert not hasattr(mine, "found_inf")


@each(dtype=[torch.float32, torch.bfloat16, torch.float16], unscale=[False, True])
def test_the_step_has_the_bits_of_one_that_is_told_scale_and_finding(dtype, unscale, backend):
    """torch's scaler refuses to unscale fp16 gradients."""
    if unscale and dtype == torch.float16:
        dtype = torch.float64
    mine = ours(ADAMW, parameters(dtype=dtype), backend)
    other = ours(ADAMW, copies(parameters_of(mine)), backend)
    scaler, torchs = scalers(3.3)
    for number in range(5):
        give_scaled_grads(number, (1, 2), (scaler, mine), (torchs, other))
        if unscale:
            scaler.unscale_(mine)
            torchs.unscale_(other)
        else:
            other.grad_scale = torch.tensor(torchs.get_scale())
            torchs._check_inf_per_device(other)
        other.found_inf = torch.tensor(float(number in (1, 2)))
        other.step()
        del other.found_inf
        other.__dict__.pop("grad_scale", None)
        scaler.step(mine)
        scaler.update()
        torchs.update()
        assert scaler.get_scale() == torchs.get_scale()
    assert_same(mine, other, rtol=0, atol=0)


def test_a_skipped_step_is_seen_by_the_scale(backend):
    """As the docstring says; the optimizer's step is called in any case, once."""
    mine = ours(ADAMW, parameters(), backend)
    scaler = fusedstep.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    calls = []
    mine.register_step_post_hook(lambda *_: calls.append("step"))
    for number in range(7):
        give_scaled_grads(number, (0, 3), (scaler, mine))
        before = scaler.get_scale()
        scaler.step(mine)
        scaler.update()
        assert (scaler.get_scale() < before) == (number in (0, 3))
    assert calls == ["step"] * 7
    assert not getattr(mine, "_step_supports_amp_scaling", False)


def test_several_optimizers_share_a_scaler_and_one_of_them_skips(backend):
    pairs = [pair(ADAMW, backend), pair(MOMENTUM, backend)]
    scaler, torchs = scalers()
    for number in range(6):
        for index, (mine, expected) in enumerate(pairs):
            give_scaled_grads(number, (index, index + 2), (scaler, mine), (torchs, expected))
            scaler.step(mine)
            torchs.step(expected)
        scaler.update()
        torchs.update()
        assert scaler.state_dict() == torchs.state_dict()
    for optimizers in pairs:
        assert_same(*optimizers, rtol=1e-9, atol=1e-10)


def test_an_optimizer_of_torchs_on_the_same_scaler(backend):
    mine, expected = pair(ADAMW, backend)
    scaler, _ = scalers()
    for number in range(4):
        give_scaled_grads(number, (1,), (scaler, mine), (scaler, expected))
        scaler.step(mine)
        scaler.step(expected)
        scaler.update()
        assert_same(mine, expected, rtol=1e-9, atol=1e-10)
    assert scaler.get_scale() == 1024.0  # grown once, halved once


def test_unscale_beforehand(backend):
    mine, expected = pair(ADAMW, backend)
    scaler, torchs = scalers(3.0)
    for number in range(4):
        give_scaled_grads(number, (1,), (scaler, mine), (torchs, expected))
        for a, b in ((scaler, mine), (torchs, expected)):
            a.unscale_(b)
            torch.nn.utils.clip_grad_norm_(parameters_of(b), 0.1)
            a.step(b)
            a.update()
        assert_same(mine, expected, rtol=1e-9, atol=1e-10)
    assert scaler.state_dict() == torchs.state_dict()


def test_unscale_beforehand_and_clip_in_the_step(backend):
    mine = ours(ADAMW, parameters(), backend, max_grad_norm=0.1)
    expected = theirs(ADAMW, copies(parameters_of(mine)))
    for kind in (0, 1):
        scaler, torchs = scalers(3.0)[kind], scalers(3.0)[1]
        for number in range(3):
            give_scaled_grads(number, (1,), (scaler, mine), (torchs, expected))
            scaler.unscale_(mine)
            scaler.step(mine)
            scaler.update()
            torchs.unscale_(expected)
            torch.nn.utils.clip_grad_norm_(parameters_of(expected), 0.1)
            torchs.step(expected)
            torchs.update()
            assert_same(mine, expected, rtol=1e-9, atol=1e-10)


def test_state_dicts_are_torchs():
    scaler, torchs = scalers(2.0)
    for a in (scaler, torchs):
        a.scale(torch.ones(()))
    torchs.load_state_dict({**scaler.state_dict(), "scale": 8.0, "_growth_tracker": 1})
    scaler.load_state_dict(torchs.state_dict())
    assert scaler.get_scale() == 8.0
    assert scaler.state_dict() == torchs.state_dict()


def test_misuse_raises_torchs_errors(backend):
    mine = ours(ADAMW, parameters(), backend)
    scaler, _ = scalers()
    give_grads(mine)
    with pytest.raises(AssertionError, match="Attempted step but _scale is None"):
        scaler.step(mine)
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(mine, closure=lambda: None)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()
    scaler.step(mine)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(mine)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(mine)


def test_no_gradients(backend):
    mine = ours(ADAMW, parameters(), backend)
    scaler, _ = scalers()
    scaler.scale(torch.ones(()))
    scaler.step(mine)
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()


def test_a_step_that_raises_leaves_the_scaler_ready(backend):
    mine = ours(ADAMW, parameters(), backend)
    scaler, _ = scalers()
    scaler.scale(torch.ones(()))
    give_grads(mine)
    parameters_of(mine)[1].grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1).double(), SHAPES[1], check_invariants=True
    )
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        scaler.step(mine)
    assert not hasattr(mine, "grad_scale")
    assert not hasattr(mine, "found_inf")
    assert scaler._per_optimizer_states[id(mine)]["stage"] is OptState.READY
    give_grads(mine)
    scaler.step(mine)
    assert all(state["step"] == 1 for state in mine.state.values())


def test_a_disabled_scaler(backend):
    mine, expected = pair(ADAMW, backend)
    scaler = fusedstep.GradScaler("cpu", enabled=False)
    for _ in range(2):
        give_grads(mine, expected)
        scaler.step(mine)
        expected.step()
        scaler.update()
    assert_same(mine, expected)


def test_clipping_that_works_on_copies_is_checked_beforehand(backend):
    """Clamped gradients are finite where the gradients are not."""
    mine = fusedstep.AdamWeightDecay(parameters(), 0.1, clipvalue=0.3, backend=backend)
    scaler, _ = scalers()
    for number in range(3):
        give_scaled_grads(number, (0,), (scaler, mine))
        before = snapshot(mine)
        scaler.step(mine)
        scaler.update()
        if number == 0:
            assert_untouched(before, mine)
    assert all(state["step"] == 2 for state in mine.state.values())


def test_error_if_nonfinite_leaves_skipping_to_the_scaler(backend):
    """As with unscale_, clip and step one after the other, where only the scaler's own answer would come too late."""
    mine = ours(ADAMW, parameters(), backend, max_grad_norm=1.0, error_if_nonfinite=True)
    scaler, _ = scalers()
    for number in range(4):
        give_scaled_grads(number, (0, 2), (scaler, mine))
        scaler.step(mine)
        scaler.update()
    assert all(state["step"] == 2 for state in mine.state.values())


@pytest.mark.parametrize("first", [False, True])
def test_the_norm_of_a_skipped_step_is_its_own(first, backend):
    mine = ours(ADAMW, parameters(), backend, max_grad_norm=1.0)
    scaler = fusedstep.GradScaler("cpu", init_scale=4.0)
    for number in range(int(first), 3):
        give_scaled_grads(number, (1,), (scaler, mine))
        scaler.step(mine)
        scaler.update()
        assert mine.grad_norm.isfinite() == (number != 1)


def test_the_scale_of_the_user_besides(backend):
    mine, expected = pair(ADAMW, backend)
    scaler, _ = scalers(4.0)
    scaler.scale(torch.ones(()))
    give_grads(mine, expected)
    for param in parameters_of(mine):
        param.grad.mul_(12.0)
    mine.grad_scale = torch.tensor(3.0)
    scaler.step(mine)
    expected.step()
    assert_same(mine, expected)


def test_training_in_half_precision(backend):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    mine = fusedstep.AdamW(model.parameters(), 0.02, max_grad_norm=1.0, zero_grads=True, backend=backend)
    scaler = fusedstep.GradScaler("cpu", init_scale=2.0**40)
    x = torch.randn(64, 8)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(80):
        with torch.autocast("cpu", torch.float16):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(mine)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert scaler.get_scale() < 2.0**40
    steps = {state["step"].item() for state in mine.state.values()}
    assert 40 < steps.pop() < 80
    assert not steps
