"""The classes that ours replace, by name: torch's, those of other packages, and where none can be installed the
published formulas, written out operation by operation."""

import contextlib
import io
import math
import re
from typing import ClassVar

import pytest
import torch


class Formula(torch.optim.Optimizer):
    """An optimizer in plain torch operations: default `options`, `states_of` a group, `update` of one parameter."""

    options: ClassVar[dict]

    def __init__(self, params, maximize=False, foreach=None, **options):
        super().__init__(params, {**self.options, **options, "maximize": maximize})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            for name, p in zip(names, group["params"], strict=True):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for key in self.states_of(group):
                        state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["step"] += 1
                grad = -p.grad if group["maximize"] else p.grad
                self.update(group, name, p, grad, state, int(state["step"]))


class Amos(Formula):
    """arXiv 2210.11693, algorithm 1, with the authors' options (google-research/jestimator, amos.py)."""

    options: ClassVar[dict] = {
        **{"lr": 1e-3, "eta": 1.0, "beta": 0.999, "momentum": 0.0, "clip_value": None, "extra_l2": 0.0},
        **{"c_coef": 0.25, "d_coef": 0.25, "eps": 2.0**-125, "reduce": None},
    }

    def states_of(self, group):
        return ("exp_avg_sq", "decay", "exp_avg") if group["momentum"] else ("exp_avg_sq", "decay")

    def update(self, group, name, theta, g, state, t):
        xi, beta = group["lr"], group["beta"]
        eta = group["eta"] if isinstance(group["eta"], float) else group["eta"][name]
        if group["clip_value"]:
            g = g.clip(-group["clip_value"], group["clip_value"])
        v, b = state["exp_avg_sq"], state["decay"]
        reduce = group["reduce"].get(name) if isinstance(group["reduce"], dict) else group["reduce"]
        g2 = g.square().mean(dim=reduce, keepdim=True) if reduce else g.square()
        v.copy_(v * beta + g2 * (1 - beta))
        v_hat = v.clip(min=group["eps"]) / (1 - beta**t)
        gamma = torch.rsqrt(1 + group["c_coef"] * math.sqrt(xi) * b) * xi**2 / v_hat * g2
        d = 1 / (1 + group["d_coef"] * math.sqrt(xi * eta) * b)
        delta = d * (xi * eta * g / v_hat.sqrt() + (gamma / 2 + group["extra_l2"]) * theta)
        b.copy_(b + gamma * (1 + b))
        if group["momentum"]:
            delta = state["exp_avg"].copy_(group["momentum"] * state["exp_avg"] + (1 - group["momentum"]) * delta)
        theta.sub_(delta)


class AdamWeightDecay(Formula):
    """Keras' Adam (epsilon-hat) with Hugging Face's decay before it (transformers 4, optimization_tf.py)."""

    options: ClassVar[dict] = {
        **{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-7, "amsgrad": False, "weight_decay_rate": 0.0},
        **{"include_in_weight_decay": None, "exclude_from_weight_decay": None, "decay": 0.0},
    }

    def __init__(self, params, beta_1=0.9, beta_2=0.999, epsilon=1e-7, **options):
        super().__init__(params, betas=(beta_1, beta_2), eps=epsilon, **options)

    def states_of(self, group):
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    @staticmethod
    def decays(group, name):
        if group["weight_decay_rate"] == 0:
            return False
        found = {
            option: name is not None and any(re.search(pattern, name) for pattern in group[option] or ())
            for option in ("include_in_weight_decay", "exclude_from_weight_decay")
        }
        return found["include_in_weight_decay"] or not found["exclude_from_weight_decay"]

    def update(self, group, name, var, grad, state, t):
        lr, (beta_1, beta_2) = group["lr"] / (1 + group["decay"] * (t - 1)), group["betas"]
        if self.decays(group, name):
            var.sub_(lr * var * group["weight_decay_rate"])
        m = state["exp_avg"].copy_(beta_1 * state["exp_avg"] + (1 - beta_1) * grad)
        v = state["exp_avg_sq"].copy_(beta_2 * state["exp_avg_sq"] + (1 - beta_2) * grad.square())
        if group["amsgrad"]:
            v = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
        var.sub_(lr * math.sqrt(1 - beta_2**t) / (1 - beta_1**t) * m / (v.sqrt() + group["eps"]))


def quiet(build):
    def built(*args, **options):
        with contextlib.redirect_stdout(io.StringIO()):
            return build(*args, **options)

    return built


def lion(params, **options):
    return pytest.importorskip("lion_pytorch").Lion(params, **options)


@quiet
def adabelief(params, **options):
    return pytest.importorskip("adabelief_pytorch").AdaBelief(params, print_change_log=False, **options)


OTHERS = {
    "Lion": lion,
    "AdaBelief": adabelief,
    "Amos": Amos,
    "AdamWeightDecay": AdamWeightDecay,
}


def parent(case, params, **options):
    """The class that a row of `fusedstep.cases` replaces, with its options."""
    options = {**case.options, **options}
    if case.optimizer in OTHERS:
        return OTHERS[case.optimizer](params, **options)
    return getattr(torch.optim, case.optimizer)(params, foreach=False, **options)
