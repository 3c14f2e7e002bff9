"""Options that are infinite where the parents allow it: infinity times an option that is zero must not be used."""

import math

import pytest
import torch
from kinds import each
from parents import OTHERS
from transformers import Adafactor

import fusedstep
from fusedstep.backends import BACKENDS

INF = math.inf
# Every option that a parent lets be infinite, with one that is in order. What stays 0 beside it is the point.
NUMBERS = {
    "SGD": {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0},
    "Adam": {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.0},
    "AdamW": {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.0},
    "RMSprop": {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.0, "weight_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10},
    "Lion": {"lr": 0.1, "weight_decay": 0.0},
    "AdaBelief": {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.0},
    "Adafactor": {"lr": 0.1, "clip_threshold": 1.0, "weight_decay": 0.0, "decay_rate": -0.8},
    "TorchAdafactor": {"lr": 0.1, "d": 1.0, "weight_decay": 0.0, "beta2_decay": -0.8},
    "Amos": {"lr": 0.1, "eta": 1.0, "clip_value": None, "extra_l2": 0.0, "c_coef": 0.25, "d_coef": 0.25},
    "AdamWeightDecay": {"lr": 0.1, "weight_decay_rate": 0.0, "decay": 0.0},
}
FIXED = {"Adafactor": {"relative_step": False, "scale_parameter": False}}
PAIRS = {  # of eps: the numbers that bound an estimate and a step from below
    "Adafactor": [(INF, 1e-3), (1e-30, INF), (0.0, 0.0)],
    "TorchAdafactor": [(INF, 1e-3), (None, INF), (1e-30, 0.0)],
}
# An infinite decay rate multiplies the weight, here by 1 - lr * rate; the parents subtract a product from it instead,
# and from the second step on that is infinity minus infinity.
DECAYS = ("weight_decay", "weight_decay_rate")


def rows():
    for name, numbers in NUMBERS.items():
        for key, value in numbers.items():
            if key not in DECAYS:
                zeros = [other for other, number in numbers.items() if number == 0.0 and other != key]
                for other in (None, *zeros):
                    yield (
                        name,
                        {key: -INF if value is not None and value < 0 else INF, **({other: 0.1} if other else {})},
                    )
        for eps in PAIRS.get(name, ()):
            yield name, {"eps": eps}


ROWS = list(rows())


def parent(name):
    own = {"Adafactor": Adafactor, "TorchAdafactor": torch.optim.Adafactor, **OTHERS}
    return own.get(name) or getattr(torch.optim, name)


def trained(cls, name, options, grad, dtype, **more):
    """A vector and a matrix after each of three steps."""
    params = [torch.nn.Parameter(torch.ones(*shape, dtype=dtype)) for shape in ((3,), (2, 3))]
    optimizer = cls(params, **{**NUMBERS[name], **FIXED.get(name, {}), **options}, **more)
    seen = []
    for _ in range(3):
        for param in params:
            param.grad = torch.full_like(param, grad)
        optimizer.step()
        seen += [param.detach().clone() for param in params]
    return seen


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", NUMBERS)
def test_the_numbers_are_the_parents(name):
    for options in [options for row, options in ROWS if row == name]:
        for grad in (1.0, -2.0):
            expected = trained(parent(name), name, options, grad, torch.float64)
            for backend in ("cpu", "reference"):
                mine = trained(getattr(fusedstep, name), name, options, grad, torch.float64, backend=backend)
                torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_torchs_adafactor_takes_an_infinite_bound_of_the_relative_step(backend):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    fusedstep.TorchAdafactor([param], lr=INF, backend=backend).step()
    assert param.eq(0).all()


RULES = ["AdamW", "Adafactor", "TorchAdafactor", "AdamWeightDecay"]  # whose decay is one factor of the weight


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in what is then not chosen
@pytest.mark.parametrize("name", RULES)
def test_triton_has_the_references_numbers(name):
    reasons = BACKENDS["triton"].reasons(torch.device("cpu")) if "triton" in BACKENDS else ["no triton"]
    if reasons:
        pytest.skip("; ".join(reasons))
    cls, options = getattr(fusedstep, name), {"lr": INF}
    mine, expected = (trained(cls, name, options, 1.0, torch.float32, backend=b) for b in ("triton", "reference"))
    assert not any(number.isnan().any() for number in expected)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


LIMITS = [("clipvalue",), ("clipnorm",), ("global_clipnorm",), ("clipvalue", "clipnorm")]


@each(limits=LIMITS, grad=[0.0, 1.0, -1e30])
def test_an_infinite_limit_clips_nothing(limits, grad, backend):
    results = [
        trained(fusedstep.AdamWeightDecay, "AdamWeightDecay", options, grad, torch.float32, backend=backend)
        for options in ({}, dict.fromkeys(limits, INF))
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@each(grad=[0.0, 1.0, 1e30], norm_type=[2.0, INF])
def test_an_infinite_max_grad_norm_clips_nothing(norm_type, grad, backend):
    results = [
        trained(fusedstep.SGD, "SGD", options, grad, torch.float32, backend=backend, norm_type=norm_type)
        for options in ({}, {"max_grad_norm": INF})
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)
