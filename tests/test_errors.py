"""Bad input: the error comes at the call that got it, in torch's words where torch has them, and nothing changes."""

import pytest
import torch
from support import (
    ADAMW,
    BY_KIND,
    IN_ENGINES,
    MOMENTUM,
    assert_same,
    assert_untouched,
    by_one_kind,
    each,
    give_grads,
    normal,
    one_of_each,
    ours,
    pair,
    parameters,
    parameters_of,
    snapshot,
    step,
)

import fusedstep

pytestmark = pytest.mark.plans

NAN = float("nan")

# (classes, options, type, beginning of the text, the same from torch)
CLASSES = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Lion", "AdaBelief", "Amos")
ADAMS = ("Adam", "AdamW")
DECAYS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Lion", "AdaBelief")
EPS = ("Adam", "AdamW", "RMSprop", "Adagrad", "AdaBelief")
BETAS = ("Adam", "AdamW", "AdaBelief")
ARGUMENTS = [
    (CLASSES, {"lr": -0.5}, ValueError, "Invalid learning rate: -0.5", True),
    (CLASSES, {"lr": torch.tensor(-0.5)}, ValueError, "Invalid learning rate: -0.5", True),
    (CLASSES, {"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element", True),
    (ADAMS, {"lr": NAN}, ValueError, "Invalid learning rate: nan", True),
    (("SGD", "Lion", "AdaBelief", "Amos"), {"lr": NAN}, ValueError, "Invalid learning rate: nan", False),
    (CLASSES, {"lr": "0.1"}, TypeError, "Invalid learning rate: '0.1' is a str", False),
    (CLASSES, {"lr": None}, TypeError, "Invalid learning rate: None", False),
    (CLASSES, {"lr": 1j}, TypeError, "Invalid learning rate: 1j", False),
    (CLASSES, {"lr": torch.tensor(1j)}, TypeError, "Invalid learning rate: a complex tensor", False),
    (DECAYS, {"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1", True),
    (DECAYS, {"weight_decay": "a"}, TypeError, "Invalid weight_decay value: 'a'", False),
    (EPS, {"eps": -1e-9}, ValueError, "Invalid epsilon value: -1e-09", True),
    (BETAS, {"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0", True),
    (BETAS, {"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1", True),
    (BETAS, {"betas": (0.9, NAN)}, ValueError, "Invalid beta parameter at index 1: nan", True),
    (BETAS, {"betas": (0.9,)}, ValueError, "Invalid betas: (0.9,)", False),
    (ADAMS, {"betas": (0.9, 0.8, 0.7)}, ValueError, "Invalid betas", False),
    (BETAS, {"betas": 0.9}, TypeError, "Invalid betas: 0.9", False),
    (BETAS, {"betas": None}, TypeError, "Invalid betas: None", False),
    (BETAS, {"betas": ("a", "b")}, TypeError, "Invalid beta parameter at index 0: 'a'", False),
    (ADAMS, {"betas": (torch.tensor(0.9), 0.9)}, ValueError, "betas must be either both floats or both Tensors", True),
    (ADAMS, {"amsgrad": "yes"}, TypeError, "Invalid amsgrad value: 'yes'", False),
    (CLASSES, {"maximize": "yes"}, TypeError, "Invalid maximize value: 'yes'", False),
    (
        ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad"),
        {"differentiable": True},
        ValueError,
        "differentiable=True",
        False,
    ),
    (
        ("SGD", "Adam", "AdamW"),
        {"foreach": True, "fused": True},
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together.",
        True,
    ),
    (("SGD",), {"momentum": -1.0}, ValueError, "Invalid momentum value: -1.0", True),
    (("SGD",), {"momentum": NAN}, ValueError, "Invalid momentum value: nan", False),
    (("SGD",), {"dampening": "a"}, TypeError, "Invalid dampening value: 'a'", False),
    (("SGD",), {"dampening": NAN}, ValueError, "Invalid dampening value: nan", False),
    (("SGD",), {"nesterov": True}, ValueError, "Nesterov momentum requires a momentum and zero dampening", True),
    (
        ("SGD",),
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        ValueError,
        "Nesterov momentum requires a momentum and zero dampening",
        True,
    ),
    (("RMSprop",), {"alpha": -0.1}, ValueError, "Invalid alpha value: -0.1", True),
    (("RMSprop",), {"momentum": -0.1}, ValueError, "Invalid momentum value: -0.1", True),
    (("RMSprop",), {"centered": "yes"}, TypeError, "Invalid centered value: 'yes'", False),
    (("RMSprop",), {"momentum_decay": 1.5}, ValueError, "Invalid momentum_decay value: 1.5", False),
    (("Adagrad",), {"lr_decay": -1}, ValueError, "Invalid lr_decay value: -1", True),
    (("Adagrad",), {"initial_accumulator_value": -1}, ValueError, "Invalid initial_accumulator_value value: -1", True),
    (("Lion",), {"betas": (1.1, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.1", False),
    (("AdaBelief",), {"rectify": "no"}, TypeError, "Invalid rectify value: 'no'", False),
    (("Amos",), {"eta": -1.0}, ValueError, "Invalid eta value: -1.0", False),
    (("Amos",), {"eta": {"w": -1.0}}, ValueError, "Invalid eta value for 'w': -1.0", False),
    (("Amos",), {"eta": "a"}, TypeError, "Invalid eta value: 'a'", False),
    (("Amos",), {"beta": 1.0}, ValueError, "Invalid beta value: 1.0", False),
    (("Amos",), {"momentum": 1.0}, ValueError, "Invalid momentum value: 1.0", False),
    (("Amos",), {"clip_value": -1}, ValueError, "Invalid clip_value value: -1", False),
    (("Amos",), {"c_coef": -1}, ValueError, "Invalid c_coef value: -1", False),
    (("Amos",), {"eps": 0.0}, ValueError, "Invalid epsilon value: 0.0", False),
    (("AdamWeightDecay",), {"learning_rate": -1}, ValueError, "Invalid learning rate: -1", False),
    (("AdamWeightDecay",), {"beta_1": 1.0}, ValueError, "Invalid beta parameter at index 0: 1.0", False),
    (("AdamWeightDecay",), {"weight_decay_rate": -1}, ValueError, "Invalid weight_decay_rate value: -1", False),
    (("AdamWeightDecay",), {"clipnorm": 0}, ValueError, "Invalid clipnorm value: 0", False),
    (
        ("AdamWeightDecay",),
        {"exclude_from_weight_decay": "bias"},
        TypeError,
        "Invalid exclude_from_weight_decay",
        False,
    ),
    (("AdamWeightDecay",), {"include_in_weight_decay": ["("]}, ValueError, "Invalid include_in_weight_decay", False),
    (("AdamWeightDecay",), {"exclude_from_weight_decay": ["bias"]}, ValueError, "Invalid weight decay patterns", False),
    (CLASSES, {"no_such_option": 1}, TypeError, "", False),
]
# Of a message the words before the value, which the first class is shown with.
FEW_ARGUMENTS = one_of_each(ARGUMENTS, lambda names, options, kind, text, torchs: (names[0], kind, text.split(":")[0]))
by_argument = pytest.mark.parametrize(
    ("names", "options", "kind", "text", "torchs"), FEW_ARGUMENTS, ids=[f"{n[0]}-{o}" for n, o, *_ in FEW_ARGUMENTS]
)


@by_argument
def test_bad_arguments_of_a_class_and_of_a_group(names, options, kind, text, torchs):
    for name in names:
        with pytest.raises(kind) as mine:
            getattr(fusedstep, name)(parameters(), **options)
        assert str(mine.value).startswith(text), name
        assert mine.type is kind, name
        if torchs and name in torch.optim.__dict__:
            with pytest.raises(kind) as theirs:
                getattr(torch.optim, name)(parameters(), **options)
            assert str(mine.value).startswith(str(theirs.value)), name
    check_arguments_of_a_group(names, options, kind, text)


def check_arguments_of_a_group(names, options, kind, text):
    if {"no_such_option", "learning_rate", "beta_1"} & options.keys():
        return  # which a group does not have
    for name in names:
        first, second = parameters([(2,), (3,)])
        with pytest.raises(kind) as error:
            getattr(fusedstep, name)([{"params": [first]}, {"params": [second], **options}])
        assert str(error.value).startswith(text), name
        optimizer = getattr(fusedstep, name)([first])
        with pytest.raises(kind):
            optimizer.add_param_group({"params": [second], **options})
        assert parameters_of(optimizer) == [first]


@by_one_kind
def test_each_option_that_holds_for_all_groups_is_refused_in_one(case):
    for option in fusedstep.Options.__annotations__:
        first, second = parameters([(2,), (3,)])
        message = f"a parameter group has {option}='other', an option that holds for all groups"
        with pytest.raises(ValueError, match=message):
            ours(case, [{"params": [first]}, {"params": [second], option: "other"}])
        optimizer = ours(case, [first])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [second], option: "other"})
        assert parameters_of(optimizer) == [first]


def test_each_option_that_a_group_repeats_is_taken():
    """Whether the constructor was given it or not, as a copy of an optimizer's groups has it."""
    for option in fusedstep.Options.__annotations__:
        default = fusedstep.SGD([torch.zeros(2, requires_grad=True)], 0.1).stepper.options[option]
        chosen = {"max_grad_norm": 1.0, "ema_decay": 0.5, "rounding_seed": 3, "kahan": True}.get(option, default)
        for options in ({}, {option: default}, {option: chosen}):
            first, second = parameters([(2,), (3,)])
            groups = [{"params": [param], option: options.get(option, default)} for param in (first, second)]
            optimizer = fusedstep.SGD(groups, 0.1, **options)
            assert parameters_of(optimizer) == [first, second]


def not_a_leaf():
    return [torch.ones(2, requires_grad=True) * 2]


def in_two_groups():
    (param,) = parameters([(2,)])
    return [{"params": [param]}, {"params": [param]}]


def some_named():
    return [("a", parameters([(2,)])[0]), parameters([(2,)])[0]]


def some_groups_named():
    return [{"params": [("a", parameters([(2,)])[0])]}, {"params": parameters([(2,)])}]


BAD_PARAMETERS = [
    list,
    lambda: None,
    lambda: ["weight"],
    lambda: torch.ones(3, requires_grad=True),
    lambda: [{"params": {torch.ones(3, requires_grad=True)}}],
    lambda: [{"lr": 0.1}],
    not_a_leaf,
    in_two_groups,
    some_named,
    some_groups_named,
]


@pytest.mark.parametrize("make", BAD_PARAMETERS)
def test_bad_parameters_are_refused_in_torchs_words(make):
    params = make()
    with pytest.raises(Exception) as mine:  # noqa: PT011
        fusedstep.AdamW(params)
    with pytest.raises(mine.type) as theirs:
        torch.optim.AdamW(make())
    assert str(mine.value) == str(theirs.value)


def test_parameters_that_no_step_can_update():
    with pytest.raises(ValueError, match=r"parameter 1 'b', shape \(3,\).*share one memory location"):
        fusedstep.AdamW([("a", parameters([(2,)])[0]), ("b", torch.ones(1).expand(3).requires_grad_())])
    with pytest.raises(ValueError, match=r"parameter 0, shape \(2, 2\).*sparse"):
        fusedstep.SGD([torch.eye(2).to_sparse().requires_grad_()])


def test_a_parameter_becomes_an_expanded_tensor(backend):
    mine = ours(ADAMW, parameters([(3,), (4,)]), backend)
    step(mine)
    last = parameters_of(mine)[1]
    last.data = torch.ones(1, dtype=torch.float64).expand(4)
    give_grads(mine)
    before = snapshot(mine)
    with pytest.raises(ValueError, match=r"parameter 1, shape \(4,\).*share one memory location"):
        mine.step()
    assert_untouched(before, mine)


@pytest.mark.filterwarnings("ignore:fusedstep updates")
def test_frozen_weights_of_other_dtypes_are_carried_along(recwarn, backend):
    """As torch does; quantised weights beside trained ones are common."""
    frozen = [
        torch.nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
        for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)
    ]
    trained = parameters([(3,)])
    mine = ours(ADAMW, [*frozen, *trained], backend)
    for _ in range(2):
        trained[0].grad = normal(3)
        mine.step()
    assert not recwarn.list
    assert list(mine.state) == trained
    frozen[0].grad = torch.ones(3, dtype=torch.int8)
    trained[0].grad = normal(3)
    before = snapshot(mine)
    with pytest.raises(RuntimeError, match=r"torch.int8"):
        mine.step()
    assert_untouched(before, mine)


def test_float8_parameters():
    value = torch.randn(20).to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot update torch.float8_e4m3fn.*no kernel for"):
        fusedstep.SGD([torch.nn.Parameter(value)], backend="cpu")
    with pytest.warns(UserWarning, match="torch.float8_e4m3fn parameters on cpu with its slow reference"):
        mine = fusedstep.SGD([torch.nn.Parameter(value.clone())], lr=0.5)
    (param,) = parameters_of(mine)
    param.grad = torch.randn(20).to(torch.float8_e4m3fn)
    mine.step()
    expected = (value.float() - 0.5 * param.grad.float()).to(torch.float8_e4m3fn)
    assert torch.equal(param.float(), expected.float())


# Gradients.


def sparse(param):
    return torch.ones_like(param).to_sparse()


def integers(param):
    return torch.ones(param.shape, dtype=torch.int64)


def complex_numbers(param):
    return torch.ones(param.shape, dtype=torch.complex128)


BAD_GRADS = {
    sparse: "does not support sparse gradients",
    integers: "has dtype torch.int64",
    complex_numbers: "has dtype torch.complex128",
}


@each(case=BY_KIND, bad=BAD_GRADS.keys(), fresh=[True, False])
def test_one_bad_gradient_and_nothing_changes(case, backend, bad, fresh):
    """In the last group, after all the good ones, before the first step and in a steady state."""
    words = BAD_GRADS[bad]
    if bad is sparse and case.optimizer in ("SGD", "Adagrad"):
        if "weight_decay" not in case.options:
            pytest.skip("takes sparse gradients")
        words = "weight_decay option is not compatible with sparse gradients"
    named = [(f"layer.{i}", p) for i, p in enumerate(parameters([(2, 3), (4,), (5, 2), (3, 2)]))]
    mine = ours(case, [{"params": named[:2]}, {"params": named[2:]}], backend)
    for _ in range(0 if fresh else 3):
        step(mine)
    give_grads(mine)
    last = parameters_of(mine)[3]
    good = last.grad
    last.grad = None
    last.grad_dtype = None
    last.grad = bad(last)
    before = snapshot(mine)
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            mine.step()
        text = str(error.value)
        assert words in text
        assert "parameter 3 'layer.3', shape (3, 2), torch.float64, cpu" in text
        assert text.startswith(case.optimizer)
        assert_untouched(before, mine)
    last.grad = good
    mine.step()
    assert not torch.equal(before[0][0][3], last)


@each(case=IN_ENGINES, options=[{"lr": "a"}, {"lr": None}, {"lr": torch.ones(2)}, {"weight_decay": [1]}])
def test_one_bad_option_in_the_last_group_and_nothing_changes(case, backend, options):
    params = parameters()
    mine = ours(case, [{"params": params[:2]}, {"params": params[2:]}], backend)
    for number in range(2):
        give_grads(mine)
        good = dict(mine.param_groups[1])
        mine.param_groups[1].update(options)
        before = snapshot(mine)
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            mine.step()
        assert_untouched(before, mine)
        mine.param_groups[1].update({key: good[key] for key in options})
        if number == 0:
            mine.step()


def test_no_reference_to_gradients_remains_after_an_error(backend):
    import weakref

    mine = ours(ADAMW, parameters([(3, 2), (4,)]), backend)
    step(mine)
    give_grads(mine)
    first, last = parameters_of(mine)
    last.grad = None
    last.grad = torch.ones(4, dtype=torch.float64).to_sparse()
    ref = weakref.ref(first.grad)
    with pytest.raises(RuntimeError):
        mine.step()
    mine.zero_grad()
    assert ref() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exp_avg", torch.zeros(2, 2)),
        ("exp_avg_sq", torch.zeros(3, dtype=torch.int8)),
        ("exp_avg", torch.zeros(3) * 1j),
    ],
)
def test_a_state_that_cannot_be_used(backend, name, value):
    mine = ours(ADAMW, parameters([(2,), (3,)]), backend)
    step(mine)
    mine.state[parameters_of(mine)[1]][name] = value
    give_grads(mine)
    before = snapshot(mine)
    with pytest.raises(RuntimeError, match=rf"AdamW: state '{name}' (has|is) .*parameter 1, shape \(3,\)"):
        mine.step()
    assert_untouched(before, mine)


# Backends.


@pytest.mark.parametrize("name", ["no_such_backend", 3, "CPU"])
def test_unknown_backend(name, monkeypatch):
    with pytest.raises(ValueError, match=f"Invalid backend: {name!r} .*reference"):
        fusedstep.AdamW(parameters(), backend=name)
    with pytest.raises(ValueError, match="Invalid backend"), fusedstep.use_backend(name):
        pass
    monkeypatch.setenv("FUSEDSTEP_BACKEND", str(name))
    with pytest.raises(ValueError, match="Invalid FUSEDSTEP_BACKEND"):
        fusedstep.AdamW(parameters())
    assert fusedstep.AdamW(parameters(), backend="reference")


def test_where_the_backend_is_chosen(monkeypatch):
    def used(**options):
        mine = fusedstep.SGD(parameters(), **options)
        step(mine)
        return mine.backends_used

    assert used() == {"cpu"}
    monkeypatch.setenv("FUSEDSTEP_BACKEND", "reference")
    assert used() == {"reference"}
    with fusedstep.use_backend("cpu"):
        assert used() == {"cpu"}
        with fusedstep.use_backend("reference"):
            assert used() == {"reference"}
            assert used(backend="cpu") == {"cpu"}
        assert used() == {"cpu"}
        with pytest.raises(KeyError), fusedstep.use_backend("reference"):
            raise KeyError
        assert used() == {"cpu"}
    assert used() == {"reference"}
    monkeypatch.setenv("FUSEDSTEP_BACKEND", "")
    assert used() == {"cpu"}


def test_a_backend_that_cannot_run_says_so_at_construction():
    if "cuda" not in fusedstep.backends.BACKENDS:
        pytest.skip("there is no cuda backend")
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot update torch.float32 parameters on cpu: .*auto"):
        fusedstep.AdamW(parameters(dtype=torch.float32), backend="cuda")
    mine = fusedstep.AdamW(parameters([(2,)]), backend="cpu")
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot update .* on meta"):
        mine.add_param_group({"params": [torch.ones(2, device="meta", requires_grad=True)]})
    assert len(mine.param_groups) == 1


@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
def test_after_an_error_training_goes_on_as_if_nothing_had_been(case, backend):
    optimizers = pair(case, backend)
    for number in range(4):
        give_grads(*optimizers)
        first = parameters_of(optimizers[0])[0]
        good, first.grad = first.grad, None
        if number % 2:
            first.grad = sparse(first)
            with pytest.raises(RuntimeError, match="sparse"):
                optimizers[0].step()
        first.grad = good
        for optimizer in optimizers:
            optimizer.step()
    assert_same(*optimizers)
