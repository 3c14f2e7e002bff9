"""Every rule that reduces: csrc/reducing_rules.h in Triton, with the same names in the same order.

The functions of a rule: `prepare` and `finish` compute scalars in float64; `line` goes from the mean of a line's
squares to its new state and its factor, `matrix` from the mean of the rows' states to what their factors are multiplied
with; `direction` and `update` are the arithmetic of a block of elements.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .numeric import divide, maximum, square_root
from .rules import amos_advance, amos_clip, amos_prepare


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
def adafactor_line(mean, state, state2, s):
    state = s.beta2 * state + s.one_minus_beta2 * (mean + s.eps1)
    factor = divide(state * 0 + 1, square_root(state))
    return state, state2, factor, factor


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
    decay = tl.where(s.weight_decay != 0, 1.0 - s.weight_decay * lr, s.weight_decay * 0 + 1)
    return Finish(step_size.to(ARITHMETIC), decay.to(ARITHMETIC))


@triton.jit
def adafactor_update(param, grad, factor, factor2, exp_avg, s, f, HAS_STATE: tl.constexpr):
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
        tl.where(weight_decay != 0, 1.0 - lr * weight_decay, t * 0 + 1),
    )


@triton.jit
def torch_adafactor_square(grad, s):
    return grad * grad


@triton.jit
def torch_adafactor_line(mean, state, state2, s):
    state = interpolate(state, mean, s.one_minus_beta2)
    factor = divide(state * 0 + 1, square_root(state))
    return state, state2, factor, factor


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
def torch_adafactor_update(param, grad, factor, factor2, state, s, f, HAS_STATE: tl.constexpr):
    return param * f.decay - f.step_size * torch_adafactor_direction(grad, factor, s), state


@triton.jit
def amos_square(grad, s):
    grad = amos_clip(grad, s)
    return grad * grad


@triton.jit
def amos_line(mean, exp_avg_sq, decay, s):
    exp_avg_sq, decay, reciprocal_root, l2, divisor = amos_advance(mean, exp_avg_sq, decay, s)
    return exp_avg_sq, decay, divide(s.init_lr * reciprocal_root, divisor), divide(l2, divisor)


@triton.jit
def amos_finish(s, param_rms, update_rms, ARITHMETIC: tl.constexpr):
    return 0


@triton.jit
def amos_lines_update(param, grad, factor, factor2, exp_avg, s, f, HAS_STATE: tl.constexpr):
    delta = factor * amos_clip(grad, s) + factor2 * param
    if HAS_STATE:
        exp_avg = s.momentum * exp_avg + s.one_minus_momentum * delta
        delta = exp_avg
    return param - delta, exp_avg


class ReducingRule(NamedTuple):
    """What the generic kernels need of a rule, and the names of its states by what they belong to; "" for none."""

    prepare: triton.JITFunction
    square: triton.JITFunction
    line: triton.JITFunction
    finish: triton.JITFunction
    update: triton.JITFunction
    matrix: triton.JITFunction | None = None  # None: no mean of rows' states is asked for
    direction: triton.JITFunction | None = None  # None: no RMS of the update is asked for
    row: str = ""
    column: str = ""
    flat: str = ""
    element: str = ""
    tensor: str = ""
    row2: str = ""
    column2: str = ""
    param_sum: bool = False  # whether the RMS of the old parameter is asked for


REDUCING_RULES = {
    "adafactor": ReducingRule(
        adafactor_prepare,
        adafactor_square,
        adafactor_line,
        adafactor_finish,
        adafactor_update,
        adafactor_matrix,
        adafactor_direction,
        param_sum=True,
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
        torch_adafactor_finish,
        torch_adafactor_update,
        torch_adafactor_matrix,
        torch_adafactor_direction,
        param_sum=True,
        row="row_var",
        column="col_var",
        flat="variance",
    ),
    "amos_rows": ReducingRule(
        *(amos_prepare, amos_square, amos_line, amos_finish, amos_lines_update),
        **{"row": "exp_avg_sq", "row2": "decay", "element": "exp_avg"},
    ),
    "amos_columns": ReducingRule(
        *(amos_prepare, amos_square, amos_line, amos_finish, amos_lines_update),
        **{"column": "exp_avg_sq", "column2": "decay", "element": "exp_avg"},
    ),
}
