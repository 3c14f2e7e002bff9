"""`load_state_dict` is all or nothing: after an error training goes on as if nothing had been loaded.

A mutator walks a state_dict of every class and changes one thing at a time. Whatever is refused leaves no trace, and
whatever is taken can be stepped with: what a step would refuse is refused before.
"""

import copy
import itertools
import math
import warnings

import pytest
import torch
from kinds import ALL, OF_EACH_KIND
from support import ADAMW, MOMENTUM, each, ours, parameters, parameters_of, step
from test_distributed_checkpoint import assert_same_bits

import fusedstep
from fusedstep.cases import CASES, REDUCING
from fusedstep.schedules import CosineScheduler

ROWS = [MOMENTUM, ADAMW, *OF_EACH_KIND, CASES[25]]
SHAPES = ((6, 4), (5,))
COSINE = CosineScheduler(max_update=10, base_lr=0.1)

OTHERS = [None, "text", [], {}, object(), 10**400, math.nan, math.inf, -1, 2.5, 1 + 2j, torch.ones(2), torch.tensor(3)]
TENSORS = {
    "shape": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    "meta": lambda t: t.to("meta"),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: t.to(torch.complex64),
    "int64": lambda t: t.to(torch.int64),
    "int8": lambda t: t.to(torch.int8),
    "bf16": lambda t: t.bfloat16(),
    "fp64": lambda t: t.double(),
    "csr": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "expanded": lambda t: t.flatten()[0].expand(t.shape),
    "gradient": lambda t: t.clone().requires_grad_(t.is_floating_point()),
}


def mutants(saved):
    """Copies of a state_dict, each with one thing changed, by what was changed."""
    for path, value in walk(saved):
        if path[:2] == ("state", 1) or "buffer" in path[:-1]:
            continue  # as those of parameter 0; what AdaBelief's original computes
        name = ".".join(map(str, path))
        yield f"{name} missing", put(saved, path, MISSING)
        for other in OTHERS:
            yield f"{name}={str(other)[:20]}", put(saved, path, other)
        if isinstance(value, torch.Tensor):
            for kind, change in TENSORS.items():
                yield f"{name} {kind}", put(saved, path, change(value))
        if isinstance(value, (dict, list)) and path:
            yield (
                f"{name} with more",
                put(saved, path, {**value, "extra": 5} if isinstance(value, dict) else [*value, 5]),
            )
    yield "no groups", {**saved, "param_groups": saved["param_groups"] * 2}


MISSING = object()


def walk(value, path=()):
    """The paths of everything in dictionaries and lists, from the outside."""
    if path:
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from walk(inner, (*path, key))


def put(saved, path, value):
    other = copy.deepcopy(saved)
    place = other
    for key in path[:-1]:
        place = place[key]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return other


def trained(case, backend, params=None, **options):
    optimizer = ours(case, params or named(parameters(SHAPES, torch.float32)), backend, **options)
    for _ in range(2):
        step(optimizer)
    return optimizer


def named(params):
    return [(f"p{index}", param) for index, param in enumerate(params)]


def seen(optimizer):
    params = [p.detach().clone() for p in parameters_of(optimizer)]
    kept = ("params", "differentiable")  # the latter is torch's addition to a copy
    groups = [{k: v for k, v in group.items() if k not in kept} for group in optimizer.param_groups]
    return {"params": params, "state": optimizer.state_dict()["state"], "groups": str(groups)}


def some_steps(optimizer, steps=3):
    torch.manual_seed(1)
    for _ in range(steps):
        step(optimizer)
    return seen(optimizer)


STORED = [
    {"state_dtype": "8bit", "master_weights": True},
    {"state_dtype": torch.bfloat16, "master_weights": "split"},
    {"kahan": True},
    {"rounding": "stochastic", "rounding_seed": 3},
]


TWO = itertools.product(ROWS[:2], STORED) if ALL else zip(ROWS[:2] * 2, STORED, strict=True)


@pytest.mark.parametrize(("case", "stored"), [*((case, {}) for case in ROWS), *TWO], ids=str)
def test_each_error_leaves_the_optimizer_as_it_was(case, stored):
    backend = "reference" if case.optimizer in ("SGD", "Amos") else "cpu"
    params = parameters([(64, 64), (5,)], torch.bfloat16) if stored else parameters(SHAPES, torch.float32)
    first = trained(case, backend, named(params), ema_decay=0.5, weights_copy=torch.float16, **stored)
    saved = copy.deepcopy(first.state_dict())
    expected = some_steps(copy.deepcopy(first))
    before = seen(first)
    refused, optimizer = 0, copy.deepcopy(first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for what, mutant in mutants(saved):
            if stored and what.startswith("param_groups"):
                continue
            if refusal(optimizer, mutant):
                refused += 1
                assert_same_bits(before, seen(optimizer), what)
                if refused % 8 != 0:
                    continue
                assert_same_bits(expected, some_steps(optimizer), what)
            else:
                try:
                    some_steps(optimizer, 1)
                except Exception as error:
                    raise AssertionError(f"{what} was taken, and the step raised {error!r}") from error
            optimizer = copy.deepcopy(first)
    assert refused > 50


def refusal(optimizer, state):
    """What is said of a state that is refused."""
    try:
        optimizer.load_state_dict(state)
    except (ValueError, TypeError) as error:
        return str(error)


def test_a_group_without_a_learning_rate(backend):
    optimizer = trained(ADAMW, backend)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["lr"]
    before, plans = seen(optimizer), optimizer.stepper.plans
    with pytest.raises(ValueError, match="parameter group 0 has no 'lr'"):
        optimizer.load_state_dict(saved)
    assert_same_bits(before, seen(optimizer))
    assert optimizer.stepper.plans is plans
    step(optimizer)


@each(number=[-1, 2.5, math.inf, math.nan, 2.0**60, 10**400], form={"tensor": torch.tensor, "number": lambda n: n})
def test_a_number_of_steps_is_whole_and_not_negative(number, form, backend):
    if form is torch.tensor and number == 10**400:
        pytest.skip("no tensor holds it")
    for case in (ADAMW, REDUCING[-1], CASES[0]):
        optimizer = trained(case, backend)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"].setdefault(0, {})["step"] = form(number)
        before = seen(optimizer)
        with pytest.raises(ValueError, match="'step' of parameter 0"):
            optimizer.load_state_dict(saved)
        assert_same_bits(before, seen(optimizer))


@pytest.mark.parametrize("where", ["pre", "post", "warning"])
def test_an_error_of_a_hook_or_a_warning_undoes_all(where, backend):
    optimizer = trained(
        ADAMW, backend, params=parameters(SHAPES, torch.bfloat16), lr=COSINE, weights_copy=torch.float16
    )
    other = trained(ADAMW, backend, params=parameters(SHAPES, torch.bfloat16), lr=COSINE, master_weights=True)
    step(other)
    expected = some_steps(copy.deepcopy(optimizer))
    before, rates, copied = seen(optimizer), optimizer.get_last_lr(), [c.clone() for c in optimizer.copies.values()]

    def fail(*_):
        raise KeyError("mine")

    if where == "pre":
        optimizer.register_load_state_dict_pre_hook(fail)
    elif where == "post":
        optimizer.register_load_state_dict_post_hook(fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if where == "warning" else "ignore")
        with pytest.raises(UserWarning if where == "warning" else KeyError):
            optimizer.load_state_dict(other.state_dict())
    assert_same_bits(before, seen(optimizer))
    assert (rates, optimizer.schedule_step) == (optimizer.get_last_lr(), 2)
    assert_same_bits(copied, list(optimizer.copies.values()))
    assert_same_bits(expected, some_steps(optimizer))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["param_groups"][0].update(param_names=5), "parameter group 0: 'param_names' is 5"),
        (lambda s: s["param_groups"][0].update(betas="ab"), "parameter group 0: Invalid beta"),
        (lambda s: s["param_groups"][0].update(eps=None), "parameter group 0: Invalid eps: None"),
        (lambda s: s["param_groups"][0].pop("params"), "parameter group 0 has no 'params'"),
        (lambda s: s.pop("state"), "'state' is None, expected a mapping"),
        (lambda s: s["state"].update({0: 5}), "the state of parameter 0 is 5, expected a dict"),
        (lambda s: s["state"][0].update(exp_avg=torch.empty((6, 4), device="meta")), "on the meta device"),
        (
            lambda s: s["state"][0].update(exp_avg=torch.zeros(6, 4).to(torch.float8_e5m2)),
            "'exp_avg' has dtype torch.float8_e5m2",
        ),
    ],
)
def test_what_is_said(change, words):
    optimizer = trained(ADAMW, "cpu")
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)


def test_a_tensor_of_the_users_own_keeps_its_layout(backend):
    param = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = fusedstep.AdamW([param], backend=backend)
    step(optimizer)
    saved = optimizer.state_dict()
    saved["state"][0]["mine"] = torch.arange(12).view(4, 3).t()
    optimizer.load_state_dict(saved)
    mine = optimizer.state[param]["mine"]
    assert torch.equal(mine, saved["state"][0]["mine"])
    assert mine.stride() == (1, 3)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_sparse_state_of_a_rule_that_reduces(backend):
    param = torch.nn.Parameter(torch.ones(3, 4, 5))
    optimizer = fusedstep.Adafactor([param], backend=backend)
    step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq_row"] = saved["state"][0]["exp_avg_sq_row"].to_sparse_csr()
    with pytest.raises(ValueError, match=r"'exp_avg_sq_row' of parameter 0 has layout torch\.sparse_csr"):
        optimizer.load_state_dict(saved)
    step(optimizer)
