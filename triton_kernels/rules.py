"""Every elementwise update rule: csrc/rules.h in Triton, with the same names in the same order.

`prepare` computes the scalars of one step in float64 from the hyperparameters; `update` is the arithmetic of a block of
elements; bit k of PRESENT says whether the k-th of the states that it names is there (its option may be off).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .numeric import divide, maximum, minimum, power, square_root


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
def sgd_update(param, grad, momentum_buffer, s, PRESENT: tl.constexpr):
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    if PRESENT & 1:
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
    epsilon_hat = tl.load(hyper_ptr + 6) != 0
    lr_decay = tl.load(hyper_ptr + 7)
    one = lr_decay * 0.0 + 1.0  # in float64: a plain number would be narrowed
    lr = divide(lr, one + (step - 1).to(tl.float64) * lr_decay)
    bias_correction1 = 1.0 - power(beta1, step)
    inv_bias_correction2_sqrt = divide(one, square_root(1.0 - power(beta2, step)))
    return AdamScalars(
        (1.0 - beta1).to(ARITHMETIC),
        beta2.to(ARITHMETIC),
        (1.0 - beta2).to(ARITHMETIC),
        divide(lr, bias_correction1).to(ARITHMETIC),
        inv_bias_correction2_sqrt.to(ARITHMETIC),
        tl.where(epsilon_hat, eps * inv_bias_correction2_sqrt, eps).to(ARITHMETIC),
        tl.where(decoupled, 0.0, weight_decay).to(ARITHMETIC),
        tl.where(decoupled & (weight_decay != 0), 1.0 - lr * weight_decay, one).to(ARITHMETIC),
    )


@triton.jit
def adam_update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, s, PRESENT: tl.constexpr):
    param = param * s.decay
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    exp_avg = exp_avg + s.one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad
    if PRESENT & 4:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        second_moment = max_exp_avg_sq
    else:
        second_moment = exp_avg_sq
    denom = square_root(second_moment) * s.inv_bias_correction2_sqrt + s.eps
    return param - divide(s.step_size * exp_avg, denom), exp_avg, exp_avg_sq, max_exp_avg_sq


class RmspropScalars(NamedTuple):
    lr: tl.tensor
    alpha: tl.tensor
    one_minus_alpha: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    momentum: tl.tensor


@triton.jit
def rmsprop_prepare(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    lr = tl.load(hyper_ptr)
    alpha = tl.load(hyper_ptr + 1)
    eps = tl.load(hyper_ptr + 2)
    weight_decay = tl.load(hyper_ptr + 3)
    momentum = tl.load(hyper_ptr + 4)
    momentum_decay = tl.load(hyper_ptr + 5)
    return RmspropScalars(
        lr.to(ARITHMETIC),
        alpha.to(ARITHMETIC),
        (1.0 - alpha).to(ARITHMETIC),
        eps.to(ARITHMETIC),
        weight_decay.to(ARITHMETIC),
        (momentum * power(1.0 - momentum_decay, step - 1)).to(ARITHMETIC),
    )


@triton.jit
def rmsprop_update(param, grad, square_avg, momentum_buffer, grad_avg, s, PRESENT: tl.constexpr):
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    square_avg = s.alpha * square_avg + s.one_minus_alpha * grad * grad
    variance = square_avg
    if PRESENT & 4:
        grad_avg = grad_avg + s.one_minus_alpha * (grad - grad_avg)
        variance = maximum(square_avg - grad_avg * grad_avg, 0.0)
    denom = square_root(variance) + s.eps
    if PRESENT & 2:
        momentum_buffer = s.momentum * momentum_buffer + divide(grad, denom)
        param = param - s.lr * momentum_buffer
    else:
        param = param - divide(s.lr * grad, denom)
    return param, square_avg, momentum_buffer, grad_avg


class AdagradScalars(NamedTuple):
    step_size: tl.tensor
    weight_decay: tl.tensor
    eps: tl.tensor


@triton.jit
def adagrad_prepare(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    lr = tl.load(hyper_ptr)
    lr_decay = tl.load(hyper_ptr + 1)
    weight_decay = tl.load(hyper_ptr + 2)
    eps = tl.load(hyper_ptr + 3)
    return AdagradScalars(
        divide(lr, 1.0 + (step - 1).to(tl.float64) * lr_decay).to(ARITHMETIC),
        weight_decay.to(ARITHMETIC),
        eps.to(ARITHMETIC),
    )


@triton.jit
def adagrad_update(param, grad, sum, s, PRESENT: tl.constexpr):
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    sum = sum + grad * grad
    return param - divide(s.step_size * grad, square_root(sum) + s.eps), sum


class LionScalars(NamedTuple):
    lr: tl.tensor
    beta1: tl.tensor
    one_minus_beta1: tl.tensor
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    decay: tl.tensor


@triton.jit
def lion_prepare(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    lr = tl.load(hyper_ptr)
    beta1 = tl.load(hyper_ptr + 1)
    beta2 = tl.load(hyper_ptr + 2)
    weight_decay = tl.load(hyper_ptr + 3)
    return LionScalars(
        lr.to(ARITHMETIC),
        beta1.to(ARITHMETIC),
        (1.0 - beta1).to(ARITHMETIC),
        beta2.to(ARITHMETIC),
        (1.0 - beta2).to(ARITHMETIC),
        (1.0 - lr * weight_decay).to(ARITHMETIC),
    )


@triton.jit
def lion_update(param, grad, exp_avg, s, PRESENT: tl.constexpr):
    direction = s.beta1 * exp_avg + s.one_minus_beta1 * grad
    step = tl.where(direction > 0, -s.lr, tl.where(direction < 0, s.lr, direction))
    return param * s.decay + step, s.beta2 * exp_avg + s.one_minus_beta2 * grad


class AdaBeliefScalars(NamedTuple):
    beta1: tl.tensor
    one_minus_beta1: tl.tensor
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    step_size: tl.tensor
    inv_bias_correction2_sqrt: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    decay: tl.tensor
    rectify: tl.tensor
    adaptive: tl.tensor


@triton.jit
def adabelief_prepare(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    lr = tl.load(hyper_ptr)
    beta1 = tl.load(hyper_ptr + 1)
    beta2 = tl.load(hyper_ptr + 2)
    eps = tl.load(hyper_ptr + 3)
    weight_decay = tl.load(hyper_ptr + 4)
    weight_decouple = tl.load(hyper_ptr + 5) != 0
    fixed_decay = tl.load(hyper_ptr + 6) != 0
    rectify = tl.load(hyper_ptr + 7) != 0
    degenerated_to_sgd = tl.load(hyper_ptr + 8) != 0
    one = lr * 0.0 + 1.0  # in float64: a plain number would be narrowed
    beta2_t = power(beta2, step)
    bias_correction1 = 1.0 - power(beta1, step)
    step_size = divide(lr, bias_correction1)
    n_max = divide(one * 2.0, 1.0 - beta2) - 1.0
    n = n_max - divide(2.0 * step.to(tl.float64) * beta2_t, 1.0 - beta2_t)
    is_rectified = n >= 5.0
    some_n = tl.where(is_rectified, n, 5.0)  # where it is not used, numbers that keep the root real
    some_n_max = tl.where(is_rectified, n_max, 5.0)
    ratio = divide(some_n - 4.0, some_n_max - 4.0) * (some_n - 2.0)
    ratio = divide(divide(ratio, some_n) * some_n_max, some_n_max - 2.0)
    rectified = step_size * square_root((1.0 - beta2_t) * ratio)
    degenerated = tl.where(degenerated_to_sgd, step_size, 0.0)
    decay = tl.where(fixed_decay, 1.0 - weight_decay, 1.0 - lr * weight_decay)
    return AdaBeliefScalars(
        beta1.to(ARITHMETIC),
        (1.0 - beta1).to(ARITHMETIC),
        beta2.to(ARITHMETIC),
        (1.0 - beta2).to(ARITHMETIC),
        tl.where(rectify, tl.where(is_rectified, rectified, degenerated), step_size).to(ARITHMETIC),
        tl.where(rectify, one, divide(one, square_root(1.0 - beta2_t))).to(ARITHMETIC),
        eps.to(ARITHMETIC),
        tl.where(weight_decouple, 0.0, weight_decay).to(ARITHMETIC),
        tl.where(weight_decouple, decay, one).to(ARITHMETIC),
        rectify,
        is_rectified | (rectify == 0),
    )


@triton.jit
def adabelief_update(param, grad, exp_avg, exp_avg_var, max_exp_avg_var, s, PRESENT: tl.constexpr):
    param = param * s.decay
    if s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad
    residual = grad - exp_avg
    exp_avg_var = s.beta2 * exp_avg_var + s.one_minus_beta2 * residual * residual + s.eps
    variance = exp_avg_var
    if PRESENT & 4:
        max_exp_avg_var = maximum(max_exp_avg_var, exp_avg_var)
        variance = tl.where(s.rectify, exp_avg_var, max_exp_avg_var)
    if s.adaptive:
        denom = square_root(variance) * s.inv_bias_correction2_sqrt + s.eps
        param = param - divide(s.step_size * exp_avg, denom)
    elif s.step_size != 0:
        param = param - s.step_size * exp_avg
    return param, exp_avg, exp_avg_var, max_exp_avg_var


class AmosScalars(NamedTuple):
    beta: tl.tensor
    one_minus_beta: tl.tensor
    bias_correction: tl.tensor
    lr_squared: tl.tensor
    init_lr: tl.tensor
    c: tl.tensor
    d: tl.tensor
    extra_l2: tl.tensor
    eps: tl.tensor
    momentum: tl.tensor
    one_minus_momentum: tl.tensor
    clip_value: tl.tensor


@triton.jit
def amos_prepare(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    lr = tl.load(hyper_ptr)
    eta = tl.load(hyper_ptr + 1)
    beta = tl.load(hyper_ptr + 2)
    momentum = tl.load(hyper_ptr + 3)
    clip_value = tl.load(hyper_ptr + 4)
    extra_l2 = tl.load(hyper_ptr + 5)
    c_coef = tl.load(hyper_ptr + 6)
    d_coef = tl.load(hyper_ptr + 7)
    eps = tl.load(hyper_ptr + 8)
    init_lr = lr * eta
    return AmosScalars(
        beta.to(ARITHMETIC),
        (1.0 - beta).to(ARITHMETIC),
        (1.0 - power(beta, step)).to(ARITHMETIC),
        (lr * lr).to(ARITHMETIC),
        init_lr.to(ARITHMETIC),
        (c_coef * square_root(lr)).to(ARITHMETIC),
        (d_coef * square_root(init_lr)).to(ARITHMETIC),
        extra_l2.to(ARITHMETIC),
        eps.to(ARITHMETIC),
        momentum.to(ARITHMETIC),
        (1.0 - momentum).to(ARITHMETIC),
        clip_value.to(ARITHMETIC),
    )


@triton.jit
def amos_clip(grad, s):
    if s.clip_value != 0:
        grad = maximum(minimum(grad, s.clip_value), -s.clip_value)
    return grad


@triton.jit
def amos_advance(grad_sq, exp_avg_sq, decay, s):
    """The new statistics, and what an update makes of them."""
    exp_avg_sq = s.beta * exp_avg_sq + s.one_minus_beta * grad_sq
    reciprocal = divide(s.bias_correction, maximum(exp_avg_sq, s.eps))
    gamma = divide(s.lr_squared * (reciprocal * grad_sq), square_root(1.0 + s.c * decay))
    divisor = 1.0 + s.d * decay
    decay = decay + gamma * (1.0 + decay)
    return exp_avg_sq, decay, square_root(reciprocal), 0.5 * gamma + s.extra_l2, divisor


@triton.jit
def amos_update(param, grad, exp_avg_sq, decay, exp_avg, s, PRESENT: tl.constexpr):
    grad = amos_clip(grad, s)
    exp_avg_sq, decay, reciprocal_root, l2, divisor = amos_advance(grad * grad, exp_avg_sq, decay, s)
    delta = divide(s.init_lr * (reciprocal_root * grad) + l2 * param, divisor)
    if PRESENT & 4:
        exp_avg = s.momentum * exp_avg + s.one_minus_momentum * delta
        delta = exp_avg
    return param - delta, exp_avg_sq, decay, exp_avg


class AccumulateScalars(NamedTuple):
    weight: tl.tensor
    first: tl.tensor


@triton.jit
def accumulate_prepare(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    weight = tl.load(hyper_ptr)
    return AccumulateScalars(weight.to(ARITHMETIC), step == 1)


@triton.jit
def accumulate_update(param, grad, s, PRESENT: tl.constexpr):
    grad = s.weight * grad
    return tl.where(s.first, grad, param + grad)


class Rule(NamedTuple):
    """What the generic kernel needs of a rule."""

    prepare: triton.JITFunction
    update: triton.JITFunction
    n_named: int  # states that update() names


RULES = {
    "sgd": Rule(sgd_prepare, sgd_update, 1),
    "adam": Rule(adam_prepare, adam_update, 3),
    "rmsprop": Rule(rmsprop_prepare, rmsprop_update, 3),
    "adagrad": Rule(adagrad_prepare, adagrad_update, 1),
    "lion": Rule(lion_prepare, lion_update, 1),
    "adabelief": Rule(adabelief_prepare, adabelief_update, 3),
    "amos": Rule(amos_prepare, amos_update, 3),
    "accumulate": Rule(accumulate_prepare, accumulate_update, 0),
}
