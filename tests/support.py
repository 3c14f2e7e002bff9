"""What several test modules share: the table of cases as parameters, and an optimizer beside torch's own."""

import torch
from kinds import (  # noqa: F401 - for the test modules
    ALL,
    BY_KIND,
    ELEMENTWISE,
    IN_ENGINES,
    KINDS,
    by_case,
    by_kind,
    by_kind_in_engines,
    by_kind_of_state,
    by_one_kind,
    cases_of,
    each,
    examples,
    few,
    one_of_each,
    parametrize_cases,
)
from parents import parent

import fusedstep
from fusedstep import codecs

ADAMW, MOMENTUM = KINDS["two states"], KINDS["no step"]
WITH_STATES = [KINDS[kind] for kind in ("no step", "two states", "three states")]

# The precision options by themselves: how weights are stored, and how states are.
WEIGHTS = {
    "plain": {},
    "master": {"master_weights": True},
    "split": {"master_weights": "split"},
    "kahan": {"kahan": True},
    "stochastic": {"rounding": "stochastic", "rounding_seed": 2**40 + 17},
}
STATES = {
    "own": {},
    "fp32": {"state_dtype": torch.float32},
    "bf16": {"state_dtype": torch.bfloat16},
    "8bit": {"state_dtype": "8bit"},
    "4bit": {"state_dtype": "4bit"},
}


def precision_modes(*states):
    """Every way to store weights with each of ``states``, by name."""
    return {f"{w}-{s}": {**WEIGHTS[w], **STATES[s]} for w in WEIGHTS for s in states}


def numbers_of(optimizer, state, key, like):
    """A state of a tensor like ``like`` as numbers, quantized or not."""
    quantizer = codecs.quantizer_of(state[key], like)
    if quantizer is None:
        return state[key]
    return codecs.dequantize(state[key], state[f"{key}_scale"], quantizer, key not in optimizer.non_negative, like)


SHAPES = ((3, 5), (7,), (), (2, 3, 4))
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # for float64


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def parameters(shapes=SHAPES, dtype=torch.float64):
    return [torch.nn.Parameter(normal(*shape, dtype=dtype)) for shape in shapes]


def copies(params):
    return [torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


def ours(case, params, backend="auto", **options):
    return getattr(fusedstep, case.optimizer)(params, foreach=False, backend=backend, **{**case.options, **options})


def theirs(case, params, **options):
    return parent(case, params, **options)


def parameters_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_grads(*optimizers, skip=()):
    """The same new gradients for the parameters of each optimizer; none for the indices in ``skip``."""
    for index, params in enumerate(zip(*map(parameters_of, optimizers), strict=True)):
        grad = torch.randn(params[0].shape, dtype=torch.float64)
        for param in params:
            param.grad = None if index in skip else grad.to(param.dtype, copy=True)


def step(*optimizers, skip=()):
    give_grads(*optimizers, skip=skip)
    for optimizer in optimizers:
        optimizer.step()


def pair(case, backend, params=None, **options):
    """fusedstep's optimizer and torch's, on equal parameters."""
    params = params or parameters()
    return ours(case, params, backend, **options), theirs(case, copies(params), **options)


def assert_same(mine, expected, **tolerance):
    """Parameters, and states with their keys, of two optimizers."""
    for a, b in zip(parameters_of(mine), parameters_of(expected), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or EXACT))
    a, b = mine.state_dict()["state"], expected.state_dict()["state"]
    assert list(a) == list(b)
    for key in a:
        assert list(a[key]) == list(b[key])
        torch.testing.assert_close(a[key], b[key], **(tolerance or EXACT))


def snapshot(*optimizers):
    """Everything that a step could change, to compare with `assert_untouched`."""
    return [
        (
            [p.detach().clone() for p in parameters_of(o)],
            {p: {k: v.clone() for k, v in state.items()} for p, state in o.state.items()},
        )
        for o in optimizers
    ]


def assert_untouched(before, *optimizers):
    for (params, states), optimizer in zip(before, optimizers, strict=True):
        for old, new in zip(params, parameters_of(optimizer), strict=True):
            assert torch.equal(old, new)
        assert states.keys() == optimizer.state.keys()
        for param, state in states.items():
            assert state.keys() == optimizer.state[param].keys()
            for name, old in state.items():
                assert torch.equal(old, optimizer.state[param][name]), name
