"""What surrounds a step: learning rates as tensors, schedulers, closures, hooks, profiler, compiler."""

import warnings

import pytest
import torch
from support import (
    ADAMW,
    BY_KIND,
    EXACT,
    MOMENTUM,
    assert_same,
    by_one_kind,
    copies,
    each,
    few,
    give_grads,
    ours,
    pair,
    parameters,
    parameters_of,
    step,
    theirs,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedstep

# Options as tensors.


@each(
    case=BY_KIND,
    make={
        "0-d": lambda: torch.tensor(0.05),
        "one element": lambda: torch.tensor([0.05]),
        "fp64": lambda: torch.tensor(0.05, dtype=torch.float64),
    },
)
def test_lr_as_a_tensor_that_changes(case, backend, make):
    """The user writes into it; several groups share it. Judged by torch with numbers."""
    params = parameters()
    lr = make()
    mine = ours(case, [{"params": params[:2]}, {"params": params[2:]}], backend, lr=lr)
    expected = theirs(case, copies(params), lr=lr.item())
    for number in range(5):
        lr.fill_(0.05 / (number + 1))
        expected.param_groups[0]["lr"] = lr.item()
        step(mine, expected)
        assert lr.item() == expected.param_groups[0]["lr"]
        assert all(group["lr"] is lr for group in mine.param_groups)
    for a, b in zip(*map(parameters_of, (mine, expected)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_lr_that_requires_grad(backend):
    lr = torch.tensor(0.1, requires_grad=True)
    mine, expected = pair(ADAMW, backend)
    mine.param_groups[0]["lr"] = lr
    expected.param_groups[0]["lr"] = lr.item()
    step(mine, expected)
    assert_same(mine, expected)


def test_betas_as_tensors(backend):
    betas = torch.tensor(0.7, dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    mine = ours(ADAMW, parameters(), backend, betas=betas)
    expected = theirs(ADAMW, copies(parameters_of(mine)), betas=(0.7, 0.8))
    for _ in range(3):
        step(mine, expected)
    assert_same(mine, expected)


# Schedulers.

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, total_iters=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=9, cycle_momentum=True),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=3, cycle_momentum=True),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.5, anneal_epochs=3),
}


# Each sets a learning rate, some on the way to another scheduler's, and the last two the momentum too.
FEW = few(SCHEDULERS, "StepLR", "SWALR", "ChainedScheduler", "SequentialLR", "OneCycleLR", "CyclicLR")


@each(name=FEW.keys(), case=[MOMENTUM, ADAMW], tensor_lr=[False, True])
def test_schedulers(name, case, backend, tensor_lr):
    optimizers = pair(case, backend)
    if tensor_lr:
        for optimizer in optimizers:
            lr = optimizer.param_groups[0]["lr"]
            optimizer.param_groups[0]["lr"] = torch.tensor(lr, dtype=torch.float64)
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    seen = set()
    for _ in range(8):
        step(*optimizers)
        for scheduler in schedulers:
            scheduler.step()
        seen.add(float(optimizers[0].param_groups[0]["lr"]))
        assert_same(*optimizers)
    assert len(seen) > 1


def test_reduce_lr_on_plateau(backend):
    optimizers = pair(ADAMW, backend)
    schedulers = [lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1) for o in optimizers]
    for _ in range(8):
        step(*optimizers)
        for scheduler in schedulers:
            scheduler.step(1.0)
    assert_same(*optimizers)
    assert optimizers[0].param_groups[0]["lr"] < 0.002


def test_a_scheduler_before_the_first_step_is_noticed(backend):
    mine = ours(ADAMW, parameters(), backend)
    scheduler = lr_scheduler.StepLR(mine, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step\\(\\)`"):
        scheduler.step()
    other = ours(ADAMW, parameters(), backend)
    scheduler = lr_scheduler.StepLR(other, 1)
    step(other)
    scheduler.step()


def test_weights_averaged_beside_the_optimizer(backend):
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    average = torch.optim.swa_utils.AveragedModel(model)
    mine = ours(ADAMW, model.parameters(), backend)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for _ in range(4):
        step(mine)
        average.update_parameters(model)
        sums += model.weight.detach()
    torch.testing.assert_close(average.module.weight.detach(), sums / 4, **EXACT)


# Closures.


@by_one_kind
def test_closure(case, backend):
    optimizers = pair(case, backend)
    for _ in range(3):
        for optimizer in optimizers:
            calls = []

            def closure(optimizer=optimizer, calls=calls):
                calls.append(torch.is_grad_enabled())
                optimizer.zero_grad()
                loss = sum((p**2).sum() for p in parameters_of(optimizer))
                loss.backward()
                return loss

            with torch.no_grad():
                loss = optimizer.step(closure)
            assert calls == [True]
            assert loss.requires_grad
            loss = optimizer.step(closure=closure)
            assert calls == [True, True]
        assert_same(*optimizers)


def test_an_error_in_the_closure(backend):
    mine = ours(ADAMW, parameters(), backend)
    step(mine)

    def closure():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mine.step(closure)
    assert torch.is_grad_enabled()
    assert all(state["step"] == 1 for state in mine.state.values())


# Hooks.


def hooked(optimizer, log):
    """All kinds of hooks on one optimizer; returns what is to be removed again."""

    def note(name):
        return lambda opt, args, kwargs: log.append((name, opt is optimizer, args[0] is optimizer, len(args), kwargs))

    return [
        optimizer.register_step_pre_hook(note("pre 1")),
        optimizer.register_step_post_hook(note("post 1")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre 2")),
        optimizer.register_step_post_hook(note("post 2")),
    ]


@by_one_kind
def test_hooks_run_in_torchs_order(case, backend):
    logs = []
    optimizers = pair(case, backend)
    give_grads(*optimizers)
    for optimizer in optimizers:
        log = []
        handles = hooked(optimizer, log)
        try:
            optimizer.step()
            assert optimizer.step(lambda: 3) == 3
        finally:
            for handle in handles:
                handle.remove()
        count = len(log)
        assert count == 12
        optimizer.step()
        assert len(log) == count
        logs.append(log)
    assert logs[0] == logs[1]
    assert_same(*optimizers)


def test_a_hook_may_replace_the_arguments(backend):
    optimizers = pair(ADAMW, backend)
    for optimizer in optimizers:
        give_grads(optimizer)
        handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o,), {"closure": lambda: 7}))
        assert optimizer.step() == 7
        handle.remove()
        optimizer.register_step_pre_hook(lambda o, args, kwargs: 5)
        with pytest.raises(RuntimeError, match="must return None or a tuple of \\(new_args, new_kwargs\\), but got 5"):
            optimizer.step()


def test_a_pre_hook_may_change_gradients_and_groups(backend):
    optimizers = pair(ADAMW, backend)

    def clip(optimizer, args, kwargs):
        torch.nn.utils.clip_grad_value_(parameters_of(optimizer), 0.01)
        optimizer.param_groups[0]["lr"] *= 0.5
        parameters_of(optimizer)[1].grad = None

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(clip)
    for _ in range(3):
        step(*optimizers)
        assert_same(*optimizers)


def test_a_subclass_with_a_step_of_its_own(backend):
    """As some libraries do; hooks and schedulers work on it too."""

    class Mine(fusedstep.AdamW):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    mine = Mine(parameters(), backend=backend, **ADAMW.options)
    expected = theirs(ADAMW, copies(parameters_of(mine)))
    schedulers = [lr_scheduler.StepLR(o, 1, 0.5) for o in (mine, expected)]
    for _ in range(3):
        step(mine, expected)
        for scheduler in schedulers:
            scheduler.step()
    assert mine.calls == 3
    assert_same(mine, expected, **EXACT)


def test_a_step_in_the_backward_pass(backend):
    """Each parameter's optimizer steps as soon as its gradient is there, and lets the gradient go."""
    models = [torch.nn.Linear(4, 4, dtype=torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    makes = (lambda p: ours(ADAMW, [p], backend), lambda p: theirs(ADAMW, [p]))
    for model, make in zip(models, makes, strict=True):
        optimizers = {param: make(param) for param in model.parameters()}

        def hook(param, optimizers=optimizers):
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(hook)
    x = torch.randn(3, 4, dtype=torch.float64)
    for _ in range(3):
        for model in models:
            model(x).square().mean().backward()
            assert all(param.grad is None for param in model.parameters())
    torch.testing.assert_close(models[0].weight, models[1].weight, **EXACT)


# Profiler.


def ranges(optimizer):
    with torch.profiler.profile() as profile:
        step(optimizer)
        optimizer.zero_grad()
    return sorted(event.key for event in profile.key_averages() if event.key.startswith("Optimizer."))


@pytest.mark.filterwarnings("ignore::UserWarning:torch.profiler")
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_a_profiler_sees_the_step_under_torchs_name(backend):
    optimizers = pair(ADAMW, backend)
    assert ranges(optimizers[0]) == ranges(optimizers[1])
    assert "Optimizer.step#AdamW.step" in ranges(optimizers[0])


def test_no_range_is_opened_without_a_profiler(backend, monkeypatch):
    mine = ours(ADAMW, parameters(), backend)

    def opened(*_):
        raise AssertionError("a range was opened")

    step(mine)
    give_grads(mine)
    monkeypatch.setattr(torch.autograd.profiler, "record_function", opened)
    mine.step()
    mine.register_step_pre_hook(lambda *_: None)
    mine.step()


# Compiler.


@by_one_kind
def test_inside_a_compiled_training_step(case, backend):
    torch.compiler.reset()
    mine, expected = pair(case, backend)
    scheduler = [lr_scheduler.ExponentialLR(o, 0.9) for o in (mine, expected)]

    def train(optimizer, params):
        optimizer.zero_grad()
        sum((p**2).sum() for p in params).backward()
        optimizer.step()

    compiled = torch.compile(train, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(torch.jit|The .grad attribute|isinstance\\(treespec)")
        for _ in range(4):
            compiled(mine, parameters_of(mine))
            train(expected, parameters_of(expected))
            for s in scheduler:
                s.step()
    torch.compiler.reset()
    assert_same(mine, expected)


@pytest.mark.parametrize(
    "mode", [lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16)], ids=["device", "autocast"]
)
def test_modes_of_torch_do_not_reach_the_step(backend, mode):
    """States and counters are on the parameter's device and in its dtype, whatever the defaults say."""
    optimizers = pair(ADAMW, backend)
    for _ in range(2):
        give_grads(*optimizers)
        with mode():
            optimizers[0].step()
        optimizers[1].step()
    assert_same(*optimizers)


def test_float64_as_the_default_dtype(backend):
    torch.set_default_dtype(torch.float64)
    try:
        optimizers = pair(ADAMW, backend)
        for _ in range(2):
            step(*optimizers)
        for a, b in zip(*map(parameters_of, optimizers), strict=True):
            torch.testing.assert_close(a, b, **EXACT)
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        step(*optimizers[1:])
    finally:
        torch.set_default_dtype(torch.float32)
