"""A parameter that the user takes out of its group is kept alive by nothing, and neither is what belonged to it."""

import gc
import weakref

import torch
from kinds import each
from support import ours

import fusedstep
from fusedstep.cases import CASES

CLASSES = {case.optimizer: case for case in CASES}
OPTIONS = {
    "plain": {},
    "copy": {"weights_copy": torch.bfloat16},
    "average": {"ema_decay": 0.9},
    "clipped": {"max_grad_norm": 1.0, "zero_grads": True},
}


def new():
    return torch.nn.Parameter(torch.ones(4, 3))


def step(optimizer, accumulator=None):
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    if accumulator is not None:
        accumulator()
        accumulator.assign()
    optimizer.step()
    if accumulator is not None:
        accumulator.reset()


def replace(optimizer):
    """A new parameter in the place of the second one; references to that one, its gradient, states and copy."""
    params = optimizer.param_groups[0]["params"]
    kept = [params[1], params[1].grad, *optimizer.state.pop(params[1], {}).values()]
    if optimizer.stepper.options["weights_copy"]:
        kept.append(optimizer.copies[params[1]])
    params[1] = new()
    return [weakref.ref(each) for each in kept if isinstance(each, torch.Tensor)]


def assert_freed(references):
    if any(reference() is not None for reference in references):  # it takes longer than everything else here
        gc.collect()
    assert not any(reference() is not None for reference in references)


@each(name=CLASSES.keys(), options=OPTIONS)
def test_an_optimizer_keeps_nothing_of_a_replaced_parameter(name, options, backend):
    optimizer = ours(CLASSES[name], [new(), new()], backend, **options)
    step(optimizer)
    step(optimizer)
    references = replace(optimizer)
    step(optimizer)
    assert_freed(references)
    assert set(optimizer.state) | set(optimizer.stepper.kept.step.beside) == set(optimizer.param_groups[0]["params"])


@each(make=[fusedstep.SGD, fusedstep.AdamW, torch.optim.AdamW], set_to_none=[True, False], again=[True, False])
def test_an_accumulator_keeps_nothing_of_a_replaced_parameter(make, set_to_none, again, backend):
    """A step of ours tells it; of an optimizer of torch's it sees the change in its next call."""
    options = {} if make is torch.optim.AdamW else {"backend": backend}
    optimizer = make([new(), new()], lr=0.1, **options)
    accumulator = fusedstep.GradientAccumulator(optimizer, set_to_none=set_to_none)
    step(optimizer, accumulator)
    buffers = [weakref.ref(buffer) for buffer in accumulator._sums.buffers.values()]
    old = optimizer.param_groups[0]["params"][1]
    optimizer.state.pop(old, None)
    references = [weakref.ref(old), buffers[1]]
    optimizer.param_groups[0]["params"][1] = new()
    del old
    step(optimizer, accumulator if again or not options else None)
    assert_freed(references)
    assert buffers[0]() is not None
    assert len(accumulator._sums.buffers) == (2 if again or not options else 1)


def test_an_accumulator_that_is_never_called_keeps_nothing(backend):
    optimizer = fusedstep.Lion([new(), new()], backend=backend)
    accumulator = fusedstep.GradientAccumulator(optimizer)
    step(optimizer)
    references = replace(optimizer)
    step(optimizer)
    assert_freed(references)
    optimizer.param_groups[0]["params"].clear()
    optimizer.step()
    accumulator.reset()


def test_parameters_that_change_places_keep_what_is_theirs(backend):
    """The counts of a class whose states have none, and accumulated gradients, go with the parameter."""
    optimizer = fusedstep.Lion([{"params": [new(), new()]}, {"params": [new()]}], lr=0.1, backend=backend)
    accumulator = fusedstep.GradientAccumulator(optimizer)
    first, second = (group["params"] for group in optimizer.param_groups)
    for param in (*first, *second):
        param.grad = torch.ones_like(param)
    optimizer.step()
    first[0].grad = None
    optimizer.step()
    accumulator()
    moved = first.pop(0)
    second.insert(0, moved)
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert optimizer.stepper.kept.step.beside[moved] == 2
    assert [total is None for total in accumulator.gradients] == [False, True, False]
