"""torch.utils.swap_tensors, which exchanges what is behind two Python tensors: no step keeps a hand on that."""

import gc
import math

import pytest
import torch
from kinds import OF_EACH_KIND, each, few
from support import ADAMW, MOMENTUM, ours, parameters_of

import fusedstep
from fusedstep.verification import same_bits

pytestmark = pytest.mark.plans

KEPT = {
    "plain": {},
    "averaged": {"ema_decay": 0.5, "weights_copy": torch.bfloat16, "zero_grads": True},
    "clipped": {"max_grad_norm": 1.0, "write_grads": True},
    "master": {"master_weights": True, "ema_decay": 0.5},
    "8bit": {"state_dtype": "8bit", "kahan": True},
}


@pytest.fixture(autouse=True)
def _by_swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def weight(value, *shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.full(shape or (2,), value, dtype=dtype))


def step(optimizer, grad=1.0):
    for param in parameters_of(optimizer):
        param.grad = torch.full_like(param, grad)
    optimizer.step()


@pytest.mark.parametrize("times", [1, 3])  # a gradient is held in the first step, and borrowed later
def test_each_of_two_weights_that_were_swapped_is_where_it_says(engine, times):
    optimizer = fusedstep.SGD([p := weight(1.0)], lr=0.25, backend=engine)
    for _ in range(times):
        step(optimizer)
    q = weight(5.0)
    torch.utils.swap_tensors(p, q)
    step(optimizer)
    assert (p.tolist(), q.tolist()) == ([4.75] * 2, [1.0 - 0.25 * times] * 2)
    torch.utils.swap_tensors(p, q)
    step(optimizer)
    assert (p.tolist(), q.tolist()) == ([0.75 - 0.25 * times] * 2, [4.75] * 2)


def test_what_was_swapped_away_may_be_gone_and_its_memory_in_use(engine):
    optimizer = fusedstep.SGD([p := weight(1.0, 1000)], lr=0.25, backend=engine)
    for number in range(4):
        step(optimizer)
        step(optimizer)
        before = p.detach().clone()
        q = weight(float(number), 1000)
        torch.utils.swap_tensors(p, q)
        assert torch.equal(q.detach(), before)
        del q
        gc.collect()
        others = [torch.full((1000,), 7.0) for _ in range(8)]
        step(optimizer)
        assert p.tolist() == [number - 0.25] * 1000
        assert all((other == 7.0).all() for other in others)


def test_a_state_may_be_swapped(engine):
    optimizers = [ours(MOMENTUM, [weight(1.0)], engine) for _ in range(2)]
    for number in range(4):
        for optimizer in optimizers:
            step(optimizer)
        if number % 2 == 0:
            state = optimizers[0].state[parameters_of(optimizers[0])[0]]
            other = state["momentum_buffer"].clone()
            torch.utils.swap_tensors(state["momentum_buffer"], other)
            other.fill_(math.nan)
    assert same_bits(*(parameters_of(optimizer)[0].detach() for optimizer in optimizers))


@each(kept=few(KEPT, "averaged", "clipped", "master", "8bit"))
def test_a_step_leaves_no_reference_that_torch_counts(engine, kept):
    dtype = torch.bfloat16 if {"master_weights", "kahan"} & kept.keys() else torch.float32
    check_references(ours(ADAMW, [weight(1.0, 64, 65, dtype=dtype), weight(1.0, 5, dtype=dtype)], engine, **kept))


@pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)
def test_no_kind_of_rule_leaves_a_reference(backend, case):
    check_references(ours(case, [weight(1.0, 4, 6), weight(1.0, 5)], backend))


def check_references(optimizer):
    params = [param for param in parameters_of(optimizer) if param.is_leaf]
    for _ in range(3):
        grads = [torch.full_like(param, 0.5) for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        for param, grad in zip(params, grads, strict=True):
            kept = {"weight": param, "copy": optimizer.stepper.kept.copy.beside.get(param), **optimizer.state[param]}
            kept["counter"] = optimizer.stepper.kept.step.beside.get(param)
            for name, tensor in kept.items():
                assert not isinstance(tensor, torch.Tensor) or tensor._use_count() == 1, name
            assert grad._use_count() == 2  # its parameter's
            param.grad = None
            assert grad._use_count() == 1


@pytest.mark.parametrize("cast", [torch.nn.Module.double, torch.nn.Module.bfloat16], ids=["double", "bfloat16"])
def test_a_module_may_be_converted_and_loaded_between_steps(engine, cast):
    def train(swap):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        optimizer = fusedstep.SGD(model.parameters(), lr=0.5, momentum=0.5, backend=engine)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for number in range(6):
            model(torch.ones(4, 3, dtype=model.weight.dtype)).float().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == 1:
                cast(model)
            if number == 3:
                model.load_state_dict(state)
        return model

    for a, b in zip(train(True).parameters(), train(False).parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
