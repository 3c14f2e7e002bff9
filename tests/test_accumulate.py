"""GradientAccumulator: against plain fp32 and fp64 sums, torch's own accumulation, and in whole training steps."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from kinds import each
from on_gpu import DEVICE, captured, needs_cuda
from support import SHAPES, parameters, parameters_of

import fusedstep
from fusedstep import _C, GradientAccumulator
from fusedstep.backends import BACKENDS
from fusedstep.cases import gradient, layouts

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
by_clearing = pytest.mark.parametrize("set_to_none", [True, False], ids=["set_to_none", "zero"])
EVERY_BACKEND = ["cpu", "reference", "triton"]


@pytest.fixture(params=EVERY_BACKEND)
def every_backend(request):
    reasons = BACKENDS[request.param].reasons(torch.device("cpu"))
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def give(params, skip=()):
    """New gradients, None for the indices in ``skip``; returns copies of them."""
    for index, param in enumerate(params):
        param.grad = None if index in skip else torch.randn(param.shape, dtype=torch.float64).to(param)
    return [None if p.grad is None else p.grad.clone() for p in params]


def total(rounds, weights=None):
    """The weighted sum in the buffers' dtype, added in order."""
    sums = [None] * len(rounds[0])
    for grads, weight in zip(rounds, weights or [1.0] * len(rounds), strict=True):
        for i, grad in enumerate(grads):
            if grad is not None:
                grad = weight * grad.to(wide(grad.dtype))
                sums[i] = grad if sums[i] is None else sums[i] + grad
    return sums


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@each(dtype=FLOATS, set_to_none=[True, False])
def test_every_backend_adds_up_in_fp32_to_the_bit(every_backend, dtype, set_to_none):
    params = parameters([(3, 5), (1000,), (), (0, 3), (17,)], dtype)
    accumulator = GradientAccumulator(params, set_to_none=set_to_none, backend=every_backend)
    for number in range(2):
        weights = [1.0, 0.3, 2.5]
        rounds = []
        for weight in weights:
            rounds.append(give(params))
            accumulator(weight=weight)
            assert all(p.grad is None if set_to_none else p.grad.count_nonzero() == 0 for p in params)
        assert accumulator.step == 3
        expected = total(rounds, weights)
        assert_equal(accumulator.gradients, expected)
        accumulator.assign()
        assert_equal([p.grad for p in params], expected)
        exact = [0.0] * len(params)
        for grads, weight in zip(rounds, weights, strict=True):
            exact = [e + weight * g.double() for e, g in zip(exact, grads, strict=True)]
        for value, truth in zip(expected, exact, strict=True):
            torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)
        accumulator.reset()
        assert accumulator.step == 0
        assert number == 0 or all(p.grad is None or p.grad.dtype == dtype for p in params)


def test_the_mean_is_weighted(every_backend):
    params = parameters(dtype=torch.bfloat16)
    accumulator = GradientAccumulator(params, mean=True, backend=every_backend)
    weights = [3.0, 5.0, 4.0]
    rounds = []
    for number, weight in enumerate(weights):
        rounds.append(give(params, skip=(number,)))
        accumulator(weight=weight)
    expected = [s * (1.0 / 12.0) for s in total(rounds, weights)]
    assert_equal(accumulator.gradients, expected)
    accumulator.assign()
    assert_equal([p.grad for p in params], expected)
    assert_equal(accumulator.gradients, expected)
    accumulator.reset()
    rounds = [give(params)]
    accumulator()
    accumulator.assign()
    assert_equal([p.grad for p in params], total(rounds))


@each(other_layout=[False, True], dtype=[torch.float32, torch.bfloat16], set_to_none=[True, False])
def test_every_layout(backend, dtype, other_layout, set_to_none):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(v) for v in layouts(dtype, "cpu", generator).values()]
    accumulator = GradientAccumulator(params, set_to_none=set_to_none, backend=backend)
    rounds = []
    for number in range(3):
        for param in params:
            param.grad = gradient(param, dtype, generator, other_layout and number != 1)
        rounds.append([p.grad.clone() for p in params])
        accumulator()
        assert set_to_none or all(p.grad.count_nonzero() == 0 for p in params)
    accumulator.assign()
    assert_equal([p.grad for p in params], total(rounds))


@each(dtype=FLOATS, isa=_C.cpu_isas())
def test_every_instruction_set_and_number_of_threads_has_the_same_bits(dtype, isa):
    params = parameters([(n,) for n in (*range(36), 70_001, 200_003)], dtype)
    before, threads = _C.cpu_isa(), torch.get_num_threads()
    rounds = []
    try:
        _C.set_cpu_isa(isa)
        accumulator = GradientAccumulator(params, set_to_none=False, backend="cpu")
        for number in (1, 3):
            torch.set_num_threads(number)
            rounds.append(give(params))
            accumulator(weight=0.7)
            assert all(p.grad.count_nonzero() == 0 for p in params)
    finally:
        _C.set_cpu_isa(before)
        torch.set_num_threads(threads)
    assert_equal(accumulator.gradients, total(rounds, [0.7, 0.7]))


def test_mixed_dtypes_and_groups_are_one_kernel_call():
    groups = [{"params": parameters(dtype=dtype), "lr": 0.1} for dtype in FLOATS]
    accumulator = GradientAccumulator(fusedstep.SGD(groups))
    params = [param for group in groups for param in group["params"]]
    rounds = []
    for _ in range(2):
        rounds.append(give(params))
        accumulator()
        assert accumulator.kernel_calls == 1
    assert_equal(accumulator.gradients, total(rounds))


def test_an_overflow_does_not_outlive_its_round(every_backend):
    params = parameters([(40,)], torch.float16)
    accumulator = GradientAccumulator(params, backend=every_backend)
    for value, expected in ((float("inf"), float("inf")), (float("nan"), float("nan")), (3.0, 6.0)):
        for _ in range(2):
            params[0].grad = torch.full_like(params[0], value)
            accumulator()
        torch.testing.assert_close(accumulator.gradients[0], torch.full((40,), expected), equal_nan=True)
        accumulator.reset()


def test_many_micro_batches_do_not_round_away(backend):
    """In bf16 the sum would stop growing at 256."""
    params = [torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))]
    accumulator = GradientAccumulator(params, backend=backend)
    for _ in range(600):
        params[0].grad = torch.ones_like(params[0])
        accumulator()
    assert torch.equal(accumulator.gradients[0], torch.full((5,), 600.0))


def test_missing_gradients(backend):
    params = parameters()
    accumulator = GradientAccumulator(params, backend=backend)
    skips = [(0, 1, 3), (1, 2), (1,)]
    rounds = []
    for skip in skips:
        rounds.append(give(params, skip))
        accumulator()
    expected = total(rounds)
    assert expected[1] is None
    assert_equal(accumulator.gradients, expected)
    accumulator.assign()
    assert_equal([p.grad for p in params], expected)
    accumulator.reset()
    assert all(p.grad is None for p in params)
    rounds = [give(params, skip=(0,))]  # this one had a gradient in the last round
    accumulator()
    assert_equal(accumulator.gradients, total(rounds))


def test_a_round_without_any_gradient(backend):
    params = parameters()
    accumulator = GradientAccumulator(params, backend=backend, mean=True)
    accumulator()
    accumulator()
    assert accumulator.gradients == [None] * len(params)
    accumulator.assign()
    assert all(p.grad is None for p in params)
    accumulator.reset()


@by_dtype
def test_a_list_of_gradients_as_the_original_takes_it(backend, dtype):
    params = parameters(dtype=dtype)
    accumulator = GradientAccumulator(params, backend=backend, set_to_none=False)
    with pytest.raises(ValueError, match=r"^The accumulator should be called first to initialize the gradients$"):
        _ = accumulator.gradients
    given = [give(params, skip=(2,)) for _ in range(3)]
    kept = [p.grad for p in params]
    before = [None if g is None else g.clone() for g in kept]
    for grads in given:
        accumulator(grads)
        assert_equal(kept, before)
    assert_equal(accumulator.gradients, total(given))
    for wrong in ([], given[0][:-1], [*given[0], None]):
        with pytest.raises(ValueError, match=f"^Expected 4 gradients, but got {len(wrong)}$"):
            accumulator(wrong)
    assert accumulator.step == 3
    assert_equal(accumulator.gradients, total(given))
    accumulator.assign()
    assert_equal([p.grad for p in params], total(given))
    accumulator.reset()
    assert all(p.grad is old for p, old in zip(params, kept, strict=True))
    assert_equal(kept, before)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(7), r"the gradient has shape \(7,\), it must be that of parameter 1 'b', shape \(3,\)"),
        (torch.ones(3, dtype=torch.int64), "the gradient has dtype torch.int64, it must be floating like parameter 1"),
        (torch.ones(3, device="meta"), "the gradient is on meta, it must be on the device of parameter 1"),
        (torch.ones(3).to_sparse(), r"does not support sparse gradients \(parameter 1 'b'"),
        (torch.ones(3, dtype=torch.complex64), "dtype torch.complex64"),
    ],
    ids=["shape", "dtype", "device", "sparse", "complex"],
)
def test_a_gradient_that_cannot_be_added_changes_nothing(backend, bad, message):
    params = parameters([(2,), (3,)], torch.float32)
    accumulator = GradientAccumulator(zip("ab", params, strict=True), backend=backend)
    first = [torch.ones(2), torch.ones(3)]
    accumulator(first)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            accumulator([torch.ones(2), bad])
        assert accumulator.step == 1
        assert_equal(accumulator.gradients, first)
    with pytest.raises(TypeError, match="Expected a Tensor or None for each gradient, but got float"):
        accumulator([1.0, None])
    accumulator(first)
    assert_equal(accumulator.gradients, [torch.full((2,), 2.0), torch.full((3,), 2.0)])


def test_bad_arguments():
    with pytest.raises(ValueError, match="empty parameter list"):
        GradientAccumulator([])
    for bad in (torch.ones(3), 3):
        with pytest.raises(TypeError, match="should be an optimizer or an iterable of Tensors"):
            GradientAccumulator(bad)
    with pytest.raises(TypeError, match="can only take Tensors, but one of the params is 'a'"):
        GradientAccumulator(["a"])
    with pytest.raises(ValueError, match=r"non-leaf Tensor: parameter 1 'b', shape \(3,\)"):
        GradientAccumulator([("a", torch.ones(2)), ("b", torch.ones(3, requires_grad=True) * 2)])
    with pytest.raises(TypeError, match="Invalid mean value"):
        GradientAccumulator(parameters(), mean="yes")
    with pytest.raises(ValueError, match="Invalid backend"):
        GradientAccumulator(parameters(), backend="gpu")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot"):
        GradientAccumulator(parameters(), backend="cuda")
    accumulator = GradientAccumulator(parameters())
    for weight in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="Invalid weight"):
            accumulator(weight=weight)
    for weight in (True, "1", None):
        with pytest.raises(TypeError, match="Invalid weight"):
            accumulator(weight=weight)
    assert accumulator.step == 0


def test_calls_out_of_order():
    params = parameters()
    accumulator = GradientAccumulator(params)
    accumulator.reset()
    with pytest.raises(ValueError, match="should be called first"):
        accumulator.assign()
    give(params)
    accumulator()
    accumulator.assign()
    for call in (accumulator, accumulator.assign, accumulator.state_dict):
        with pytest.raises(RuntimeError, match=r"handed over; call reset\(\)"):
            call()
    accumulator.reset()
    with pytest.raises(ValueError, match="should be called first"):
        accumulator.assign()


@by_clearing
def test_gradients_are_16_bit_again_after_a_round(backend, set_to_none):
    params = parameters(dtype=torch.bfloat16)
    accumulator = GradientAccumulator(params, backend=backend, set_to_none=set_to_none)
    grads, versions = None, None
    for _ in range(2):
        give(params)
        grads, versions = [p.grad for p in params], [p.grad._version for p in params]
        accumulator()
        if not set_to_none:
            assert all(g._version > v for g, v in zip(grads, versions, strict=True))
        accumulator.assign()
        assert all(p.grad.dtype == torch.float32 for p in params)
        accumulator.reset()
        assert all(p.grad_dtype == torch.bfloat16 for p in params)
        assert all(p.grad is (None if set_to_none else g) for p, g in zip(params, grads, strict=True))
    accumulator(grads)
    accumulator.assign()
    for param in params:
        param.grad = None  # as zero_grad() does, in place of reset()
        (param * 3).sum().backward()
    accumulator.reset()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.eq(3).all() for p in params)


@each(
    source=[list, fusedstep.SGD, torch.optim.SGD],
    end=["reset", "load", "during"],
    dtype=[torch.float16, torch.bfloat16],
    set_to_none=[True, False],
)
def test_a_parameter_that_is_converted_after_a_round_gets_gradients_of_its_new_dtype(dtype, set_to_none, source, end):
    (param,) = params = parameters([(2,)], dtype=dtype)
    accumulator = GradientAccumulator(source(params), set_to_none=set_to_none)
    saved = accumulator.state_dict()
    param.sum().backward()
    accumulator()
    accumulator.assign()
    if end == "reset":
        accumulator.reset()
    elif end == "load":
        accumulator.load_state_dict(saved)
    param.data = param.data.float()
    if end == "during":
        accumulator.reset()
    param.grad = None
    (param * torch.tensor([1.0001, 1e5])).sum().backward()
    assert torch.equal(param.grad, torch.tensor([1.0001, 1e5]))
    assert param.grad_dtype == torch.float32


@each(chosen=[None, torch.float32, torch.float16], dtype=[torch.float16, torch.float32])
def test_a_round_leaves_alone_what_the_user_has_chosen_for_gradients(chosen, dtype, backend):
    (param,) = parameters([(3,)], dtype=dtype)
    param.grad_dtype = chosen
    accumulator = GradientAccumulator([param], backend=backend)
    for _ in range(2):
        param.grad = torch.ones(3, dtype=chosen or torch.float64)
        accumulator()
        accumulator.assign()
        assert param.grad.dtype == torch.float32
        assert param.grad_dtype == chosen
        param.grad.mul_(2)  # as clipping does
        assert accumulator.gradients[0].eq(2).all()
        accumulator.reset()
        assert param.grad_dtype == chosen
        assert param.grad is None


def test_empty_complex_and_frozen_parameters(backend):
    real, frozen = torch.nn.Parameter(torch.zeros(3)), torch.zeros(2)
    number = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))
    params = [real, frozen, number] if backend == "reference" else [real, frozen]
    accumulator = GradientAccumulator(params, backend=backend)
    for _ in range(2):
        real.grad = torch.ones(3)
        number.grad = torch.full((3, 2), 1 + 2j)
        accumulator()
    assert torch.equal(accumulator.gradients[0], torch.full((3,), 2.0))
    assert accumulator.gradients[1] is None
    if backend == "reference":
        assert torch.equal(accumulator.gradients[2], torch.full((3, 2), 2 + 4j))


def test_a_parameter_listed_twice_has_one_gradient(backend):
    (param,) = parameters([(3,)])
    accumulator = GradientAccumulator([param, param], backend=backend)
    (grad,) = give([param])
    accumulator()
    assert_equal(accumulator.gradients, [grad])


def test_groups_that_join_later(backend):
    first, second = parameters(), parameters([(4,), (2, 2)])
    optimizer = fusedstep.AdamW(first, backend=backend)
    accumulator = GradientAccumulator(optimizer)
    rounds = [[*give(first), None, None]]
    accumulator()
    optimizer.add_param_group({"params": second})
    for _ in range(2):
        rounds.append(give([*first, *second]))
        accumulator()
    assert_equal(accumulator.gradients, total(rounds))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(backend, copied):
    params = parameters()
    accumulator = GradientAccumulator(params, backend=backend)
    rounds = [give(params)]
    accumulator()
    other = copied(accumulator)
    for one in (accumulator, other):
        later = give(params)
        one(later)
        assert_equal(one.gradients, total([*rounds, later]))


# Whole steps.


@each(dtype=[torch.bfloat16, torch.float16], make=[torch.optim.AdamW, torch.optim.SGD], set_to_none=[True, False])
def test_an_optimizer_of_torch_takes_a_16_bit_sum_rounded_once(make, dtype, set_to_none, backend):
    params = parameters(dtype=dtype)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    mine, expected = make(params, lr=0.1), make(others, lr=0.1)
    accumulator = GradientAccumulator(mine, set_to_none=set_to_none, backend=backend)
    for _ in range(2):
        rounds = []
        for _ in range(3):
            rounds.append(give(params))
            accumulator()
        accumulator.assign()
        for param, grad in zip(others, total(rounds), strict=True):
            param.grad = grad.to(dtype)
        assert_equal([p.grad for p in params], [p.grad for p in others])
        mine.step()
        expected.step()
        accumulator.reset()
        assert all(p.grad is None if set_to_none else p.grad.dtype == dtype and not p.grad.any() for p in params)
    assert_equal(params, others)


def model_and_batches(dtype, n=8):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1)).to(dtype)
    return model, [(torch.randn(5, 6, dtype=dtype), torch.randn(5, 1, dtype=dtype)) for _ in range(n)]


def loss_of(model, batch):
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


@each(mean={"sum": False, "mean": True}, set_to_none=[True, False])
def test_training_is_that_of_torch_accumulating_by_itself(backend, mean, set_to_none):
    model, batches = model_and_batches(torch.float64)
    other = copy.deepcopy(model)
    mine = fusedstep.AdamW(model.parameters(), lr=0.01, backend=backend)
    expected = torch.optim.AdamW(other.parameters(), lr=0.01)
    accumulator = GradientAccumulator(mine, mean=mean, set_to_none=set_to_none)
    for number, batch in enumerate(batches, 1):
        loss_of(model, batch).backward()
        accumulator()
        (loss_of(other, batch) / (4 if mean else 1)).backward()
        if number % 4 == 0:
            accumulator.assign()
            for optimizer in (mine, expected):
                norm = torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), 0.3)
                assert norm > 0.3
                optimizer.step()
            accumulator.reset()
            expected.zero_grad()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_16_bit_parameter_steps_with_the_unrounded_sum(backend):
    params = parameters(dtype=torch.bfloat16)
    wide_params = [torch.nn.Parameter(p.detach().float()) for p in params]
    mine = fusedstep.SGD(params, lr=0.1, backend=backend)
    expected = torch.optim.SGD(wide_params, lr=0.1)
    accumulator = GradientAccumulator(mine)
    rounds = []
    for _ in range(3):
        rounds.append(give(params))
        accumulator()
    accumulator.assign()
    mine.step()
    for param, grad in zip(wide_params, total(rounds), strict=True):
        param.grad = grad
    expected.step()
    for a, b in zip(params, wide_params, strict=True):
        torch.testing.assert_close(a.detach(), b.detach().bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_unscales_clips_and_skips(backend, unscale):
    model, batches = model_and_batches(torch.float32, 12)
    other = copy.deepcopy(model)
    mine = fusedstep.AdamW(model.parameters(), lr=0.01, backend=backend)
    expected = torch.optim.AdamW(other.parameters(), lr=0.01)
    accumulator = GradientAccumulator(mine)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for number, batch in enumerate(batches, 1):
        if number == 6:
            batch = (batch[0] * float("inf"), batch[1])
        for scaler, net in zip(scalers, (model, other), strict=True):
            scaler.scale(loss_of(net, batch)).backward()
        accumulator()
        if number % 4 == 0:
            accumulator.assign()
            for scaler, optimizer in zip(scalers, (mine, expected), strict=True):
                if unscale:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), 0.3)
                scaler.step(optimizer)
                scaler.update()
            accumulator.reset()
            expected.zero_grad()
    assert [scaler.get_scale() for scaler in scalers] == [512.0, 512.0]
    assert {state["step"].item() for state in mine.state.values()} == {2.0}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_scaled_fp16_gradients_can_be_unscaled(backend):
    """torch refuses to unscale fp16 gradients; the accumulated ones are fp32."""
    params = parameters(dtype=torch.float16)
    mine = fusedstep.SGD(params, lr=1.0, backend=backend)
    accumulator = GradientAccumulator(mine)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    rounds = []
    for _ in range(2):
        rounds.append(give(params))
        accumulator()
    accumulator.assign()
    scaler.unscale_(mine)
    assert_equal([p.grad for p in params], [g / 64 for g in total(rounds)])


# Checkpoints.


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each(at=[0, 1, 2], dtype=[torch.float32, torch.bfloat16])
def test_a_checkpoint_in_mid_accumulation_goes_on_to_the_same_bits(backend, at, dtype):
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    accumulator = GradientAccumulator(params, mean=True, backend=backend)
    rounds = [give(params, skip=(3,) if number < 2 else ()) for number in range(3)]
    for number in range(at):
        accumulator(rounds[number], weight=number + 1.0)
    resumed = GradientAccumulator(others, mean=True, backend=backend)
    give(others)
    resumed()  # of a round that loading ends
    resumed.assign()
    resumed.load_state_dict(saved(accumulator.state_dict()))
    assert resumed.step == at
    assert all(p.grad is None for p in others)
    for number in range(at, 3):
        for one in (accumulator, resumed):
            one(rounds[number], weight=number + 1.0)
    for one in (accumulator, resumed):
        one.assign()
    assert_equal([p.grad for p in others], [p.grad for p in params])
    assert_equal([p.grad for p in others], [s * (1 / 6) for s in total(rounds, [1.0, 2.0, 3.0])])


GOOD = {"step": 2, "weight": 2.0, "gradients": [torch.ones(shape) for shape in SHAPES]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gradient": 1}, ValueError, r"missing keys \[\], unexpected keys \['gradient'\]"),
        ({"step": -1}, ValueError, "'step' is -1, it must be a whole number, 0 or larger"),
        ({"step": 1.5}, ValueError, "'step' is 1.5"),
        ({"weight": 0.0}, ValueError, "'weight' is 0.0, it must be a number larger than 0"),
        ({"weight": "2"}, ValueError, "'weight' is '2'"),
        ({"step": 0, "weight": 0.0}, ValueError, "'step' is 0, but there is a gradient of parameter 0"),
        ({"gradients": None}, TypeError, "'gradients' is a NoneType, it must be a list"),
        ({"gradients": GOOD["gradients"][1:]}, ValueError, "Expected 4 gradients, but got 3"),
        ({"gradients": GOOD["gradients"][::-1]}, ValueError, r"a gradient of shape \(2, 3, 4\) for parameter 0"),
        ({"gradients": [None, None, 3.0, None]}, TypeError, "the gradient of parameter 2.*is a float"),
        ({"gradients": [torch.ones(3, 5).int(), None, None, None]}, ValueError, "dtype torch.int32 for parameter 0"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, message):
    params = parameters(dtype=torch.float32)
    accumulator = GradientAccumulator(params)
    grads = give(params)
    accumulator()
    with pytest.raises(error, match=message):
        accumulator.load_state_dict({**GOOD, **change})
    for key in GOOD:
        with pytest.raises(ValueError, match=rf"missing keys \['{key}'\]"):
            accumulator.load_state_dict({k: v for k, v in GOOD.items() if k != key})
    with pytest.raises(TypeError, match="Expected state_dict to be a dict, got list"):
        accumulator.load_state_dict([])
    assert accumulator.step == 1
    assert_equal(accumulator.gradients, grads)
    accumulator.load_state_dict(GOOD)
    assert accumulator.step == 2
    assert_equal(accumulator.gradients, GOOD["gradients"])


# Several processes.


def reduce_in_two_processes(rank, path, results):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for dtype, mean in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        model, batches = model_and_batches(dtype)
        model.register_parameter("unused", torch.nn.Parameter(torch.zeros(3, dtype=dtype)))
        model.register_parameter("once", torch.nn.Parameter(torch.zeros(3, dtype=dtype)))
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        accumulator = GradientAccumulator(model.parameters(), mean=mean)
        for number, batch in enumerate(batches[rank::2]):
            with parallel.no_sync():
                loss_of(parallel, batch).backward()
            if rank == 1:
                model.once.grad = torch.ones_like(model.once)
            accumulator(weight=1.0 + number + rank)
        accumulator.all_reduce()
        accumulator.assign()
        results[rank, str(dtype), mean] = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    dist.barrier()  # a process that leaves closes the connection that the other may still use
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_under_no_sync_have_the_gradients_of_all_micro_batches(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        processes = [
            context.Process(target=reduce_in_two_processes, args=(rank, tmp_path / "rendezvous", results))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        results = dict(results)
    for dtype, mean in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        model, batches = model_and_batches(dtype)
        sums, weights = [0.0] * 4, 0.0
        for number, batch in enumerate(batches):
            weight = 1.0 + number // 2 + number % 2
            loss_of(model, batch).backward()
            sums = [s + weight * p.grad.double() for s, p in zip(sums, model.parameters(), strict=True)]
            weights += weight
            model.zero_grad()
        divisor = weights if mean else 2
        expected = [*(s / divisor for s in sums), None, torch.full((3,), 14.0 / divisor, dtype=torch.float64)]
        for rank in range(2):
            got = results[rank, str(dtype), mean]
            order = [*got[2:], *got[:2]]  # the model's own parameters come before its modules'
            for a, b in zip(order, expected[:4] + expected[4:], strict=True):
                assert (a is None) == (b is None)
                if b is not None:
                    torch.testing.assert_close(torch.tensor(a, dtype=torch.float64), b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_dtensor_parameters(backend, tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        values = torch.randn(4, 3)
        param = torch.nn.Parameter(distribute_tensor(values.bfloat16(), mesh, [Shard(0)]))
        optimizer = fusedstep.SGD([param], lr=0.1, backend=backend)
        accumulator = GradientAccumulator(optimizer)
        for number in range(1, 4):
            (param * number).sum().backward()
            accumulator()
        with pytest.raises(RuntimeError, match="takes plain parameters"):
            accumulator.all_reduce()
        accumulator.assign()
        assert isinstance(param.grad, DTensor)
        torch.testing.assert_close(param.grad.full_tensor(), torch.full((4, 3), 6.0))
        before = param.full_tensor().detach().clone()
        optimizer.step()
        accumulator.reset()
        torch.testing.assert_close(param.full_tensor().detach(), (before.float() - 0.6).bfloat16())
        assert param.grad is None
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@by_clearing
@by_dtype
def test_a_gpu_has_the_references_bits(kernel, dtype, set_to_none):
    shapes = [(0,), (), (7,), (1025,), (70_001,), (33, 17)]
    params = [p.detach().to(DEVICE).requires_grad_() for p in parameters(shapes, dtype)]
    accumulator = GradientAccumulator(params, mean=True, set_to_none=set_to_none, backend=kernel)
    for _ in range(2):
        rounds = []
        for number in range(3):
            rounds.append([g if g is None else g.cpu() for g in give(params, skip=(number,))])
            accumulator(weight=number + 0.3)
            assert accumulator.kernel_calls == 1
            assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in params)
        expected = [s * (1.0 / accumulator.state_dict()["weight"]) for s in total(rounds, [0.3, 1.3, 2.3])]
        accumulator.assign()
        assert_equal([p.grad.cpu() for p in params], expected)
        accumulator.reset()


@pytest.mark.gpu
@needs_cuda
def test_capturing_the_first_call_says_what_to_do_and_creates_nothing(kernel):
    param = torch.nn.Parameter(torch.ones(10, device=DEVICE))
    param.grad = torch.ones_like(param)
    accumulator = GradientAccumulator([param], set_to_none=False, backend=kernel)

    def first():
        torch.ones(1, device=DEVICE)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match=r"GradientAccumulator met new or changed tensors .* before capturing"):
            accumulator()

    captured(first)
    assert accumulator.step == 0
    accumulator()
    param.grad.fill_(2.0)
    captured(accumulator).replay()
    assert torch.equal(accumulator.gradients[0], torch.full_like(param, 3.0))
