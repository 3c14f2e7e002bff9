// Amos, whose arithmetic is part of both lists of rules: rules.h has it as it stands here, with statistics for each
// element; reducing_rules.h takes its scalars, its clipping and its statistics for whole rows or columns. No dtype,
// layout, thread or device belongs here.
#pragma once

#include "arithmetic.h"
#include "rule.h"

namespace fusedstep {
inline namespace FUSEDSTEP_ISA {

// Amos (arXiv 2210.11693, algorithm 1) with statistics for each element: exp_avg_sq is v, decay is b.
template <bool kMomentum>
struct Amos {
  static constexpr const char* kName = "amos";
  static constexpr const char* kHyper[] = {"lr",       "eta",    "beta",   "momentum", "clip_value",
                                           "extra_l2", "c_coef", "d_coef", "eps"};
  static constexpr const char* kStateNames[] = {"exp_avg_sq", "decay", "exp_avg"};
  static constexpr bool kPresent[] = {true, true, kMomentum};
  static constexpr Code kCodes[] = {Code::kNonNegative, Code::kNonNegative, Code::kSigned};

  template <class T>
  struct Scalars {
    T beta, one_minus_beta, bias_correction, lr_squared, init_lr, c, d, extra_l2, eps, momentum, one_minus_momentum;
    T clip_value;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double lr = hyper[0], eta = hyper[1], beta = hyper[2], momentum = hyper[3], clip_value = hyper[4];
    const double extra_l2 = hyper[5], c_coef = hyper[6], d_coef = hyper[7], eps = hyper[8];
    const double init_lr = lr * eta;
    Scalars<T> s;
    s.beta = static_cast<T>(beta);
    s.one_minus_beta = static_cast<T>(1.0 - beta);
    s.bias_correction = static_cast<T>(1.0 - power(beta, step));
    s.lr_squared = static_cast<T>(lr * lr);
    s.init_lr = static_cast<T>(init_lr);
    s.c = static_cast<T>(c_coef * square_root(lr));
    s.d = static_cast<T>(d_coef * square_root(init_lr));
    s.extra_l2 = static_cast<T>(extra_l2);
    s.eps = static_cast<T>(eps);
    s.momentum = static_cast<T>(momentum);
    s.one_minus_momentum = static_cast<T>(1.0 - momentum);
    s.clip_value = static_cast<T>(clip_value);
    return s;
  }

  template <class T, class S>
  static FUSEDSTEP_FN T clip(T grad, const S& s) {
    const T zero{};
    return s.clip_value != 0 ? maximum(minimum(grad, zero + s.clip_value), zero - s.clip_value) : grad;
  }

  // What an update makes of its statistics.
  template <class T>
  struct Factors {
    T reciprocal_root, l2, divisor;
  };
  template <class T, class S>
  static FUSEDSTEP_FN Factors<T> advance(T grad_sq, T& exp_avg_sq, T& decay, const S& s) {
    const T zero{}, one = zero + 1.0f, half = zero + 0.5f;
    exp_avg_sq = s.beta * exp_avg_sq + s.one_minus_beta * grad_sq;
    const T reciprocal = s.bias_correction / maximum(exp_avg_sq, zero + s.eps);
    const T gamma = s.lr_squared * (reciprocal * grad_sq) / square_root(one + s.c * decay);
    const Factors<T> factors{square_root(reciprocal), half * gamma + s.extra_l2, one + s.d * decay};
    decay = decay + gamma * (one + decay);
    return factors;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, T& exp_avg_sq, T& decay, T& exp_avg, const S& s) {
    grad = clip(grad, s);
    const Factors<T> f = advance(T(grad * grad), exp_avg_sq, decay, s);
    T delta = (s.init_lr * (f.reciprocal_root * grad) + f.l2 * param) / f.divisor;
    if constexpr (kMomentum) {
      exp_avg = s.momentum * exp_avg + s.one_minus_momentum * delta;
      delta = exp_avg;
    }
    param = param - delta;
  }
};

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep
