"""create_optimizer: the original's numbers, written out from Keras' and Hugging Face's published formulas."""

import inspect
import math

import pytest
import torch
from kinds import each
from torch import nn

import fusedstep
from fusedstep import create_optimizer


class LlamaRMSNorm(nn.Module):
    """A normalisation layer of another package."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class MambaRMSNormGated(nn.Module):
    """One with a gate, as state space models have it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class LayerNormFp32(nn.LayerNorm):
    """A normalisation layer by its parent class alone."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(4)
        self.dense = nn.Linear(4, 4)
        self.LayerNorm = nn.LayerNorm(4)
        self.ln_f = LlamaRMSNorm(4)
        self.bn = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.normal_head = nn.Linear(4, 2)


DECAYING = {"dense.weight", "scale", "normal_head.weight"}


def keras_rate(step, init_lr, train, warmup, ratio, power):
    """WarmUp around PolynomialDecay."""
    if warmup and step < warmup:
        return init_lr * step / warmup
    step = min(step - warmup, train - warmup)
    end = init_lr * ratio
    return (init_lr - end) * (1 - step / (train - warmup)) ** power + end


@each(steps=[(20, 0), (20, 5), (7, 6), (1, 0)], ratio=[0.0, 0.1], power=[1.0, 2.0, 0.5])
def test_the_schedule_is_kerass_beyond_its_end_too(steps, ratio, power):
    train, warmup = steps
    optimizer, scheduler = create_optimizer(Block(), 0.5, train, warmup, ratio, power=power)
    for step in range(train + 5):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            keras_rate(step, 0.5, train, warmup, ratio, power), rel=1e-14, abs=1e-16
        )
        optimizer.step()
        scheduler.step()


def decaying(optimizer):
    (group,) = optimizer.param_groups
    named = zip(group["param_names"], group["params"], strict=True)
    return {name for name, param in named if optimizer.variant_of(group, name, param)}


def test_biases_and_normalisation_layers_do_not_decay():
    optimizer, _ = create_optimizer(Block(), 0.1, 10, 0, weight_decay_rate=0.1)
    assert decaying(optimizer) == DECAYING
    nested = nn.Sequential(Block(), nn.ModuleDict({"norm2": nn.GroupNorm(2, 4), "conv": nn.Conv2d(1, 1, 1)}))
    optimizer, _ = create_optimizer(nested, 0.1, 10, 0, weight_decay_rate=0.1)
    assert decaying(optimizer) == {*(f"0.{name}" for name in DECAYING), "1.conv.weight"}


@pytest.mark.parametrize("kind", [MambaRMSNormGated, LayerNormFp32, nn.RMSNorm, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_normalisation_layer_is_known_by_its_class(kind):
    model = nn.ModuleDict({"first": kind(4), "second": nn.Linear(4, 2)})
    optimizer, _ = create_optimizer(model, 0.1, 10, 0, weight_decay_rate=0.1)
    assert decaying(optimizer) == {"second.weight"}


def test_names_alone_decide_without_a_model():
    optimizer, _ = create_optimizer(Block().named_parameters(), 0.1, 10, 0, weight_decay_rate=0.1)
    assert decaying(optimizer) == {*DECAYING, "norm1.weight", "ln_f.weight", "bn.weight"}


def test_what_is_included_decays_whatever_excludes_it():
    patterns = ["norm1", r"dense\.bias"]
    optimizer, _ = create_optimizer(Block(), 0.1, 10, 0, weight_decay_rate=0.1, include_in_weight_decay=patterns)
    assert decaying(optimizer) == {*DECAYING, "norm1.weight", "norm1.bias", "dense.bias"}


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay_rate": 0.1}, {"adam_clipnorm": 0.5}, {"adam_global_clipnorm": 0.5}], ids=str
)
def test_training_follows_the_published_formulas(backend, options):
    """Decay with the learning rate of the step, then Adam in Keras' epsilon-hat form, in float64."""
    torch.manual_seed(3)
    model = Block().double()
    params = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in params.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in values.items()} for _ in range(2))
    beta1, beta2, eps = 0.8, 0.95, 1e-3
    optimizer, scheduler = create_optimizer(
        model, 0.1, 8, 3, 0.2, beta1, beta2, eps, power=2.0, backend=backend, **options
    )
    for step in range(10):
        grads = {name: torch.randn_like(p) for name, p in values.items()}
        for name, param in params.items():
            param.grad = grads[name].clone()
        optimizer.step()
        scheduler.step()
        whole = math.sqrt(sum(g.square().sum() for g in grads.values()))
        lr = keras_rate(step, 0.1, 8, 3, 0.2, 2.0)
        alpha = lr * math.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))
        for name, value in values.items():
            g = grads[name]
            if "adam_clipnorm" in options:
                g = g * min(1.0, 0.5 / g.norm())
            if "adam_global_clipnorm" in options:
                g = g * min(1.0, 0.5 / whole)
            if name in DECAYING:
                value = value - lr * options.get("weight_decay_rate", 0.0) * value
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            values[name] = value - alpha * m[name] / (v[name].sqrt() + eps)
    for name, param in params.items():
        torch.testing.assert_close(param.detach(), values[name], rtol=1e-11, atol=1e-12)


def test_a_training_resumes_in_the_middle(backend):
    def one_step(model, optimizer, scheduler, step):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        scheduler.step()

    def fresh():
        torch.manual_seed(1)
        model = Block()
        return model, *create_optimizer(model, 0.1, 9, 2, weight_decay_rate=0.1, backend=backend)

    whole, half, rest = fresh(), fresh(), fresh()
    for step in range(9):
        one_step(*whole, step)
    for step in range(4):
        one_step(*half, step)
    for old, new in zip(half, rest, strict=True):
        new.load_state_dict(old.state_dict())
    for step in range(4, 9):
        one_step(*rest, step)
    for a, b in zip(whole[0].parameters(), rest[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_signature_is_the_originals():
    parameters = list(inspect.signature(create_optimizer).parameters.values())
    assert [(p.name, p.default) for p in parameters[1:13]] == [
        ("init_lr", inspect.Parameter.empty),
        ("num_train_steps", inspect.Parameter.empty),
        ("num_warmup_steps", inspect.Parameter.empty),
        ("min_lr_ratio", 0.0),
        ("adam_beta1", 0.9),
        ("adam_beta2", 0.999),
        ("adam_epsilon", 1e-8),
        ("adam_clipnorm", None),
        ("adam_global_clipnorm", None),
        ("weight_decay_rate", 0.0),
        ("power", 1.0),
        ("include_in_weight_decay", None),
    ]
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in parameters[13:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"init_lr": -1.0}, ValueError, "Invalid init_lr: -1.0"),
        ({"init_lr": "1"}, TypeError, "Invalid init_lr: '1'"),
        ({"num_train_steps": 0}, ValueError, "Invalid num_train_steps: 0"),
        ({"num_train_steps": 2.5}, ValueError, "Invalid num_train_steps: 2.5"),
        ({"num_warmup_steps": -1}, ValueError, "Invalid num_warmup_steps: -1"),
        ({"num_warmup_steps": 10}, ValueError, r"num_warmup_steps: 10 \(it must be smaller than num_train_steps, 10\)"),
        ({"min_lr_ratio": -0.1}, ValueError, "Invalid min_lr_ratio: -0.1"),
        ({"power": 0}, ValueError, "Invalid power: 0"),
        ({"adam_beta1": 1.0}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"adam_epsilon": -1}, ValueError, "Invalid epsilon value: -1"),
        ({"adam_clipnorm": 0}, ValueError, "Invalid clipnorm value: 0"),
        ({"adam_clipnorm": 1, "adam_global_clipnorm": 1}, ValueError, "Cannot accept both"),
        ({"weight_decay_rate": -1}, ValueError, "Invalid weight_decay_rate value: -1"),
        ({"include_in_weight_decay": "bias"}, TypeError, "Invalid include_in_weight_decay: 'bias'"),
        ({"backend": "gpu"}, ValueError, "Invalid backend: 'gpu'"),
        ({"model_or_named_params": [nn.Parameter(torch.ones(2))]}, TypeError, "a model or .name, parameter. pairs"),
        ({"model_or_named_params": []}, ValueError, "empty parameter list"),
    ],
)
def test_bad_arguments(change, error, message):
    good = {"model_or_named_params": Block(), "init_lr": 0.1, "num_train_steps": 10, "num_warmup_steps": 2}
    with pytest.raises(error, match=message):
        create_optimizer(**{**good, **change})


def test_what_comes_back_is_public():
    optimizer, scheduler = create_optimizer(Block(), 0.1, 10, 2)
    assert type(optimizer) is fusedstep.AdamWeightDecay
    assert isinstance(scheduler, fusedstep.schedules.ScheduleLR)
