"""What is special to one class: decay by name, clipping, scales, momentum decay, signs of zero."""

import copy
import math

import pytest
import torch
from parents import OTHERS
from support import EXACT, each, normal

import fusedstep


def model():
    layers = [torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)]
    return torch.nn.Sequential(*layers).double()


def train(optimizers, models, steps=4, scale=1.0):
    for _ in range(steps):
        x = normal(4, 6)
        for net in models:
            net.zero_grad()
            (net(x).square().sum() * scale).backward()
        for optimizer in optimizers:
            optimizer.step()


# AdamWeightDecay


@pytest.mark.parametrize(
    ("patterns", "decaying"),
    [
        ({}, {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}),
        ({"exclude_from_weight_decay": ["bias", r"^1\."]}, {"0.weight", "2.weight"}),
        ({"exclude_from_weight_decay": [r"."], "include_in_weight_decay": [r"2\.w"]}, {"2.weight"}),
        ({"include_in_weight_decay": ["nothing"]}, {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}),
    ],
)
def test_decay_is_chosen_by_name(backend, patterns, decaying):
    mine, theirs = model(), model()
    theirs.load_state_dict(mine.state_dict())
    options = {"weight_decay_rate": 0.3, "epsilon": 1e-3, **patterns}
    ours = fusedstep.AdamWeightDecay(mine.named_parameters(), 0.01, backend=backend, **options)
    formula = OTHERS["AdamWeightDecay"](theirs.named_parameters(), lr=0.01, **options)
    group = ours.param_groups[0]
    chosen = {n for n, p in zip(group["param_names"], group["params"], strict=True) if ours.variant_of(group, n, p)}
    assert chosen == decaying
    train((ours, formula), (mine, theirs))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    if backend == "cpu":
        assert ours.kernel_calls == (1 if len(decaying) in (0, 6) else 2)


def clipped(grads, clipvalue=None, clipnorm=None, global_clipnorm=None):
    """Keras: each limit after the other."""
    if clipvalue is not None:
        grads = [g.clamp(-clipvalue, clipvalue) for g in grads]
    if clipnorm is not None:
        grads = [g if g.norm() <= clipnorm else g * (clipnorm / g.norm()) for g in grads]
    if global_clipnorm is not None:
        norm = torch.cat([g.flatten() for g in grads]).norm()
        grads = [g * (global_clipnorm * min(1 / norm, 1 / global_clipnorm)) for g in grads]
    return grads


@each(
    limits=[
        {"clipvalue": 0.3},
        {"clipnorm": 0.5},
        {"global_clipnorm": 0.7},
        {"global_clipnorm": 1000000000.0},
        {"clipvalue": 0.5, "clipnorm": 0.8},
        {"clipvalue": 0.5, "global_clipnorm": 0.6},
    ],
    scaled=[False, True],
)
def test_gradients_are_clipped_as_in_keras_and_not_written(backend, limits, scaled):
    values = [normal(3, 4).t(), normal(5), normal(4, 6)[:, ::2]]
    params = [torch.nn.Parameter(v) for v in values]
    copies = [torch.nn.Parameter(v.detach().clone()) for v in values]
    ours = fusedstep.AdamWeightDecay([{"params": params[:1]}, {"params": params[1:]}], 0.1, backend=backend, **limits)
    formula = OTHERS["AdamWeightDecay"](copies, lr=0.1)
    if scaled:
        ours.grad_scale = torch.tensor(8.0)
    for _ in range(3):
        grads = [normal(*v.shape) for v in values]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad * 8 if scaled else grad.clone()
        kept = [p.grad.clone() for p in params]
        for param, grad in zip(copies, clipped(grads, **limits), strict=True):
            param.grad = grad
        ours.step()
        formula.step()
        for a, b, before in zip(params, copies, kept, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
            assert torch.equal(a.grad, before)


def test_an_infinite_global_norm_gives_nan_as_in_tensorflow():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedstep.AdamWeightDecay([param], global_clipnorm=1.0)
    param.grad = torch.tensor([1.0, float("inf"), 2.0])
    optimizer.step()
    assert param.isnan().all()


def test_both_norms_are_refused_in_keras_words():
    with pytest.raises(ValueError, match="Cannot accept both `clipnorm` and `global_clipnorm`"):
        fusedstep.AdamWeightDecay([torch.zeros(1)], clipnorm=1.0, global_clipnorm=1.0)


# Amos


def test_scales_of_common_layers():
    net = torch.nn.Sequential()
    net.embedding = torch.nn.Embedding(7, 8)
    net.conv = torch.nn.Conv2d(4, 6, 3, groups=2)
    net.norm = torch.nn.BatchNorm2d(6)
    net.first = torch.nn.Linear(10, 3)
    net.second = torch.nn.Linear(3, 2, bias=False)
    net.attention = torch.nn.MultiheadAttention(4, 2)
    assert fusedstep.amos_scales(net, after_activation=["^second"]) == {
        "embedding.weight": math.sqrt(2 / 8),
        "conv.weight": math.sqrt(1 / (2 * 9)),
        "conv.bias": 0.5,
        "norm.weight": 1.0,
        "norm.bias": 0.5,
        "first.weight": math.sqrt(1 / 10),
        "first.bias": 0.5,
        "second.weight": math.sqrt(2 / 3),
        "attention.in_proj_weight": math.sqrt(1 / 4),
        "attention.in_proj_bias": 0.5,
        "attention.out_proj.weight": math.sqrt(1 / 4),
        "attention.out_proj.bias": 0.5,
    }
    net.unknown = torch.nn.ParameterList([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"parameter 'unknown\.0' of ParameterList"):
        fusedstep.amos_scales(net)


def test_each_parameter_has_its_own_scale(backend):
    mine, theirs = model(), model()
    theirs.load_state_dict(mine.state_dict())
    options = {"lr": 0.05, "eta": fusedstep.amos_scales(mine), "beta": 0.9}
    ours = fusedstep.Amos(mine.named_parameters(), backend=backend, **options)
    formula = OTHERS["Amos"](theirs.named_parameters(), **options)
    train((ours, formula), (mine, theirs))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    if backend == "cpu":
        assert ours.kernel_calls == len(set(options["eta"].values()))


def test_a_missing_scale_is_named():
    net = model()
    scales = fusedstep.amos_scales(net)
    del scales["2.bias"]
    with pytest.raises(ValueError, match=r"no entry for parameter '2\.bias'"):
        fusedstep.Amos(net.named_parameters(), eta=scales)


# Trailing, leading, inner and all dimensions; shapes around a run of small matrices and the blocks of large ones.
REDUCTIONS = [
    *((shape, dims) for shape in [(7,), (1500,), (70_001,)] for dims in [(0,)]),
    *((shape, dims) for shape in [(3, 5), (40, 30), (131, 67), (2, 1500), (1500, 2), (1, 1)] for dims in [(0,), (1,)]),
    *(((9, 4, 5), dims) for dims in [(0,), (1,), (2,), (0, 1), (-1, -2), (0, 1, 2)]),
    *(((3, 40, 50), dims) for dims in [(0,), (1,), (2,), (0, 1), (1, 2), (2, 0, 1)]),
    *(((6, 3, 3, 3), dims) for dims in [(1, 2, 3), (1, 2), (3,)]),
]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_reduced_statistics_follow_the_formula(backend, momentum):
    options = {"lr": 0.2, "beta": 0.95, "momentum": momentum, "clip_value": 2.0, "extra_l2": 1e-3, "eta": 0.4}
    named = {str(i): torch.nn.Parameter(normal(*shape)) for i, (shape, _) in enumerate(REDUCTIONS)}
    copies = copy.deepcopy(named)
    reduce = {str(i): dims for i, (_, dims) in enumerate(REDUCTIONS)}
    ours = fusedstep.Amos(named.items(), backend=backend, reduce=reduce, **options)
    formula = OTHERS["Amos"](copies.items(), reduce=reduce, **options)
    for _ in range(5):
        for name, param in named.items():
            param.grad = normal(*param.shape)
            copies[name].grad = param.grad.clone()
        ours.step()
        formula.step()
    for name, param in named.items():
        torch.testing.assert_close(param, copies[name], **EXACT)
        sizes = [1 if i in {d % param.dim() for d in reduce[name]} else n for i, n in enumerate(param.shape)]
        for key in ("exp_avg_sq", "decay"):
            state = ours.state[param][key]
            assert list(state.shape) == sizes
            torch.testing.assert_close(state.expand(param.shape), formula.state[copies[name]][key], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduced_statistics_save_the_memory(backend, dtype):
    net = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 6), torch.nn.LayerNorm(6)).to(dtype)
    net.append(torch.nn.Conv2d(1, 2, 3, dtype=dtype))
    reduce = fusedstep.amos_reductions(net)
    optimizer = fusedstep.Amos(net.named_parameters(), reduce=reduce, eta=fusedstep.amos_scales(net), backend=backend)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    held = {name: optimizer.state[p]["exp_avg_sq"].numel() for name, p in net.named_parameters()}
    assert held == {
        **{"0.weight": 50, "1.weight": 6, "1.bias": 1, "2.weight": 1, "2.bias": 1},
        **{"3.weight": 2, "3.bias": 1},
    }
    assert {optimizer.state[p]["exp_avg_sq"].dtype for p in net.parameters()} == {torch.float32}
    fresh = fusedstep.Amos(net.named_parameters(), reduce=reduce, eta=fusedstep.amos_scales(net), backend=backend)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    after = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        for param, value in zip(net.parameters(), before, strict=True):
            param.copy_(value)
    fresh.step()
    assert all(torch.equal(p, value) for p, value in zip(net.parameters(), after, strict=True))


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        ((2,), r"Invalid reduce for parameter 'w' of shape \(3, 4\): \(2,\) \(it has 2 dimensions\)"),
        ({"w": (-3,)}, "it has 2 dimensions"),
        ("all", "Invalid reduce: 'all'"),
        ({"w": 1.5}, "Invalid reduce for 'w': 1.5"),
        ((0.0,), r"Invalid reduce: \(0.0,\)"),
    ],
)
def test_dimensions_that_cannot_be_reduced_are_refused(reduce, message):
    with pytest.raises(ValueError, match=message):
        fusedstep.Amos([("w", torch.nn.Parameter(torch.zeros(3, 4)))], reduce=reduce)


def test_dimensions_apart_are_refused():
    with pytest.raises(ValueError, match="must be neighbours"):
        fusedstep.Amos([torch.nn.Parameter(torch.zeros(3, 4, 5))], reduce=(0, 2))


def test_a_state_of_another_reduction_is_refused_by_name():
    w = torch.nn.Parameter(torch.ones(3, 4))
    w.grad = torch.ones_like(w)
    optimizer = fusedstep.Amos([w], reduce=(1,))
    optimizer.step()
    with pytest.raises(ValueError, match=r"'exp_avg_sq' of parameter 0 has shape \(3, 1\), expected \(3, 4\)"):
        fusedstep.Amos([w]).load_state_dict(optimizer.state_dict())


# RMSprop, Lion, AdaBelief


def test_momentum_decays(backend):
    param = torch.nn.Parameter(normal(9))
    value, square_avg, buffer = param.detach().clone(), torch.zeros(9).double(), torch.zeros(9).double()
    optimizer = fusedstep.RMSprop([param], lr=0.1, momentum=0.9, momentum_decay=0.2, backend=backend)
    for t in range(1, 6):
        param.grad = normal(9)
        optimizer.step()
        square_avg = 0.99 * square_avg + 0.01 * param.grad**2
        buffer = 0.9 * (1 - 0.2) ** (t - 1) * buffer + param.grad / (square_avg.sqrt() + 1e-8)
        value -= 0.1 * buffer
    torch.testing.assert_close(param.detach(), value, **EXACT)


def test_a_constant_gradient_does_not_make_the_centered_variance_negative(backend):
    param = torch.nn.Parameter(torch.zeros(1000))
    grad = torch.linspace(0.1, 3.0, 1000)
    optimizer = fusedstep.RMSprop([param], alpha=0.5, centered=True, eps=1e-3, backend=backend)
    theirs = torch.nn.Parameter(torch.zeros(1000))
    judge = torch.optim.RMSprop([theirs], alpha=0.5, centered=True, eps=1e-3)
    for _ in range(60):
        param.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        judge.step()
    assert param.isfinite().all()
    assert theirs.isnan().any()  # else this test shows nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sign_of_zero_is_zero(backend, dtype):
    param = torch.nn.Parameter(torch.full((40,), 2.0, dtype=dtype))
    optimizer = fusedstep.Lion([param], lr=0.125, weight_decay=1.0, backend=backend)
    param.grad = torch.zeros_like(param)
    param.grad[::2] = torch.tensor([1e-30, -1e-30], dtype=dtype).repeat(10)
    optimizer.step()
    assert (param[1::2] == 1.75).all()  # the decay alone
    assert (param[::4] == 1.625).all()
    assert (param[2::4] == 1.875).all()


def test_the_state_of_fp16_parameters_is_fp32_as_in_the_original():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = fusedstep.AdaBelief([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert {t.dtype for t in optimizer.state[param].values()} == {torch.float32}
