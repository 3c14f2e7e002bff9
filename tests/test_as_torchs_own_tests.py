"""What torch's tests of its optimizers ask of every class: copies, keys of groups, errors and when they come."""

import copy
import io
import math
import pickle

import pytest
import torch
from support import each, few, ours, theirs

import fusedstep
from fusedstep.cases import CASES

CLASSES = {case.optimizer: case for case in CASES}
# A class with states from the start, one without any, and two whose number of steps is kept otherwise.
FEW = few(CLASSES, "Adagrad", "AdamW", "SGD", "AdaBelief", "Lion")
COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": lambda optimizer: torch.load(saved(optimizer), weights_only=False),
}


def saved(something):
    file = io.BytesIO()
    torch.save(something, file)
    file.seek(0)
    return file


def new(*shape, **options):
    return torch.nn.Parameter(torch.ones(*shape or (4, 3), **options))


def step(optimizer, times=1):
    for _ in range(times):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()


def public(optimizer):
    """All that is public and no method, with the number of a parameter in its place."""
    params = [param for group in optimizer.param_groups for param in group["params"]]

    def plain(value):
        if isinstance(value, torch.Tensor):
            number = next((f"parameter {n}" for n, param in enumerate(params) if param is value), None)
            return number or (value.dtype, value.tolist())
        if isinstance(value, dict):
            return {plain(key): plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value

    # The stepper is no user's.
    names = [name for name in dir(optimizer) if not name.startswith("_") and name not in ("copies", "stepper")]
    values = {name: getattr(optimizer, name) for name in names}
    if optimizer.stepper.options["weights_copy"]:
        values["copies"] = optimizer.copies
    return {name: plain(value) for name, value in values.items() if not callable(value)}


OPTIONS = {
    "plain": {},
    "norm": {"max_grad_norm": 1.0, "norm_type": math.inf, "write_grads": True},
    "follow": {"ema_decay": 0.5, "weights_copy": torch.bfloat16, "skip_nonfinite": True},
}


@each(case=FEW, options=OPTIONS, copier=COPIERS)
def test_a_copy_has_all_public_attributes(case, options, copier, backend):
    optimizer = ours(case, [new(), new(3)], backend, **options)
    for times in (0, 2):
        step(optimizer, times)
        attributes = public(optimizer)
        copied = copier(optimizer)
        assert public(copied) == attributes
        assert {"kernel_calls", "grad_norm", "backends_used", "schedule_step", "defaults"} <= attributes.keys()
        step(copied)
        assert public(optimizer) == attributes  # its own memory
    assert attributes["backends_used"] == {backend}
    assert (attributes["kernel_calls"] > 0) == (backend != "reference")


def test_a_pickle_of_each_class_from_when_it_lay_in_the_package_itself_loads():
    for name, case in CLASSES.items():
        optimizer = ours(case, [new()])
        step(optimizer)
        pickled = pickle.dumps(optimizer, protocol=0)  # the protocol that writes names without their lengths
        assert pickled.count(b"cfusedstep.optimizers.") == 1, name
        copied = pickle.loads(pickled.replace(b"cfusedstep.optimizers.", b"cfusedstep."))
        assert type(copied) is type(optimizer)
        assert public(copied) == public(optimizer), name


@each(case=FEW, way=[*COPIERS, "load", "load the parent's"])
def test_groups_have_the_keys_from_before(case, way, backend):
    """So that save, load, save gives the same; a group that joins later has those keys too."""
    optimizer = ours(case, [new()], backend)
    step(optimizer)
    before, defaults = copy.deepcopy(optimizer.state_dict()), list(optimizer.defaults)
    if way in COPIERS:
        other = COPIERS[way](optimizer)
    else:
        other = ours(case, [new()], backend)
        if way == "load":
            other.load_state_dict(torch.load(saved(before), weights_only=True))
        else:
            parent = theirs(case, [new()])
            step(parent)
            other.load_state_dict(parent.state_dict())
            allowed = {*before["param_groups"][0], *parent.state_dict()["param_groups"][0]}
            assert set(other.param_groups[0]) <= {*allowed, "params"}
    if way != "load the parent's":
        torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
        assert list(other.state_dict()["param_groups"][0]) == list(before["param_groups"][0])
    assert list(other.defaults) == defaults
    other.add_param_group({"params": [new()]})
    assert set(other.param_groups[1]) == {*before["param_groups"][0]}


def parent_of(name):
    return getattr(torch.optim, {"TorchAdafactor": "Adafactor"}.get(name, name))


def sparse():
    param = new(4, 3)
    param.grad = torch.eye(4, 3).to_sparse()
    return [param]


def complex_with_gradient():
    param = new(2, 3, dtype=torch.complex64)
    param.grad = torch.ones_like(param)
    return [param]


TORCHS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "TorchAdafactor")
LR = {"lr": 1e-2}
ERRORS = [  # classes, parameters, options, the parent's words; each in every class that has the option
    (TORCHS, lambda: new(), {}, "params argument given to the optimizer should be an iterable of Tensors or dicts"),
    (TORCHS, lambda: [], {}, "optimizer got an empty parameter list"),
    (TORCHS, lambda: [1.0], {}, "optimizer can only optimize Tensors"),
    (TORCHS, lambda: [new() * 2], {}, "can't optimize a non-leaf Tensor"),
    (TORCHS, lambda: [new()] * 2, {}, "a parameter group with duplicate parameters"),
    (TORCHS, lambda: [{"params": p} for p in [new()] * 2], {}, "some parameters appear in more than one"),
    (TORCHS, lambda: [("a", new()), new()], {}, "Some param names are missing"),
    (
        TORCHS,
        lambda: [{"params": [new()]}, {"params": [("a", new())]}],
        {},
        "all optimizer param groups should be with",
    ),
    (("TorchAdafactor",), complex_with_gradient, {}, "Adafactor does not support complex parameters"),
    (("Adam", "AdamW", "RMSprop", "TorchAdafactor"), sparse, {}, "does not support sparse gradients"),
    (("Adagrad",), sparse, {"weight_decay": 0.1}, "weight_decay option is not compatible with sparse gradients"),
]


def outcome(cls, params, options):
    call = "constructor"
    try:
        optimizer = cls(params(), **options)
        call = "step"
        optimizer.step()
    except Exception as error:
        return call, type(error), str(error)
    return None


@pytest.mark.parametrize(
    ("names", "params", "options", "words"), ERRORS, ids=[f"{words[:40]}-{options}" for *_, options, words in ERRORS]
)
def test_errors_of_torchs_come_from_the_same_call_with_their_words(names, params, options, words):
    for name in names:
        expected = outcome(parent_of(name), params, options)
        mine = outcome(getattr(fusedstep, name), params, options)
        assert mine[:2] == expected[:2], name
        assert words in expected[2], name
        assert words in mine[2], name


@pytest.mark.parametrize("name", ["Adafactor", "TorchAdafactor", "Amos"])
def test_a_complex_parameter_matters_only_once_it_has_a_gradient(name, backend):
    """To rules with sums; it is carried along until then, and no warning speaks of a slow reference."""
    cls = getattr(fusedstep, name)
    options = {"reduce": (0,)} if name == "Amos" else {}
    for choice in (backend, "auto"):
        param, other = new(2, 3), new(2, 3, dtype=torch.complex64)
        optimizer = cls([param, other], backend=choice, **options)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert param.ne(1).all()
        before = param.detach().clone()
        other.grad = torch.ones_like(other)
        with pytest.raises(RuntimeError, match=f"{name} does not support complex parameters .parameter 1"):
            optimizer.step()
        assert torch.equal(param, before)
        assert other not in optimizer.state
        optimizer.add_param_group({"params": [new(3, dtype=torch.complex64)]})
