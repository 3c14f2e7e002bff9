"""Every rule that reduces: csrc/reducing_rules.h in Triton, with the same names in the same order.

The functions of a rule: `prepare` and `finish` compute scalars in float64; `line` goes from the mean of a line's
squares to its new state and its factor, `matrix` from the mean of the rows' states to what their factors are multiplied
with; `direction` and `update` are the arithmetic of a block of elements.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .numeric import divide, maximum, square_root


@triton.jit
def power_of(base, exponent):
    """base^exponent for real numbers, in float64."""
    return tl.exp(tl.log(base) * exponent)


@triton.jit
def interpolate(a, b, weight):
    """From ``a`` to ``b`` as torch.lerp goes: exactly there for a weight of 1."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1.0 - weight))


class AdafactorScalars(NamedTuple):
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    eps1: tl.tensor
    beta1: tl.tensor
    one_minus_beta1: tl.tensor
    rel_step: tl.tensor
    eps2: tl.tensor
    clip_threshold: tl.tensor
    weight_decay: tl.tensor
    scale_parameter: tl.tensor


class Finish(NamedTuple):
    step_size: tl.tensor
    decay: tl.tensor


@triton.jit
def adafactor_prepare(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    lr = tl.load(hyper_ptr)
    eps1 = tl.load(hyper_ptr + 1)
    eps2 = tl.load(hyper_ptr + 2)
    clip_threshold = tl.load(hyper_ptr + 3)
    decay_rate = tl.load(hyper_ptr + 4)
    beta1 = tl.load(hyper_ptr + 5)
    weight_decay = tl.load(hyper_ptr + 6)
    scale_parameter = tl.load(hyper_ptr + 7) != 0
    relative_step = tl.load(hyper_ptr + 8) != 0
    warmup_init = tl.load(hyper_ptr + 9)
    t = step.to(tl.float64)
    one_minus_beta2 = power_of(t, decay_rate)
    beta2 = 1.0 - one_minus_beta2
    min_step = tl.where(warmup_init != 0, t / 1000000, t * 0 + divide(t * 0 + 1, t * 0 + 100))
    relative = divide(t * 0 + 1, square_root(t))
    return AdafactorScalars(
        beta2.to(ARITHMETIC),
        (1.0 - beta2).to(ARITHMETIC),
        eps1.to(ARITHMETIC),
        beta1.to(ARITHMETIC),
        (1.0 - beta1).to(ARITHMETIC),
        tl.where(relative_step, tl.where(relative < min_step, relative, min_step), lr),
        eps2,
        clip_threshold,
        weight_decay,
        scale_parameter,
    )


@triton.jit
def adafactor_square(grad, s):
    return grad * grad


@triton.jit
def adafactor_line(mean, state, s):
    state = s.beta2 * state + s.one_minus_beta2 * (mean + s.eps1)
    return state, divide(state * 0 + 1, square_root(state))


@triton.jit
def adafactor_matrix(mean, s):
    return square_root(mean)


@triton.jit
def adafactor_direction(grad, factor, s):
    return factor * grad


@triton.jit
def adafactor_finish(s, param_rms, update_rms, ARITHMETIC: tl.constexpr):
    scale = tl.where(s.scale_parameter, tl.where(param_rms > s.eps2, param_rms, s.eps2), s.eps2 * 0 + 1)
    lr = scale * s.rel_step
    excess = divide(update_rms, s.clip_threshold)
    step_size = tl.where(excess < 1.0, lr, divide(lr, excess))  # NaN stays
    return Finish(step_size.to(ARITHMETIC), (1.0 - s.weight_decay * lr).to(ARITHMETIC))


@triton.jit
def adafactor_update(param, grad, factor, exp_avg, s, f, HAS_STATE: tl.constexpr):
    update = f.step_size * adafactor_direction(grad, factor, s)
    if HAS_STATE:
        exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * update
        update = exp_avg
    return param * f.decay - update, exp_avg


class TorchAdafactorScalars(NamedTuple):
    one_minus_beta2: tl.tensor
    eps1: tl.tensor
    limit: tl.tensor
    rho: tl.tensor
    eps2: tl.tensor
    d: tl.tensor
    decay: tl.tensor


@triton.jit
def torch_adafactor_prepare(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    lr = tl.load(hyper_ptr)
    beta2_decay = tl.load(hyper_ptr + 1)
    eps1 = tl.load(hyper_ptr + 2)
    eps2 = tl.load(hyper_ptr + 3)
    d = tl.load(hyper_ptr + 4)
    weight_decay = tl.load(hyper_ptr + 5)
    t = step.to(tl.float64)
    relative = divide(t * 0 + 1, square_root(t))
    return TorchAdafactorScalars(
        power_of(t, beta2_decay).to(ARITHMETIC),
        eps1.to(ARITHMETIC),
        divide(eps1 * 0 + 1, eps1).to(ARITHMETIC),
        tl.where(relative < lr, relative, lr),
        eps2,
        d,
        1.0 - lr * weight_decay,
    )


@triton.jit
def torch_adafactor_square(grad, s):
    return grad * grad


@triton.jit
def torch_adafactor_line(mean, state, s):
    state = interpolate(state, mean, s.one_minus_beta2)
    return state, divide(state * 0 + 1, square_root(state))


@triton.jit
def torch_adafactor_matrix(mean, s):
    return square_root(maximum(s.eps1, mean))


@triton.jit
def torch_adafactor_direction(grad, factor, s):
    return tl.where(s.limit < factor, s.limit, factor) * grad


@triton.jit
def torch_adafactor_finish(s, param_rms, update_rms, ARITHMETIC: tl.constexpr):
    alpha = tl.where(param_rms > s.eps2, param_rms, s.eps2) * s.rho
    excess = divide(update_rms, s.d)
    step_size = tl.where(excess > 1.0, divide(alpha, excess), alpha)
    return Finish(step_size.to(ARITHMETIC), s.decay.to(ARITHMETIC))


@triton.jit
def torch_adafactor_update(param, grad, factor, state, s, f, HAS_STATE: tl.constexpr):
    return param * f.decay - f.step_size * torch_adafactor_direction(grad, factor, s), state


class ReducingRule(NamedTuple):
    """What the generic kernels need of a rule, and the names of its states by what they belong to."""

    prepare: triton.JITFunction
    square: triton.JITFunction
    line: triton.JITFunction
    matrix: triton.JITFunction
    direction: triton.JITFunction
    finish: triton.JITFunction
    update: triton.JITFunction
    row: str
    column: str
    flat: str
    element: str  # "" for none
    tensor: str


REDUCING_RULES = {
    "adafactor": ReducingRule(
        adafactor_prepare,
        adafactor_square,
        adafactor_line,
        adafactor_matrix,
        adafactor_direction,
        adafactor_finish,
        adafactor_update,
        row="exp_avg_sq_row",
        column="exp_avg_sq_col",
        flat="exp_avg_sq",
        element="exp_avg",
        tensor="RMS",
    ),
    "torch_adafactor": ReducingRule(
        torch_adafactor_prepare,
        torch_adafactor_square,
        torch_adafactor_line,
        torch_adafactor_matrix,
        torch_adafactor_direction,
        torch_adafactor_finish,
        torch_adafactor_update,
        row="row_var",
        column="col_var",
        flat="variance",
        element="",
        tensor="",
    ),
}
