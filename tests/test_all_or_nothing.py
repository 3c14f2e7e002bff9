"""A step is made for all parameters or for none: what it cannot read or write is found out before anything changes."""

import math

import pytest
import torch
from kinds import LAST, OF_EACH_KIND, each
from support import ADAMW, MOMENTUM, ours, parameters_of

import fusedstep
from fusedstep.verification import same_bits

pytestmark = [
    pytest.mark.plans,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled", "ignore:fusedstep updates"),
]

by_rule = pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)
SHAPE = (4, 6)


def inference(make, *args, **options):
    with torch.inference_mode():
        return make(*args, **options)


class Wrapper(torch.Tensor):
    """A tensor whose numbers are in another one, and whose storage has an offset but no memory."""

    @staticmethod
    def __new__(cls, inside, offset=3):
        kind = torch.Tensor._make_wrapper_subclass
        return kind(cls, inside.shape, strides=inside.stride(), storage_offset=offset, dtype=inside.dtype)

    def __init__(self, inside, offset=3):
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inside, args[0].storage_offset())
        raise NotImplementedError(str(function))


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


# Every form that the same gradient can have. Each is made of the numbers in `plain`, all of them equal.
FORMS = {
    "transposed": lambda plain: plain.t().contiguous().t(),
    "expanded": lambda plain: plain[:, :1].expand(SHAPE),
    "expanded in all dimensions": lambda plain: plain[0, 0].expand(SHAPE),
    "strided": lambda plain: torch.stack([plain, plain], dim=2)[..., 0],
    "negated": lambda plain: torch._neg_view(-plain),
    "of inference mode": lambda plain: inference(plain.clone),
    "transposed, of inference mode": lambda plain: inference(plain.t().contiguous).t(),
    "with a graph": lambda plain: plain.clone().requires_grad_() * 1,
    "one of several views": lambda plain: torch.stack([plain, plain]).unbind()[1],
    "of autograd.grad": lambda plain: torch.autograd.grad((w := plain.clone().requires_grad_()).sum(), w)[0],
    "lazily copied": lambda plain: torch._lazy_clone(plain),
    "plain": lambda plain: plain.clone(),
}
ZEROS = {  # without memory; the same for zeros
    "torch's own zeros": lambda: torch._efficientzerotensor(SHAPE),
    "some of torch's own zeros": lambda: torch._efficientzerotensor((9, 6))[3:7],
}
LEFT = {
    "as they are": {},
    "zeroed": {"zero_grads": True},
    "written": {"write_grads": True},
    "written and clipped": {"write_grads": True, "max_grad_norm": 0.125, "norm_type": math.inf},
}
by_what_is_left = pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)


def without_own_clipping(case):
    return type(case)(case.optimizer, {}) if case.optimizer == "AdamWeightDecay" else case


def assert_every_form_steps_alike(case, backend, left, dtype=torch.float32):
    """Each form of a gradient, all in one step: the bits of the plain one, and the same left in it."""
    plain = torch.ones(SHAPE, dtype=dtype)
    params = [torch.nn.Parameter(torch.full(SHAPE, 0.5, dtype=dtype)) for _ in FORMS]
    zeros = [torch.nn.Parameter(torch.full(SHAPE, 0.5, dtype=dtype)) for _ in range(3)]
    optimizer = ours(case, params + zeros, backend, **left)
    for _ in range(2):
        for param, make in zip(params, FORMS.values(), strict=True):
            param.grad_dtype = None
            param.grad = make(plain.clone())
        for param, make in zip(zeros, [*ZEROS.values(), lambda: torch.zeros(SHAPE)], strict=True):
            param.grad_dtype = None
            param.grad = make()
        versions = [param._version for param in params]
        optimizer.step()
        assert all(param._version > version for param, version in zip(params, versions, strict=True))
        for group in (params, zeros):
            for param in group:  # the plain one comes last
                assert same_bits(param.detach(), group[-1].detach())
                for name, state in optimizer.state.get(group[-1], {}).items():
                    assert same_bits(optimizer.state[param][name], state), name
                assert torch.equal(param.grad, group[-1].grad)
        assert not torch.equal(params[0], torch.full(SHAPE, 0.5, dtype=dtype))
    expected = 0.0 if "zero_grads" in left else 0.125 if "max_grad_norm" in left else 1.0
    assert params[0].grad[0, 0].item() == pytest.approx(expected, rel=1e-5)


@by_what_is_left
def test_every_form_of_a_gradient(engine, left):
    assert_every_form_steps_alike(MOMENTUM, engine, left)


@each(case=OF_EACH_KIND, left=LEFT, dtype=[torch.bfloat16, torch.float32])
def test_every_form_of_a_gradient_with_every_kind_of_rule(backend, case, left, dtype):
    assert_every_form_steps_alike(without_own_clipping(case), backend, left, dtype)


# Inference tensors, which torch writes in inference mode alone.

# Where a weight, a copy beside it and states of other dtypes lie in memory of their own.
KEPT = {
    "plain": {},
    "averaged": {"ema_decay": 0.5, "weights_copy": torch.bfloat16},
    "master": {"master_weights": True},
    "kahan": {"kahan": True},
    "8bit": {"state_dtype": "8bit"},
}


@pytest.mark.parametrize("left", [LEFT["zeroed"], LEFT["written and clipped"]], ids=["zeroed", "written"])
def test_weights_states_and_gradients_of_inference_mode(engine, left):
    check_inference(ADAMW, engine, left)


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_inference_tensors_beside_weights_and_states(backend, kept):
    check_inference(ADAMW, backend, kept)


@by_rule
def test_inference_tensors_with_every_kind_of_rule(backend, case):
    check_inference(without_own_clipping(case), backend, LEFT["written and clipped"])


def check_inference(case, backend, options):
    """Two of three weights are of inference mode, one of these has no dense memory; each second step is made there."""
    dtype = torch.bfloat16 if {"master_weights", "kahan"} & options.keys() else torch.float32
    shape = (64, 64) if "state_dtype" in options else SHAPE  # smaller states are not in 8 bits
    values = [torch.randn(shape).to(dtype) for _ in range(3)]

    def make(value):
        return torch.nn.Parameter(torch.stack([value, value], dim=2)[..., 0])

    plain = ours(case, [make(value) for value in values], backend, **options)
    mixed = ours(
        case,
        [make(values[0]), inference(make, values[1]), inference(lambda v: torch.nn.Parameter(v.clone()), values[2])],
        backend,
        **options,
    )
    for number in range(4):
        grads = [torch.randn(shape).to(dtype) for _ in values]
        for param, grad in zip(parameters_of(plain), grads, strict=True):
            param.grad = grad.clone()
        for index, (param, grad) in enumerate(zip(parameters_of(mixed), grads, strict=True)):
            param.grad = inference(grad.clone) if index == number % 3 else grad.clone()
        plain.step()
        with torch.inference_mode(number % 2 == 0):
            mixed.step()
        for a, b in zip(*map(parameters_of, (mixed, plain)), strict=True):
            assert same_bits(a.detach(), b.detach())
            assert torch.equal(a.grad, b.grad)
            for name, state in plain.state[b].items():
                assert same_bits(mixed.state[a][name], state), name
    # So can states that the user made there, or loaded there.
    with torch.inference_mode():
        state = mixed.state_dict()
        state["state"] = {
            i: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
            for i, s in state["state"].items()
        }
        mixed.load_state_dict(state)
    for optimizer in (plain, mixed):
        for param in parameters_of(optimizer):
            param.grad = torch.ones(shape, dtype=dtype)
        optimizer.step()
    for a, b in zip(*map(parameters_of, (mixed, plain)), strict=True):
        assert same_bits(a.detach(), b.detach())


# Errors.


def set_grad(grad):
    def change(optimizer, param):
        param.grad_dtype = None
        param.grad = grad(param)

    return change


def set_state(make):
    """Replaces the first state that has the shape of its parameter."""

    def change(optimizer, param):
        state = optimizer.state[param]
        name = next(name for name in optimizer.state_names if name in state and state[name].shape == param.shape)
        state[name] = make(state[name])

    return change


def set_option(name, value):
    def change(optimizer, param):
        optimizer.param_groups[1][name] = value

    return change


def change_data(make):
    def change(optimizer, param):
        grad, param.grad = param.grad, None
        param.data = make(param.data)
        param.grad_dtype = None
        if grad.shape == param.shape and grad.device == param.device:
            param.grad = grad
        else:
            param.grad = torch.ones_like(param)

    return change


def resized_to_nothing(optimizer, param):
    param.grad = torch.ones_like(param)
    freed(param.data)


# What is wrong with the second parameter, in the second group: how that comes about, and the error.
NO_MEMORY = (ValueError, "no memory of its own")
WRONG = {
    "a gradient in a wrapper": (set_grad(lambda p: Wrapper(torch.ones(SHAPE))), *NO_MEMORY),
    "a gradient in a wrapper, far out": (set_grad(lambda p: Wrapper(torch.ones(SHAPE), 1 << 45)), *NO_MEMORY),
    "a gradient in a transposed wrapper": (set_grad(lambda p: Wrapper(torch.ones(6, 4).t())), *NO_MEMORY),
    "a gradient whose storage was freed": (set_grad(lambda p: freed(torch.ones(SHAPE))), *NO_MEMORY),
    "a part of a gradient that was freed": (set_grad(lambda p: freed(torch.ones(9, 6)[3:7])), *NO_MEMORY),
    "a weight whose storage was freed": (resized_to_nothing, *NO_MEMORY),
    "a state whose storage was freed": (set_state(lambda s: freed(s.clone())), *NO_MEMORY),
    "a state in a wrapper": (set_state(lambda s: Wrapper(torch.zeros(SHAPE))), *NO_MEMORY),
    "a meta state": (set_state(lambda s: s.to("meta")), *NO_MEMORY),
    "a state of another shape": (set_state(lambda s: torch.zeros(3)), RuntimeError, "has shape"),
    "a state of another kind": (set_state(lambda s: s.to(torch.complex64)), RuntimeError, "has dtype"),
    "an integer state": (set_state(lambda s: s.long()), RuntimeError, "has dtype"),
    "a sparse state": (set_state(lambda s: s.to_sparse()), RuntimeError, "has layout"),
    "a weight of another shape": (change_data(lambda w: torch.ones(2, 3)), RuntimeError, "has shape"),
    "an expanded weight": (change_data(lambda w: torch.ones(1).expand(SHAPE)), ValueError, "share one memory location"),
    "a sparse gradient": (set_grad(lambda p: torch.ones(SHAPE).to_sparse()), RuntimeError, "sparse"),
    "a number that no float can hold": (set_option("lr", 10**400), ValueError, "lr of parameter group 1"),
    "a rate without a value": (set_option("lr", torch.ones((), device="meta")), ValueError, "lr of parameter group 1"),
    "a complex rate": (set_option("lr", torch.tensor(1j)), TypeError, "lr of parameter group 1"),
    "two rates": (set_option("lr", torch.ones(2)), ValueError, "lr of parameter group 1"),
    "text for a rate": (set_option("lr", "0.1"), TypeError, "Invalid lr: '0.1'"),
    "a flag of two": (set_option("maximize", torch.ones(2)), (TypeError, ValueError), "maximize"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_an_error_of_a_step_comes_before_anything_is_made(backend, wrong):
    for options in ({}, LEFT["zeroed"], LEFT["written and clipped"]):
        check_wrong(ADAMW, backend, wrong, options)


@by_rule
def test_an_error_of_a_step_with_every_kind_of_rule(backend, case):
    case = without_own_clipping(case)
    for wrong in WRONG.values():
        check_wrong(case, backend, wrong, {})


def check_wrong(case, backend, wrong, options):
    """Beside a parameter that is wrong, one whose first step this would be, and one that has steps behind it."""
    change, error, text = wrong
    params = [torch.nn.Parameter(torch.ones(SHAPE)) for _ in range(3)]
    groups = [{"params": [("fresh", params[0])]}, {"params": [("wrong", params[1]), ("old", params[2])]}]
    optimizer = ours(case, groups, backend, **options)
    give_ones(params[1:])
    optimizer.step()
    give_ones(params)
    try:
        change(optimizer, params[1])
    except StopIteration:
        return  # this class has no such state
    if text == "sparse" and params[1].grad.layout == torch.sparse_coo and case.optimizer in ("SGD", "Adagrad"):
        return  # which take those
    before = everything(optimizer, params)
    for _ in range(2):
        with pytest.raises(error, match=text) as raised:
            optimizer.step()
        assert "'wrong'" in str(raised.value) or "parameter group 1" in str(raised.value)
        assert_same_things(everything(optimizer, params), before)


def give_ones(params):
    for param in params:
        param.grad = torch.ones(SHAPE)


def everything(optimizer, params):
    """All that a step could change: every object, its version, and its numbers where it has some."""
    found = {}
    for index, param in enumerate(params):
        found[index] = param
        found[index, "grad"] = param.grad
        found |= {(index, name): value for name, value in optimizer.state.get(param, {}).items()}
        found[index, "counter"] = optimizer.stepper.kept.step.beside.get(param)
    return {key: (value, version(value), numbers(value)) for key, value in found.items()}


def version(value):
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def numbers(value):
    if not isinstance(value, torch.Tensor) or isinstance(value, Wrapper) or value.is_meta:
        return None
    if value.layout != torch.strided:
        return value.detach().to_dense()
    return value.detach().clone() if value.untyped_storage().nbytes() else None


def assert_same_things(found, before):
    assert found.keys() == before.keys()
    for key, (value, old_version, old_numbers) in before.items():
        assert found[key][0] is value, key
        assert found[key][1] == old_version, key
        assert old_numbers is None or torch.equal(found[key][2], old_numbers), key


HUGE = 10**400


@pytest.mark.parametrize("case", LAST, ids=str)
def test_a_number_that_no_float_can_hold_is_refused_where_it_is_given(case):
    """In every option that is a number, by the constructor and by `add_param_group`."""
    make = getattr(fusedstep, case.optimizer)
    first, second = (torch.nn.Parameter(torch.ones(SHAPE)) for _ in range(2))
    optimizer = make([first], **case.options)
    numbers = [name for name, value in optimizer.defaults.items() if type(value) is float]
    assert numbers
    for name in numbers:
        text = f"Invalid {name} of parameter group 1: int too large"
        with pytest.raises(ValueError, match=text):
            make([{"params": [first]}, {"params": [second], name: HUGE}], **case.options)
        with pytest.raises(ValueError, match=text):
            optimizer.add_param_group({"params": [second], name: HUGE})
        assert len(optimizer.param_groups) == 1


def test_other_numbers_that_no_float_can_hold():
    param = torch.nn.Parameter(torch.ones(SHAPE))
    for options in ({"max_grad_norm": HUGE}, {"norm_type": HUGE}, {"ema_decay": HUGE}):
        with pytest.raises(ValueError, match=f"Invalid {next(iter(options))}"):
            fusedstep.SGD([param], lr=0.1, **options)
    optimizer = fusedstep.SGD([param], lr=0.1)
    param.grad = torch.ones(SHAPE)
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        optimizer.step(max_grad_norm=HUGE)
    accumulator = fusedstep.GradientAccumulator([param])
    with pytest.raises(ValueError, match="Invalid weight"):
        accumulator(weight=HUGE)
    assert torch.equal(param.detach(), torch.ones(SHAPE))
    assert accumulator.step == 0


@pytest.mark.parametrize(("name", "betas"), [("AdamW", (1.0, 0.9)), ("AdaBelief", (0.9, 1.0))])
def test_an_option_that_the_reference_cannot_compute_with_leaves_all_as_it_was(name, betas):
    params = [torch.nn.Parameter(torch.ones(SHAPE)) for _ in range(2)]
    optimizer = getattr(fusedstep, name)([{"params": [param]} for param in params], backend="reference")
    optimizer.param_groups[1]["betas"] = betas
    give_ones(params)
    before = everything(optimizer, params)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert_same_things(everything(optimizer, params), before)


# A parameter without a gradient takes no part.


def shaped(optimizer, param):
    param.data = torch.ones(2, 3)


def of_a_dtype(dtype):
    def change(optimizer, param):
        param.data = param.data.to(dtype)

    return change


def stateless(optimizer, param):
    optimizer.state[param] = {name: torch.zeros(3) for name in optimizer.state_names}


BESIDES = {
    "another shape": shaped,
    "a complex weight": of_a_dtype(torch.complex64),
    "a narrower weight": of_a_dtype(torch.bfloat16),
    "no memory": lambda optimizer, param: freed(param.data),
    "an expanded weight": lambda optimizer, param: setattr(param, "data", torch.ones(1).expand(SHAPE)),
    "states of another shape": stateless,
}


@each(case=OF_EACH_KIND, change=BESIDES)
def test_a_parameter_without_a_gradient_takes_no_part(backend, case, change):
    check_besides(case, backend, change)


@pytest.mark.parametrize("change", [shaped, BESIDES["no memory"]], ids=["another shape", "no memory"])
def test_a_parameter_without_a_gradient_takes_no_part_on_any_backend(engine, change):
    check_besides(ADAMW, engine, change)


def check_besides(case, backend, change):
    params = [torch.nn.Parameter(torch.ones(SHAPE)) for _ in range(3)]
    other = [torch.nn.Parameter(torch.ones(SHAPE))]
    optimizer, expected = ours(case, params, backend), ours(case, other, backend)
    give_ones(params[1:])
    optimizer.step()
    params[1].grad = None
    change(optimizer, params[1])
    before = optimizer.state.get(params[1])
    for _ in range(3):
        give_ones([params[0], params[2], other[0]])
        optimizer.step()
        expected.step()
        assert same_bits(params[0].detach(), other[0].detach())
        assert optimizer.state.get(params[1]) is before
    # Once it has a gradient that fits, it is noticed: it takes part, or its error names it.
    params[1].data = torch.ones(SHAPE)
    optimizer.state.pop(params[1], None)
    optimizer.stepper.kept.step.beside.pop(params[1], None)
    params[1].grad_dtype = None
    params[1].grad = torch.ones(SHAPE)
    optimizer.step()
    assert not torch.equal(params[1].detach(), torch.ones(SHAPE))


# Skipped steps.


def mixture():
    """Gradients of every kind, one of them not finite; the first rows of two are what they name."""
    sparse = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 6), SHAPE, is_coalesced=True, check_invariants=True)
    return {
        "transposed": torch.full((6, 4), math.inf).t(),
        "plain": torch.ones(SHAPE),
        "none": None,
        "of another dtype": torch.ones(SHAPE, dtype=torch.float64),
        "sparse": sparse,
        "expanded": torch.ones(1).expand(SHAPE),
        "of inference mode": inference(torch.ones, SHAPE),
        "zeros": torch._efficientzerotensor(SHAPE),
    }


MIXED = ("plain", "none", "of another dtype", "sparse", "expanded", "of inference mode", "zeros")
MIXTURES = [(), *((name,) for name in MIXED), MIXED, MIXED[1:]]


@each(
    how=["skip_nonfinite", "fusedstep.GradScaler", "torch.amp.GradScaler"],
    left={name: LEFT[name] for name in ("zeroed", "written", "as they are")},
)
def test_a_skipped_step_with_any_mixture_of_gradients(engine, how, left):
    if "triton" in engine and how != "skip_nonfinite":
        pytest.skip("its kernels see the same flag")
    for names in MIXTURES if engine == "cpu" else MIXTURES[-2:]:
        check_skipped(engine, how, left, names)


def check_skipped(backend, how, left, names):
    options = {"skip_nonfinite": True} if how == "skip_nonfinite" else {}
    params = {name: torch.nn.Parameter(torch.ones(SHAPE)) for name in ("transposed", *names)}
    optimizer = fusedstep.SGD(params.values(), lr=1.0, backend=backend, **left, **options)
    scaler = None
    if not options:
        kind = fusedstep.GradScaler if how.startswith("fusedstep") else torch.amp.GradScaler
        scaler = kind("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
    for number in range(3):  # without plans, with new ones, with old ones
        grads = mixture()
        if number == 1:
            grads["transposed"] = torch.zeros(SHAPE)
            grads = {name: None if name != "transposed" else grad for name, grad in grads.items()}
        elif scaler is not None and how.startswith("torch"):  # which unscales in place, as these cannot be
            grads |= dict.fromkeys(("expanded", "of inference mode", "zeros"))
        for name, param in params.items():
            param.grad_dtype = None
            param.grad = grads[name]
        before = {name: None if grads[name] is None else grads[name].to_dense().clone() for name in params}
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update(4.0)
        for name, param in params.items():
            assert torch.equal(param.detach(), torch.ones(SHAPE)), name
            if before[name] is None:
                assert param.grad is None
            elif "zero_grads" in left and (scaler is None or not how.startswith("torch")):  # torch's makes no step
                assert not param.grad.to_dense().any(), name
            elif scaler is None or not how.startswith("torch"):
                assert torch.equal(param.grad.to_dense(), before[name]), name


def test_a_step_that_fails_late_does_not_count(monkeypatch):
    """Where momentum begins in mid-training, the steps that were done without it are remembered: once."""
    from fusedstep.backends.reference import ReferencePlan

    param = torch.nn.Parameter(torch.ones(4))
    optimizer = fusedstep.SGD([param], 0.1, backend="reference")
    param.grad = torch.ones(4)
    optimizer.step()
    optimizer.step()
    optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)

    def fail(self, hyper):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(ReferencePlan, "foresee", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
    assert optimizer.schedule_step == 2
    optimizer.step()
    assert optimizer.schedule_step == 3
