"""Both forms of Adafactor beside the classes that they replace: numbers, states, schedules, errors."""

import copy
import io
import math
import pickle

import pytest
import torch
import transformers
from kinds import ALL

import fusedstep
from fusedstep.cases import REDUCING

PARENTS = {"Adafactor": transformers.Adafactor, "TorchAdafactor": torch.optim.Adafactor}
# Scalars, vectors, single rows and columns, kernels of convolutions, batches, and matrices that are cut into blocks.
SHAPES = (
    *(
        (),
        (1,),
        (9,),
        (1, 1),
        (3, 5),
        (1, 6),
        (6, 1),
        (2, 3, 4),
        (4, 2, 3, 3),
        (3, 1, 1, 2),
        (5, 2, 1, 1),
        (2, 2, 5, 5),
    ),
    *((40, 70), (131, 67), (2, 33, 40), (1, 1500), (1500, 1), (400, 3)),
)
FEW = ((), (7,), (3, 5), (2, 3, 3, 3), (40, 30))
EXACT = {"rtol": 1e-11, "atol": 1e-12}

CASES = [case for case in REDUCING if case.optimizer in PARENTS]
BOTH = CASES if ALL else list({case.optimizer: case for case in CASES}.values())
by_case = pytest.mark.parametrize("case", CASES, ids=str)
by_class = pytest.mark.parametrize("name", PARENTS)
# What the host does with both rules is one text: a case of each.
by_rule = pytest.mark.parametrize("case", BOTH, ids=str)


class Negated:
    """The parent in form of Hugging Face has no maximize: its steps on the negated gradients."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def step(self):
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        for param in params:
            param.grad = None if param.grad is None else -param.grad
        self.optimizer.step()


def parent(name, params, **options):
    negated = name == "Adafactor" and options.pop("maximize", False)
    optimizer = PARENTS[name](params, **options)
    return Negated(optimizer) if negated else optimizer


def ours(name, params, backend="cpu", **options):
    return getattr(fusedstep, name)(params, backend=backend, **options)


def parameters(shapes=SHAPES, dtype=torch.float64):
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def copies(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def step(*optimizers, skip=()):
    for i, params in enumerate(zip(*map(params_of, optimizers), strict=True)):
        grad = torch.randn(params[0].shape, dtype=torch.float64) * 10.0 ** (i % 4 - 2)
        for param in params:
            param.grad = None if i in skip else grad.to(param.dtype)
    for optimizer in optimizers:
        optimizer.step()


def assert_same(mine, expected, **tolerance):
    """Parameters and state_dicts, keys and kinds of values included."""
    for a, b in zip(params_of(mine), params_of(expected), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or EXACT))
    a, b = mine.state_dict()["state"], expected.state_dict()["state"]
    assert list(a) == list(b)
    for key in a:
        assert list(a[key]) == list(b[key])
        for name, value in b[key].items():
            assert isinstance(a[key][name], type(value)), name
            torch.testing.assert_close(a[key][name], value, **(tolerance or EXACT))


@by_case
@pytest.mark.parametrize("backend", ["cpu", "reference"])  # each with every case: the parent judges both texts
def test_25_steps_in_float64_are_those_of_the_parent(case, backend):
    params = parameters()
    pair = ours(case.optimizer, params, backend, **case.options), parent(case.optimizer, copies(params), **case.options)
    for _ in range(25):
        step(*pair)
    assert_same(*pair)


OPTIONS = [
    ("Adafactor", {"scale_parameter": False}),
    ("Adafactor", {"warmup_init": True}),
    ("Adafactor", {"eps": (0.5, 2.0)}),
    ("Adafactor", {"clip_threshold": 0.01}),
    ("Adafactor", {"clip_threshold": 100.0}),
    ("Adafactor", {"decay_rate": -0.1}),
    ("Adafactor", {"decay_rate": 0.0}),
    ("Adafactor", {"beta1": 0.0}),
    ("Adafactor", {"beta1": 0.7}),
    ("Adafactor", {"weight_decay": 0.3}),
    ("Adafactor", {"lr": 0.01, "relative_step": False}),
    ("TorchAdafactor", {}),
    ("TorchAdafactor", {"lr": 2.0}),
    ("TorchAdafactor", {"lr": torch.tensor(0.03, dtype=torch.float64)}),
    ("TorchAdafactor", {"beta2_decay": -0.2}),
    ("TorchAdafactor", {"beta2_decay": 0.0}),
    ("TorchAdafactor", {"eps": (0.3, 0.001)}),
    ("TorchAdafactor", {"eps": (None, 1.0)}),
    ("TorchAdafactor", {"d": 1.2, "eps": (1e-8, 0.1)}),
    ("TorchAdafactor", {"weight_decay": 0.3, "lr": 0.4}),
    ("TorchAdafactor", {"maximize": True, "foreach": True}),
]


@pytest.mark.parametrize(
    ("backend", "name", "options"),
    # All by the reference; the CPU engine, whose numbers are compared with its, beside the parent once more for some.
    [("reference", *row) for row in OPTIONS] + [("cpu", *row) for row in (OPTIONS if ALL else OPTIONS[::4])],
    ids=str,
)
def test_each_option_alone_is_the_parents(name, options, backend):
    params = parameters(FEW)
    pair = ours(name, params, backend, **options), parent(name, copies(params), **options)
    for _ in range(6):
        step(*pair)
    assert_same(*pair)


@by_rule
def test_zero_gradients_give_the_parents_numbers(case, backend):
    params = parameters(FEW)
    pair = ours(case.optimizer, params, backend, **case.options), parent(case.optimizer, copies(params), **case.options)
    for _ in range(2):
        for param in (*params, *params_of(pair[1])):
            param.grad = torch.zeros_like(param)
        for optimizer in pair:
            optimizer.step()
        step(*pair)
    assert_same(*pair)


@by_class
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_does_what_it_does_in_the_parent(name, bad, backend):
    params = parameters(((9,), (3, 5), (4, 3, 3), (40, 30)))
    pair = ours(name, params, backend), parent(name, copies(params))
    step(*pair)
    for some in zip(*map(params_of, pair), strict=True):
        grad = torch.randn(some[0].shape, dtype=torch.float64)
        grad.view(-1)[1] = bad
        for param in some:
            param.grad = grad.clone()
    for optimizer in pair:
        optimizer.step()
    for a, b in zip(*map(params_of, pair), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **EXACT)


@by_class
def test_each_parameter_takes_the_epsilon_of_its_own_dtype(name, backend):
    """Whatever else is in its group: torch takes that of the group's first dtype for all."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    together = [parameters(((5, 4), (6,)), dtype) for dtype in dtypes]
    apart = [copies(params) for params in together]
    one = ours(name, [param for params in together for param in params], backend)
    several = [ours(name, params, backend) for params in apart]
    for _ in range(3):
        for a, b in zip(together, apart, strict=True):
            for x, y in zip(a, b, strict=True):
                x.grad = torch.randn_like(x) * 1e-4
                y.grad = x.grad.clone()
        for optimizer in (one, *several):
            optimizer.step()
    for a, b in zip(together, apart, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_a_float32_parameter_of_torchs_form_uses_its_own_resolution(backend):
    params = parameters(((5, 4), (6,)), torch.float32)
    pair = ours("TorchAdafactor", params, backend), parent("TorchAdafactor", copies(params))
    for _ in range(3):
        for a, b in zip(*map(params_of, pair), strict=True):
            a.grad = torch.randn_like(a) * 1e-8  # far below: the bound decides
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert_same(*pair, rtol=1e-6, atol=1e-7)


@by_rule
def test_a_parameter_without_gradient_does_not_age(case, backend):
    params = parameters(FEW)
    pair = ours(case.optimizer, params, backend, **case.options), parent(case.optimizer, copies(params), **case.options)
    for skip in ((0, 2), (), (1, 3), (2,)):
        step(*pair, skip=skip)
    assert_same(*pair)


@by_rule
def test_state_goes_to_the_parent_and_back_in_mid_training(case, backend):
    options = {key: value for key, value in case.options.items() if key != "maximize"}
    params = parameters(FEW)
    mine, theirs = ours(case.optimizer, params, backend, **options), parent(case.optimizer, copies(params), **options)
    for _ in range(4):
        step(mine, theirs)
    swapped = (
        ours(case.optimizer, copies(params), backend, **options),
        parent(case.optimizer, copies(params), **options),
    )
    file = io.BytesIO()
    torch.save([theirs.state_dict(), mine.state_dict()], file)
    for optimizer, state in zip(swapped, torch.load(io.BytesIO(file.getvalue())), strict=True):
        optimizer.load_state_dict(state)
    for _ in range(4):
        step(mine, theirs, *swapped)
    for optimizer in (mine, *swapped):
        assert_same(optimizer, theirs)


def test_state_of_bf16_parameters_goes_on_in_float32():
    """Hugging Face's states are fp32 beside bf16 parameters; torch's are bf16. Neither changes when it is loaded."""
    for name, dtype in (("Adafactor", torch.float32), ("TorchAdafactor", torch.bfloat16)):
        params = parameters(FEW, torch.bfloat16)
        pair = ours(name, params), parent(name, copies(params))
        for _ in range(2):
            step(*pair)
        loaded = ours(name, copies(params))
        loaded.load_state_dict(pair[1].state_dict())
        for optimizer in (pair[0], loaded):
            for state in optimizer.state.values():
                assert {value.dtype for key, value in state.items() if key != "step"} == {dtype}


@by_rule
def test_states_take_no_more_memory_than_the_parents(case):
    params = parameters(dtype=torch.float32)
    pair = ours(case.optimizer, params, **case.options), parent(case.optimizer, copies(params), **case.options)
    step(*pair)
    sizes = [
        sum(v.nbytes for s in o.state.values() for k, v in s.items() if isinstance(v, torch.Tensor) and k != "step")
        for o in pair
    ]
    assert sizes[0] <= sizes[1]


@pytest.mark.parametrize("options", [{}, {"warmup_init": True}, {"scale_parameter": False}], ids=str)
def test_the_schedule_of_transformers_shows_the_same_rates(options, backend):
    params = parameters(FEW)
    pair = ours("Adafactor", params, backend, **options), parent("Adafactor", copies(params), **options)
    schedules = [transformers.optimization.AdafactorSchedule(optimizer, initial_lr=0.5) for optimizer in pair]
    assert schedules[0].get_lr() == schedules[1].get_lr() == [0.5]
    for _ in range(3):
        step(*pair)
        rates = [schedule.get_lr() for schedule in schedules]
        assert rates[0] == pytest.approx([float(rate) for rate in rates[1]], rel=1e-12)
        for schedule in schedules:
            schedule.step()
    assert_same(*pair)
    assert pair[0].param_groups[0]["lr"] == pytest.approx(float(pair[1].param_groups[0]["lr"]))


def test_a_scheduler_of_torch_sets_the_rate(backend):
    params = parameters(FEW)
    options = {"lr": 0.1, "relative_step": False}
    pair = ours("Adafactor", params, backend, **options), parent("Adafactor", copies(params), **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in pair]
    for _ in range(4):
        step(*pair)
        for schedule in schedules:
            schedule.step()
    assert_same(*pair)


@by_rule
def test_copies_go_on_alike(case, backend):
    optimizer = ours(case.optimizer, parameters(FEW), backend, **case.options)
    step(optimizer)
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for _ in range(2):
        step(optimizer, *others)
    for other in others:
        assert_same(other, optimizer, rtol=0, atol=0)


@by_class
def test_the_closure_gives_the_loss_and_hooks_are_called(name, backend):
    param = torch.nn.Parameter(torch.randn(4, 3))
    optimizer, calls = ours(name, [param], backend), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    before = param.square().sum()
    assert optimizer.step(closure) == before
    assert calls == [1]
    assert param.square().sum() < before


@by_class
def test_scaled_gradients_give_the_same_bits(name, backend):
    params = parameters(SHAPES, torch.float32)
    scaled, plain = ours(name, params, backend), ours(name, copies(params), backend)
    for _ in range(2):
        step(plain)
        for a, b in zip(params_of(scaled), params_of(plain), strict=True):
            a.grad = 8 * b.grad
        scaled.grad_scale = torch.tensor(8.0)
        scaled.step()
    assert_same(scaled, plain, rtol=0, atol=0)


@by_class
def test_a_skipped_step_changes_nothing(name, backend):
    optimizer = ours(name, parameters(FEW, torch.float32), backend)
    step(optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"]), copies(params_of(optimizer))
    optimizer.found_inf = torch.tensor(1.0)
    step(optimizer)
    torch.testing.assert_close(optimizer.state_dict()["state"], before[0], rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(params_of(optimizer), before[1], strict=True))


def test_empty_parameters_count_their_steps(backend):
    for name in PARENTS:
        params = parameters(((0,), (0, 3), (3, 0), (2, 0, 3), (4, 2)))
        optimizer = ours(name, params, backend)
        for _ in range(2):
            step(optimizer)
        assert [float(optimizer.state[param]["step"]) for param in params] == [2.0] * 5
        assert params[-1].isfinite().all()


ERRORS = [
    ("Adafactor", {"lr": 1e-3}, ValueError, "Cannot combine manual `lr` and `relative_step=True` options"),
    ("Adafactor", {"relative_step": False, "lr": 1.0, "warmup_init": True}, ValueError, "`warmup_init=True` requires"),
    ("Adafactor", {"lr": -1.0, "relative_step": False}, ValueError, "Invalid learning rate: -1.0"),
    ("Adafactor", {"eps": (-1.0, 1e-3)}, ValueError, "Invalid epsilon value at index 0: -1.0"),
    ("Adafactor", {"eps": 1e-3}, TypeError, "Invalid eps: 0.001"),
    ("Adafactor", {"eps": (1e-3,)}, ValueError, "Invalid eps"),
    ("Adafactor", {"clip_threshold": 0.0}, ValueError, "Invalid clip_threshold value: 0.0"),
    ("Adafactor", {"decay_rate": 0.8}, ValueError, "Invalid decay_rate value: 0.8"),
    ("Adafactor", {"beta1": 1.5}, ValueError, "Invalid beta1 value: 1.5"),
    ("Adafactor", {"weight_decay": "0.1"}, TypeError, "Invalid weight_decay value: '0.1'"),
    ("Adafactor", {"scale_parameter": "no"}, TypeError, "Invalid scale_parameter value: 'no'"),
    ("TorchAdafactor", {"lr": -0.1}, ValueError, "Learning rate should be >= 0 but is: -0.1"),
    ("TorchAdafactor", {"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
    ("TorchAdafactor", {"beta2_decay": 0.8}, ValueError, "beta2_decay should be <= 0 but is: 0.8"),
    ("TorchAdafactor", {"eps": (-1.0, 1.0)}, ValueError, "epsilon1 should be >= 0 but is: -1.0"),
    ("TorchAdafactor", {"eps": (None, -1.0)}, ValueError, "epsilon2 should be >= 0 but is: -1.0"),
    ("TorchAdafactor", {"d": 0.5}, ValueError, "Clipping threshold d should be >= 1 but is: 0.5"),
    ("TorchAdafactor", {"weight_decay": -1.0}, ValueError, "weight_decay should be >= 0 but is: -1.0"),
    ("TorchAdafactor", {"d": None}, TypeError, "Clipping threshold d"),
]


@pytest.mark.parametrize(("name", "options", "kind", "text"), ERRORS, ids=lambda value: str(value)[:40])
def test_bad_options_raise_what_the_parent_raises_if_it_does(name, options, kind, text):
    with pytest.raises(kind) as raised:
        ours(name, [torch.nn.Parameter(torch.zeros(2, 2))], **options)
    assert text in str(raised.value)
    # torch checks all but the types, transformers how two options go together.
    if kind is ValueError if name == "TorchAdafactor" else "`" in text:
        with pytest.raises(kind) as raised:
            parent(name, [torch.nn.Parameter(torch.zeros(2, 2))], **options)
        assert text in str(raised.value)


def test_a_rate_is_needed_without_relative_steps(backend):
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = ours("Adafactor", [param], backend, relative_step=False)
    param.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="Invalid learning rate: None"):
        optimizer.step()
    assert torch.equal(param, torch.ones(2, 2))
    assert not optimizer.state
    optimizer.param_groups[0]["lr"] = 0.1  # by a schedule, or as an option of the group
    optimizer.step()


@by_class
def test_complex_and_sparse_are_refused(name, backend):
    param = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=f"{name} does not support complex parameters"):
        ours(name, [param], backend).step()
    param = torch.nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients"):
        ours(name, [param], backend).step()


@by_class
def test_a_state_of_another_shape_is_refused(name, backend):
    params = parameters(((4, 3), (5,)))
    optimizer = ours(name, params, backend)
    step(optimizer)
    key = optimizer.state_names[0] if name == "TorchAdafactor" else "exp_avg_sq_row"
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][0][key] = torch.zeros(3)
    with pytest.raises(ValueError, match=rf"'{key}' of parameter 0 has shape \(3,\), expected \(4"):
        optimizer.load_state_dict(wrong)
    optimizer.state[params[0]][key] = torch.zeros(3)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=f"{name}: state '{key}' has shape"):
        step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("name", PARENTS)
def test_digits_are_learnt_as_well_as_by_the_parent(name, backend):
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    options = {"Adafactor": {"lr": 0.05, "relative_step": False}, "TorchAdafactor": {"lr": 0.5}}[name]

    def accuracy(build):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Unflatten(1, (1, 8, 8)),
            *(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10)),
        )
        optimizer = build(model.parameters(), **options)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[:1400]), labels[:1400]).backward()
            optimizer.step()
        return (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()

    mine = accuracy(lambda params, **kw: ours(name, params, backend, **kw))
    assert mine == pytest.approx(accuracy(lambda params, **kw: parent(name, params, **kw)), abs=0.02)
    assert mine > 0.85
