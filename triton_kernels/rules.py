"""Every elementwise update rule: csrc/rules.h in Triton, with the same names in the same order.

`prepare` computes the scalars of one step in float64 from the hyperparameters; `update` is the arithmetic of a block of
elements; N_STATES says how many of the states that it names there are (an option that adds one may be off).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .numeric import divide, maximum, power, square_root


class SgdScalars(NamedTuple):
    lr: tl.tensor
    weight_decay: tl.tensor
    momentum: tl.tensor
    keep: tl.tensor
    take: tl.tensor
    nesterov: tl.tensor


@triton.jit
def sgd_prepare(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    lr = tl.load(hyper_ptr)
    momentum = tl.load(hyper_ptr + 1)
    dampening = tl.load(hyper_ptr + 2)
    weight_decay = tl.load(hyper_ptr + 3)
    nesterov = tl.load(hyper_ptr + 4)
    keep = tl.where(step == 1, 0.0, momentum)
    take = tl.where(step == 1, 1.0, 1.0 - dampening)
    return SgdScalars(
        lr.to(ARITHMETIC),
        weight_decay.to(ARITHMETIC),
        momentum.to(ARITHMETIC),
        keep.to(ARITHMETIC),
        take.to(ARITHMETIC),
        nesterov != 0,
    )


@triton.jit
def sgd_update(param, grad, momentum_buffer, s, N_STATES: tl.constexpr):
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    if N_STATES > 0:
        momentum_buffer = s.keep * momentum_buffer + s.take * grad
        grad = tl.where(s.nesterov, grad + s.momentum * momentum_buffer, momentum_buffer)
    return param - s.lr * grad, momentum_buffer


class AdamScalars(NamedTuple):
    one_minus_beta1: tl.tensor
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    step_size: tl.tensor
    inv_bias_correction2_sqrt: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    decay: tl.tensor


@triton.jit
def adam_prepare(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    lr = tl.load(hyper_ptr)
    beta1 = tl.load(hyper_ptr + 1)
    beta2 = tl.load(hyper_ptr + 2)
    eps = tl.load(hyper_ptr + 3)
    weight_decay = tl.load(hyper_ptr + 4)
    decoupled = tl.load(hyper_ptr + 5) != 0
    bias_correction1 = 1.0 - power(beta1, step)
    bias_correction2 = 1.0 - power(beta2, step)
    one = lr * 0.0 + 1.0  # in float64: a plain number would be narrowed
    return AdamScalars(
        (1.0 - beta1).to(ARITHMETIC),
        beta2.to(ARITHMETIC),
        (1.0 - beta2).to(ARITHMETIC),
        divide(lr, bias_correction1).to(ARITHMETIC),
        divide(one, square_root(bias_correction2)).to(ARITHMETIC),
        eps.to(ARITHMETIC),
        tl.where(decoupled, 0.0, weight_decay).to(ARITHMETIC),
        tl.where(decoupled, 1.0 - lr * weight_decay, one).to(ARITHMETIC),
    )


@triton.jit
def adam_update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, s, N_STATES: tl.constexpr):
    param = param * s.decay
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    exp_avg = exp_avg + s.one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad
    if N_STATES > 2:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        second_moment = max_exp_avg_sq
    else:
        second_moment = exp_avg_sq
    denom = square_root(second_moment) * s.inv_bias_correction2_sqrt + s.eps
    return param - divide(s.step_size * exp_avg, denom), exp_avg, exp_avg_sq, max_exp_avg_sq


class Rule(NamedTuple):
    """What the generic kernel needs of a rule."""

    prepare: triton.JITFunction
    update: triton.JITFunction
    n_named: int  # states that update() names


RULES = {
    "sgd": Rule(sgd_prepare, sgd_update, 1),
    "adam": Rule(adam_prepare, adam_update, 3),
}
