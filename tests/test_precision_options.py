"""The precision options against truths that are not ours, and what they do to state_dicts and bad input."""

import contextlib
import copy
import io
import pickle
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kinds import OF_EACH_STATE, each, examples, few
from support import numbers_of

import fusedstep
from fusedstep import codecs, planning
from fusedstep.backends import BACKENDS
from fusedstep.cases import CASES, Case
from fusedstep.kept import Entry
from fusedstep.kept.weights import AUX
from fusedstep.verification import same_bits

ADAMW = Case("AdamW", {"lr": 0.01, "betas": (0.85, 0.9), "weight_decay": 0.1})
RULES = [CASES[2], CASES[3], ADAMW, next(c for c in CASES if c.optimizer == "Lion")]
by_rule = pytest.mark.parametrize("case", RULES, ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def make(case, values, backend="cpu", **options):
    params = [torch.nn.Parameter(v.clone()) for v in values]
    return getattr(fusedstep, case.optimizer)(params, backend=backend, **{**case.options, **options})


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def step(optimizers, grads):
    for optimizer in optimizers:
        for param, grad in zip(params_of(optimizer), grads, strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


# Random numbers.


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_numbers(counter, key, expected):
    """The known answers of philox4x32-10 in the Random123 distribution (kat_vectors)."""
    words = codecs.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


@each(value=[1.0003, -3.3, 1e-3, 3.1e-5, 3.3e-8], dtype=[torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(backend, dtype, value):
    n = 200_000
    param = torch.nn.Parameter(torch.zeros(n, dtype=dtype))
    param.grad_dtype = None
    param.grad = torch.full((n,), -value)
    fusedstep.SGD([param], lr=1.0, backend=backend, rounding="stochastic", rounding_seed=3).step()
    exact = torch.tensor(value)
    neighbours = param.detach().unique().double()
    assert len(neighbours) == 2
    low, high = neighbours.tolist()
    assert low < exact < high
    standard_error = (high - low) / 2 / n**0.5
    assert abs(param.detach().double().mean().item() - exact.double().item()) < 5 * standard_error


def test_stochastic_rounding_differs_by_step_parameter_element_and_seed():
    def drawn(index, step, seed, n=4096):
        return codecs.random_16(torch.arange(n), seed, index, step)

    base = drawn(0, 1, 0)
    for other in (drawn(1, 1, 0), drawn(0, 2, 0), drawn(0, 1, 1), drawn(0, 1, 2**32), base.roll(1)):
        assert (base == other).float().mean() < 0.01
    assert torch.equal(base[:100], drawn(0, 1, 0, 100))
    assert abs(base.double().mean() / 32767.5 - 1) < 0.05


@HALVES
def test_stochastic_rounding_leaves_what_fits_and_what_is_not_finite(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    for random in (0, 1, 0x1FFF, 0xFFFF):
        narrowed = codecs.narrow_stochastic(every.float(), dtype, torch.full((2**16,), random, dtype=torch.int32))
        assert torch.equal(narrowed.isnan(), every.isnan())
        kept = ~every.isnan()
        assert torch.equal(narrowed[kept].view(torch.int16), every[kept].view(torch.int16))


def test_stochastic_rounding_trains_where_rounding_to_nearest_stands_still():
    drift = {}
    for rounding in ("nearest", "stochastic"):
        param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = fusedstep.SGD([param], lr=1e-4, rounding=rounding)
        for _ in range(500):
            param.grad = torch.ones_like(param)
            optimizer.step()
        drift[rounding] = 1.0 - param.detach().float().mean().item()
    assert drift["nearest"] == 0.0
    assert drift["stochastic"] == pytest.approx(0.05, rel=0.05)


# Weights of more than 16 bits.


@each(case=RULES, weights=[(True, torch.bfloat16), (True, torch.float16), ("split", torch.bfloat16)])
def test_master_weights_train_as_fp32_does(case, backend, weights):
    """Bit for bit: fp32 weights, whose forward pass and gradients are in 16 bits."""
    mode, dtype = weights
    starts = [normal(70, 80, dtype=dtype), normal(33, dtype=dtype)]
    narrow = make(case, starts, backend, master_weights=mode)
    wide = make(case, [s.float() for s in starts], backend)
    for _ in range(20):
        grads = [normal(*s.shape, dtype=dtype) for s in starts]
        step((narrow, wide), grads)
        for param, exact in zip(params_of(narrow), params_of(wide), strict=True):
            exact = exact.detach()
            if mode == "split":
                # To nearest, ties away from zero: through float64, where half a unit can be added exactly.
                unit = torch.exp2(exact.double().abs().log2().floor() - 7)
                rounded = (exact.double() / unit).abs().add(0.5).floor().mul(unit).copysign(exact.double())
                assert torch.equal(param.detach().double(), rounded)
                kept = codecs.join(param.detach(), narrow.state[param]["weight_remainder"])
            else:
                assert torch.equal(param.detach(), exact.to(dtype))
                kept = narrow.state[param]["master_weight"]
            assert torch.equal(kept, exact)


@hypothesis.given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
@examples(200)
def test_a_split_number_is_exact(words):
    bits = torch.tensor(words, dtype=torch.int64)
    x = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    upper, lower = codecs.split(x)
    joined = codecs.join(upper, lower)
    assert same_bits(joined, x)
    assert torch.equal(upper.isnan(), x.isnan())
    finite = x.isfinite()
    nearest = x.to(torch.bfloat16)
    assert (
        (upper.float() - x)[finite & nearest.isfinite()]
        .abs()
        .equal((nearest.float() - x)[finite & nearest.isfinite()].abs())
    )


@HALVES
def test_kahan_follows_fp32_where_16_bits_do_not(backend, dtype):
    start = normal(5000, dtype=dtype)
    wide, plain, kahan = (
        make(ADAMW, [start.float() if o == "wide" else start], backend, lr=1e-5, **options)
        for o, options in (("wide", {}), ("plain", {}), ("kahan", {"kahan": True, "state_dtype": torch.float32}))
    )
    grad = normal(5000, dtype=dtype)
    for _ in range(100):
        step((wide, plain, kahan), [grad])
    (exact,), (rounded,), (param,) = (params_of(o) for o in (wide, plain, kahan))
    error = {
        "plain": (rounded.float() - exact).norm(),
        "kahan": (param.float() + kahan.state[param]["compensation"].float() - exact).norm(),
    }
    assert error["kahan"] < error["plain"] / 20
    assert (kahan.state[param]["compensation"].abs() <= param.abs() * torch.finfo(dtype).eps / 2).all()


@pytest.mark.parametrize("mode", [{"master_weights": True}, {"master_weights": "split"}, {"kahan": True}], ids=str)
def test_weights_that_are_loaded_before_the_first_step_count(mode):
    """Also where states are made at construction."""
    optimizer = make(Case("Adagrad", {"lr": 0.001}), [normal(100, dtype=torch.bfloat16)], **mode)
    (param,) = params_of(optimizer)
    with torch.no_grad():
        param.fill_(100.0)
    step([optimizer], [normal(100)])
    assert (param == 100.0).all()


def test_weights_that_are_set_to_zero_stay_there(backend):
    optimizer = make(CASES[0], [normal(5000, dtype=torch.bfloat16)], backend, master_weights="split")
    (param,) = params_of(optimizer)
    step([optimizer], [normal(5000)])
    with torch.no_grad():
        param.mul_(torch.arange(5000) % 2)  # zeros with and without a sign
    before = param.detach().clone()
    step([optimizer], [torch.zeros(5000)])
    assert torch.equal(param == 0, before == 0)
    assert param.isfinite().all()


@each(dtype=[torch.float32, torch.float64, torch.float16], back=[True, False])
def test_a_model_may_be_moved_to_another_dtype(dtype, back):
    for mode in MODES.values():
        optimizers = [make(ADAMW, [normal(5000, dtype=torch.bfloat16)], b, **mode) for b in ("cpu", "reference")]
        pair = [params_of(o)[0] for o in optimizers]
        pair[1].data.copy_(pair[0].data)
        step(optimizers, [normal(5000)])
        for param in pair:
            param.grad, param.data = None, param.data.to(dtype)
        if mode.get("master_weights") == "split" and dtype == torch.float16:
            for optimizer in optimizers:
                with pytest.raises(ValueError, match="needs bfloat16"):
                    step([optimizer], [normal(5000)])
            continue
        step(optimizers, [normal(5000)])
        if back:
            for param in pair:
                param.grad, param.data = None, param.data.bfloat16()
            step(optimizers, [normal(5000)])
        assert same_bits(*[p.detach() for p in pair])
        a, b = (o.state[p] for o, p in zip(optimizers, pair, strict=True))
        assert a.keys() == b.keys()
        assert all(same_bits(a[key], b[key]) for key in a)
        key = optimizers[0].stepper.kept.weights.format_of(pair[0]).key
        assert [k for k in AUX if k in a] == ([] if key is None else [key])


def test_what_is_kept_follows_a_parameter_to_its_device():
    optimizer = make(ADAMW, [normal(70, 80, dtype=torch.bfloat16)], state_dtype="8bit", master_weights="split")
    step([optimizer], [normal(70, 80)])
    moved = torch.nn.Parameter(torch.empty(70, 80, dtype=torch.bfloat16, device="meta"))
    optimizer.state[moved] = optimizer.state.pop(params_of(optimizer)[0])
    group = optimizer.param_groups[0]
    optimizer.stepper.kept.fields(
        Entry(optimizer, group, 0, None, None, moved, optimizer.state[moved], BACKENDS["cpu"], moved)
    )
    assert {key: value.device.type for key, value in optimizer.state[moved].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "weight_remainder"), "meta"
    )


def test_master_weights_have_fp32_states_unless_told_otherwise():
    for options, dtype in (({}, torch.float32), ({"state_dtype": torch.bfloat16}, torch.bfloat16)):
        optimizer = make(ADAMW, [normal(10, dtype=torch.bfloat16)], master_weights="split", **options)
        step([optimizer], [normal(10)])
        assert optimizer.state[params_of(optimizer)[0]]["exp_avg"].dtype == dtype


# What is quantized.


def test_what_stays_wide(backend):
    shapes = {
        "tok_emb.weight": (100, 80),
        "transformer.wte.weight": (100, 80),
        "fc.weight": (64, 64),
        "fc.bias": (4095,),
        "head.weight": (80, 100),
    }
    named = [(name, torch.nn.Parameter(normal(*shape))) for name, shape in shapes.items()]

    def narrow(**options):
        optimizer = fusedstep.AdamW([(n, torch.nn.Parameter(p.detach())) for n, p in named], backend=backend, **options)
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()
        kept = {n: optimizer.state[p]["exp_avg"].dtype for (n, _), p in zip(named, params_of(optimizer), strict=True)}
        assert set(kept.values()) <= {torch.int8, torch.float32}
        return {name for name, dtype in kept.items() if dtype == torch.int8}

    assert narrow(state_dtype="8bit") == {"fc.weight", "head.weight"}
    assert narrow(state_dtype="8bit", wide_states=()) == set(shapes) - {"fc.bias"}
    assert narrow(state_dtype="8bit", wide_states=["^head", r"\bfc\b"]) == {"tok_emb.weight", "transformer.wte.weight"}


def test_names_of_embeddings_may_be_compiled_patterns_with_flags():
    optimizer = fusedstep.AdamW(
        [("EMB", torch.nn.Parameter(normal(70, 80)))],
        state_dtype="8bit",
        wide_states=[re.compile("emb", re.IGNORECASE)],
    )
    step([optimizer], [normal(70, 80)])
    assert optimizer.state[params_of(optimizer)[0]]["exp_avg"].dtype == torch.float32
    copy = pickle.loads(pickle.dumps(optimizer))
    step([copy], [normal(70, 80)])
    assert copy.state[params_of(copy)[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@each(names=[("emb", "head"), ("head", "emb")], case=[ADAMW, Case("Adagrad", {"lr": 0.1})])
def test_of_two_names_the_first_tells_what_stays_wide(case, names):
    """Else the two updates of a step would each have a state."""
    param = torch.nn.Parameter(normal(70, 80))
    optimizer = getattr(fusedstep, case.optimizer)(
        [(name, param) for name in names], **case.options, state_dtype="8bit"
    )
    once = make(case, [param.detach()], state_dtype="8bit" if names[0] == "head" else None)
    for _ in range(2):
        grad = normal(70, 80)
        param.grad = grad.clone()
        optimizer.step()
        step([once, once], [grad])
    assert torch.equal(param, params_of(once)[0])
    assert optimizer.state[param].keys() == once.state[params_of(once)[0]].keys()


@pytest.mark.parametrize(("narrow", "momentum"), [("8bit", torch.int8), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_a_variance_is_not_the_difference_of_two_narrow_numbers(backend, narrow, momentum):
    """It would often be zero, and the step as large as the gradient over eps."""
    case = Case("RMSprop", {"lr": 0.001, "alpha": 0.9, "centered": True, "momentum": 0.5})
    optimizer = make(case, [torch.zeros(5000)], backend, state_dtype=narrow)
    (param,) = params_of(optimizer)
    for _ in range(100):
        step([optimizer], [1 + 0.05 * normal(5000)])
    assert param.abs().max() < 10
    kept = {key: value.dtype for key, value in optimizer.state[param].items()}
    assert kept["momentum_buffer"] == momentum
    assert kept["square_avg"] == kept["grad_avg"] == torch.float32
    other = make(case, [torch.zeros(5000)], backend, state_dtype=narrow)
    other.load_state_dict(saved(optimizer))  # which converts nothing, and says nothing


def test_states_that_are_never_negative_have_names_of_the_rule():
    for cls in (getattr(fusedstep, name) for name in {case.optimizer for case in CASES}):
        assert set(cls.non_negative) <= set(cls.state_names), cls


@pytest.mark.parametrize("case", [c for c in OF_EACH_STATE if getattr(fusedstep, c.optimizer).non_negative], ids=str)
def test_states_said_to_be_never_negative_are_not(case):
    optimizer = make(case, [normal(500)])
    for _ in range(10):
        step([optimizer], [normal(500)])
    (param,) = params_of(optimizer)
    for name in optimizer.non_negative:
        if name in optimizer.state[param]:
            assert (optimizer.state[param][name] >= 0).all()


# state_dict.

MODES = {
    "plain": {},
    "fp32": {"state_dtype": torch.float32},
    "bf16": {"state_dtype": torch.bfloat16},
    "8bit": {"state_dtype": "8bit"},
    "4bit": {"state_dtype": "4bit"},
    "master": {"master_weights": True},
    "split": {"master_weights": "split"},
    "split-8bit": {"master_weights": "split", "state_dtype": "8bit"},
    "split-4bit": {"master_weights": "split", "state_dtype": "4bit"},
    "kahan": {"kahan": True},
    "stochastic": {"rounding": "stochastic", "rounding_seed": 7},
    "stochastic-8bit": {"rounding": "stochastic", "state_dtype": "8bit"},
}


def saved(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@each(mode=MODES, case=RULES)
def test_a_resumed_run_has_the_same_bits(case, mode, backend):
    starts = [normal(70, 80, dtype=torch.bfloat16), normal(33, dtype=torch.bfloat16)]
    first = make(case, starts, backend, **mode)
    for _ in range(3):
        step([first], [normal(*s.shape) for s in starts])
    resumed = [
        make(case, [p.detach() for p in params_of(first)], backend, **{**mode, "rounding_seed": 99}),
        copy.deepcopy(first),
        pickle.loads(pickle.dumps(first)),
    ]
    resumed[0].load_state_dict(saved(first))
    for _ in range(3):
        step([first, *resumed], [normal(*s.shape) for s in starts])
    for other in resumed:
        for p, q in zip(params_of(first), params_of(other), strict=True):
            assert torch.equal(p, q)
            assert first.state[p].keys() == other.state[q].keys()
            for name, value in first.state[p].items():
                assert torch.equal(value, other.state[q][name]), name


@by_rule
def test_without_options_the_state_dict_is_the_parents(case, backend):
    optimizer = make(case, [normal(70, 80)], backend)
    step([optimizer], [normal(70, 80)])
    state_dict = optimizer.state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    assert set(state_dict["state"][0]) <= {*optimizer.state_names, "step"}


@pytest.mark.parametrize("old", MODES.values(), ids=MODES)
def test_a_state_loads_into_an_optimizer_with_other_options(old):
    for new in MODES.values():
        check_loading(old, new)


def format_of(state, param):
    quantizer = codecs.quantizer_of(state, param)
    return state.dtype if quantizer is None else quantizer.name


def check_loading(old, new):
    start = normal(70, 80, dtype=torch.bfloat16)
    first = make(ADAMW, [start], **old)
    for _ in range(5):
        step([first], [normal(70, 80)])
    (param,) = params_of(first)
    second = make(ADAMW, [param.detach()], **new)
    state = saved(first)
    made = second.stepper.kept.weights.format_of(param)
    expected = {key: state["state"][0][key].dtype for key in ("exp_avg", "exp_avg_sq")}
    wanted = second.stepper.kept.states.format_of(param, None)
    for key, dtype in expected.items():
        code = codecs.QUANTIZERS[wanted].code(key == "exp_avg") if wanted in codecs.QUANTIZERS else None
        expected[key] = code or wanted or (param.dtype if dtype in codecs.CODES else dtype)
    found = format_of(state["state"][0]["exp_avg"], param)
    converts = found != (wanted or (param.dtype if found in codecs.QUANTIZERS else found)) or any(
        key in state["state"][0] and key != made.key for key in AUX
    )
    if converts:
        with pytest.warns(UserWarning, match="is converted: ") as record:
            second.load_state_dict(state)
        assert len(record) == 1
    else:
        second.load_state_dict(state)
    before = {k: v.clone() for k, v in first.state[param].items()}
    weight = param.detach().float()
    for key in AUX:
        if key in before:
            weight = AUX[key].join(param.detach(), before[key])
    for p in params_of(second):
        p.grad = torch.zeros_like(p)
    second.param_groups[0].update(lr=0.0, weight_decay=0.0, betas=(1.0 - 2**-30, 1.0 - 2**-30))
    second.step()
    (q,) = params_of(second)
    kept = second.state[q]
    assert set(kept) == {"step", "exp_avg", "exp_avg_sq"} | (
        {"exp_avg_scale", "exp_avg_sq_scale"} if wanted in codecs.QUANTIZERS else set()
    ) | ({made.key} if made.key is not None else set())
    for key, dtype in expected.items():
        assert kept[key].dtype == dtype
        values = [numbers_of(first, s, key, param).float() for s in (before, kept)]
        assert (values[0] - values[1]).norm() <= (0.16 if wanted == "4bit" else 0.02) * values[0].norm()
    if made.key is not None:
        now = made.join(q.detach(), kept[made.key])
        tolerance = 2.0**-15 if made.name == "kahan" else 2.0**-23
        assert ((now - weight).abs() <= tolerance * weight.abs()).all()
    else:
        assert torch.equal(q, param)


def test_torchs_own_state_loads_and_goes_on():
    start = normal(70, 80, dtype=torch.bfloat16)
    theirs = torch.optim.AdamW([torch.nn.Parameter(start.clone())])
    params_of(theirs)[0].grad = normal(70, 80, dtype=torch.bfloat16)
    theirs.step()
    ours = fusedstep.AdamW([torch.nn.Parameter(start.clone())], state_dtype="8bit", master_weights="split")
    with pytest.warns(UserWarning, match="exp_avg in torch.bfloat16 becomes 8bit"):
        ours.load_state_dict(theirs.state_dict())
    step([ours], [normal(70, 80)])
    assert ours.state[params_of(ours)[0]]["step"] == 2


def test_copies_after_loading_are_of_the_weight_that_was_saved():
    first = make(ADAMW, [normal(70, 80, dtype=torch.bfloat16)], master_weights="split", weights_copy=torch.float16)
    step([first], [normal(70, 80)])
    (param,) = params_of(first)
    second = make(ADAMW, [param.detach()], master_weights=True, weights_copy=torch.float16)
    with pytest.warns(UserWarning, match="weight_remainder becomes master_weight"):
        second.load_state_dict(first.state_dict())
    assert torch.equal(second.copies[params_of(second)[0]], first.copies[param])


def test_what_a_rule_without_states_keeps_is_saved_after_a_skipped_step():
    first = make(CASES[0], [normal(30, dtype=torch.bfloat16)], master_weights=True)
    step([first], [normal(30)])
    state = saved(first)
    second = make(CASES[0], [p.detach() for p in params_of(first)], master_weights=True)
    second.load_state_dict(state)
    params_of(second)[0].grad = normal(30, dtype=torch.bfloat16)
    # As far as a step gets that the device skips.
    second.stepper.new_plans(second, planning.check_and_select(second, needs_norm=False))
    assert torch.equal(second.state_dict()["state"][0]["master_weight"], state["state"][0]["master_weight"])


def test_states_of_the_users_own_load_whatever_their_dtype():
    first = make(ADAMW, [normal(70, 80)])
    step([first], [normal(70, 80)])
    first.state[params_of(first)[0]]["mask"] = torch.ones(5, dtype=torch.uint8)
    second = make(ADAMW, [normal(70, 80)])
    second.load_state_dict(saved(first))
    assert torch.equal(second.state[params_of(second)[0]]["mask"], torch.ones(5, dtype=torch.uint8))


@each(shape=[(4, 8, 16, 32), (4, 8, 16, 33), (4, 9, 16, 32), (4, 9, 15, 31)], quantizer=codecs.QUANTIZERS)
def test_a_quantized_state_keeps_its_numbers_in_another_layout(quantizer, shape):
    """Where two codes cannot share a byte along the new memory, each has a byte of its own."""
    first = make(ADAMW, [normal(*shape)], state_dtype=quantizer.name)
    step([first], [normal(*shape)])
    (param,) = params_of(first)
    second = make(ADAMW, [param.detach().to(memory_format=torch.channels_last)], state_dtype=quantizer.name)
    expected = codecs.quantizer_for(quantizer.name, params_of(second)[0])
    told = pytest.warns(UserWarning, match="exp_avg in 4bit becomes 8bit")
    with contextlib.nullcontext() if expected is quantizer else told:
        second.load_state_dict(first.state_dict())
    kept, moved = first.state[param], second.state[params_of(second)[0]]
    assert (tuple(moved["exp_avg"].shape), moved["exp_avg"].stride()) == expected.codes_layout(params_of(second)[0])
    a, b = (numbers_of(first, s, "exp_avg", param) for s in (kept, moved))
    share = 0.16 if quantizer.bits == 4 else 0.02
    assert (a - b).norm() < share * a.norm()
    # A parameter whose memory is laid out anew takes its state along.
    param.data = param.data.to(memory_format=torch.channels_last)
    param.grad = None
    step([first], [torch.zeros(*shape)])
    codes = first.state[param]["exp_avg"]
    assert (tuple(codes.shape), codes.stride()) == expected.codes_layout(param)
    c = numbers_of(first, first.state[param], "exp_avg", param)
    assert (a * 0.85 - c).norm() < 2 * share * a.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update(exp_avg=s["exp_avg"][:-1]),
            r"'exp_avg' of parameter 0 is torch.uint8, shape \(69, 40\), expected .*shape \(70, 80\) \(or 4 bits",
        ),
        (lambda s: s.update(exp_avg=s["exp_avg"].to(torch.int8)), r"'exp_avg' of parameter 0 .*torch.int8"),
        (lambda s: s.pop("exp_avg_scale"), r"'exp_avg_scale' of parameter 0 is missing"),
        (
            lambda s: s.update(exp_avg_scale=torch.ones(3)),
            r"'exp_avg_scale' of parameter 0 is .*shape \(3,\), expected .*\(22,\)",
        ),
    ],
)
def test_4_bit_states_that_are_none_are_refused_by_name(change, message):
    first = make(ADAMW, [normal(70, 80)], state_dtype="4bit")
    step([first], [normal(70, 80)])
    state = first.state_dict()
    change(state["state"][0])
    second = make(ADAMW, [normal(70, 80)], state_dtype="4bit")
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(state)
    assert not second.state


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": torch.float16}, "Invalid state_dtype: torch.float16"),
        ({"state_dtype": "2bit"}, "Invalid state_dtype: '2bit'"),
        ({"master_weights": "fp32"}, "Invalid master_weights: 'fp32'"),
        ({"rounding": "up"}, "Invalid rounding: 'up'"),
        ({"kahan": 1}, "Invalid kahan: 1"),
        ({"rounding_seed": -1}, "Invalid rounding_seed: -1"),
        ({"rounding_seed": 1.5}, "Invalid rounding_seed: 1.5"),
        ({"wide_states": "emb"}, "Invalid wide_states: 'emb'"),
        ({"wide_states": ["("]}, "Invalid wide_states"),
        ({"wide_states": [b"emb"]}, "Invalid wide_states: [b'emb']"),
        ({"master_weights": True, "kahan": True}, "master_weights=True and kahan=True contradict each other"),
        ({"master_weights": "split", "rounding": "stochastic"}, "contradict each other"),
        ({"kahan": True, "rounding": "stochastic"}, "kahan=True and rounding='stochastic' contradict each other"),
    ],
    ids=str,
)
def test_contradictory_and_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fusedstep.AdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], **options)


def test_fp16_cannot_be_split():
    half = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"master_weights='split' needs bfloat16 parameters.*parameter 1, shape"):
        fusedstep.AdamW([torch.nn.Parameter(torch.zeros(3)), half], master_weights="split")
    optimizer = fusedstep.AdamW([torch.nn.Parameter(torch.zeros(3))], master_weights="split")
    with pytest.raises(ValueError, match="needs bfloat16"):
        optimizer.add_param_group({"params": [half]})
    assert len(optimizer.param_groups) == 1


@each(
    options=few({name: mode for name, mode in MODES.items() if mode}, "8bit", "split", "kahan", "stochastic"),
    optimizer=[fusedstep.Adafactor, fusedstep.TorchAdafactor],
)
def test_rules_that_reduce_refuse(optimizer, options):
    with pytest.raises(ValueError, match=f"{optimizer.__name__} takes no state_dtype, master_weights"):
        optimizer([torch.nn.Parameter(torch.zeros(3))], **options)


def test_amos_refuses_for_the_parameters_that_it_reduces():
    weights = [("flat", torch.nn.Parameter(torch.zeros(3))), ("matrix", torch.nn.Parameter(torch.zeros(4, 5)))]
    with pytest.raises(ValueError, match=r"Amos takes no .*\(parameter 1 'matrix'"):
        fusedstep.Amos(weights, lr=1e-3, reduce={"matrix": [1]}, kahan=True)
    fusedstep.Amos(weights, lr=1e-3, reduce={}, kahan=True)


def changed(**changes):
    def change(state):
        for key, value in changes.items():
            if value is None:
                del state[key]
            else:
                state[key] = value(state[key]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(exp_avg_scale=None), "'exp_avg_scale' of parameter 0 is missing, expected torch.float32, shape (22,)"),
        (
            changed(exp_avg_sq_scale=lambda s: s[:5]),
            "'exp_avg_sq_scale' of parameter 0 is torch.float32, shape (5,), expected torch.float32, shape (22,)",
        ),
        (
            changed(exp_avg=lambda s: s.to(torch.uint8)),
            "'exp_avg' of parameter 0 is torch.uint8, shape (70, 80), expected torch.int8",
        ),
        (
            changed(exp_avg=lambda s: s[:3]),
            "'exp_avg' of parameter 0 is torch.int8, shape (3, 80), expected torch.int8, shape (70, 80)",
        ),
        (
            changed(weight_remainder=lambda s: s.float()),
            "'weight_remainder' of parameter 0 is torch.float32, shape (70, 80), expected torch.int16, shape (70, 80)",
        ),
        (
            changed(weight_remainder=lambda s: s[1:]),
            "'weight_remainder' of parameter 0 is torch.int16, shape (69, 80), expected torch.int16, shape (70, 80)",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    start = normal(70, 80, dtype=torch.bfloat16)
    first = make(ADAMW, [start], state_dtype="8bit", master_weights="split")
    step([first], [normal(70, 80)])
    state = saved(first)
    change(state["state"][0])
    second = make(ADAMW, [start], state_dtype="8bit", master_weights="split")
    with pytest.raises(ValueError, match=re.escape(message)):
        second.load_state_dict(state)
    assert not second.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed(exp_avg_scale=None),
            "state 'exp_avg_scale' is missing, expected torch.float32, shape (22,) for param",
        ),
        (
            changed(exp_avg=lambda s: s.view(80, 70)),
            "state 'exp_avg' is torch.int8, shape (80, 70), expected torch.int8, shape (70, 80) (or 4 bits each",
        ),
        (
            changed(weight_remainder=lambda s: s.int()),
            "state 'weight_remainder' is torch.int32, shape (70, 80), expected",
        ),
        (changed(master_weight=1.0), "state 'weight_remainder' stands beside 'master_weight', expected one of them"),
    ],
)
def test_a_state_that_was_edited_wrongly_is_refused_in_the_next_step(backend, change, message):
    optimizer = make(ADAMW, [normal(70, 80, dtype=torch.bfloat16)], backend, state_dtype="8bit", master_weights="split")
    (param,) = params_of(optimizer)
    step([optimizer], [normal(70, 80)])
    change(optimizer.state[param])
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        step([optimizer], [normal(70, 80)])
    assert torch.equal(param, before)


def test_a_remainder_of_another_dtype_is_refused():
    first = make(ADAMW, [normal(70, dtype=torch.bfloat16)], master_weights="split")
    step([first], [normal(70)])
    second = make(ADAMW, [normal(70, dtype=torch.float16)])
    with pytest.raises(ValueError, match=r"belongs to a torch.float16 weight, expected a torch.bfloat16 weight"):
        second.load_state_dict(saved(first))


def test_a_seed_that_is_none_is_refused():
    first = make(ADAMW, [normal(70, dtype=torch.bfloat16)], rounding="stochastic")
    with pytest.raises(ValueError, match="'rounding_seed' is 'x', expected"):
        first.load_state_dict({**first.state_dict(), "rounding_seed": "x"})


def test_sparse_gradients_leave_the_other_rows_alone(backend):
    for mode in MODES.values():
        for case in (CASES[0], Case("Adagrad", {"lr": 0.1})):
            start = normal(100, 60, dtype=torch.bfloat16)
            optimizer = make(case, [start], backend, **mode)
            (param,) = params_of(optimizer)
            step([optimizer], [normal(100, 60)])
            before = param.detach().clone()
            rows = torch.tensor([[3, 50, 3]])
            param.grad = torch.sparse_coo_tensor(
                rows, normal(3, 60, dtype=torch.bfloat16), (100, 60), check_invariants=True
            )
            optimizer.step()
            moved = (param != before).any(1)
            assert moved[[3, 50]].all()
            assert moved.sum() == 2


def test_a_skipped_step_changes_nothing(backend):
    for mode in MODES.values():
        optimizer = make(ADAMW, [normal(70, 80, dtype=torch.bfloat16)], backend, **mode)
        (param,) = params_of(optimizer)
        step([optimizer], [normal(70, 80)])
        before = [param.detach().clone(), *[t.clone() for t in optimizer.state[param].values()]]
        optimizer.found_inf = torch.tensor(1.0)
        step([optimizer], [normal(70, 80)])
        after = [param.detach(), *optimizer.state[param].values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
