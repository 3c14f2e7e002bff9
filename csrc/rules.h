// Every elementwise update rule: its hyperparameters, its states, prepare() once per tensor and step in float64, and
// update() of one element. Nothing here knows about dtypes, layouts, threads or devices: the engines load, call, store.
//
// A rule whose option adds a state takes that option as a template flag; an option that only changes a number is a
// hyperparameter. T is the number that update() works on: float, double, or a vector of them; S holds the scalars, of
// plain float or double. update() names every state that the rule can have, in one fixed order; an absent one (the flag
// is off) is a dummy that the compiler removes. Operations are written one by one because all backends keep this order:
// they agree bit for bit in fp32 (no contraction into FMA, IEEE division and square root).
#pragma once

#include "numeric.h"

namespace fusedstep {

constexpr int kMaxHyper = 8;
constexpr int kMaxStates = 4;

// The list of all rules; visit_rule below gives each its type.
enum class RuleId : int { kSgd, kSgdMomentum, kAdam, kAdamAmsgrad, kCount };

inline namespace FUSEDSTEP_ISA {

// base^exponent by squaring: only IEEE multiplications, hence the same bits wherever it runs.
FUSEDSTEP_FN double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

template <class T>
FUSEDSTEP_FN T maximum(T a, T b) {  // NaN wins, as in torch.maximum
  return (b > a) | (b != b) ? b : a;
}

// Stochastic gradient descent as torch.optim.SGD computes it: the first buffer is the gradient itself.
template <bool kMomentum>
struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr const char* kHyper[] = {"lr", "momentum", "dampening", "weight_decay", "nesterov"};
  static constexpr const char* kStateNames[] = {"momentum_buffer"};
  static constexpr int kStates = kMomentum ? 1 : 0;

  template <class T>
  struct Scalars {
    T lr, weight_decay, momentum, keep, take;
    bool nesterov;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double lr = hyper[0], momentum = hyper[1], dampening = hyper[2], weight_decay = hyper[3];
    Scalars<T> s;
    s.lr = static_cast<T>(lr);
    s.weight_decay = static_cast<T>(weight_decay);
    s.momentum = static_cast<T>(momentum);
    s.keep = static_cast<T>(step == 1 ? 0.0 : momentum);
    s.take = static_cast<T>(step == 1 ? 1.0 : 1.0 - dampening);
    s.nesterov = hyper[4] != 0.0;
    return s;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, T& momentum_buffer, const S& s) {
    if (s.weight_decay != 0) grad = grad + s.weight_decay * param;
    if constexpr (kMomentum) {
      momentum_buffer = s.keep * momentum_buffer + s.take * grad;
      grad = s.nesterov ? grad + s.momentum * momentum_buffer : momentum_buffer;
    }
    param = param - s.lr * grad;
  }
};

// Adam (arXiv 1412.6980), AMSGrad, and with decoupled decay AdamW (arXiv 1711.05101).
template <bool kAmsgrad>
struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr const char* kHyper[] = {"lr", "beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay"};
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr int kStates = kAmsgrad ? 3 : 2;

  template <class T>
  struct Scalars {
    T one_minus_beta1, beta2, one_minus_beta2, step_size, inv_bias_correction2_sqrt, eps, weight_decay, decay;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], weight_decay = hyper[4];
    const bool decoupled = hyper[5] != 0.0;
    const double bias_correction1 = 1.0 - power(beta1, step);
    const double bias_correction2 = 1.0 - power(beta2, step);
    Scalars<T> s;
    s.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    s.beta2 = static_cast<T>(beta2);
    s.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    s.step_size = static_cast<T>(lr / bias_correction1);
    s.inv_bias_correction2_sqrt = static_cast<T>(1.0 / square_root(bias_correction2));
    s.eps = static_cast<T>(eps);
    s.weight_decay = static_cast<T>(decoupled ? 0.0 : weight_decay);
    s.decay = static_cast<T>(decoupled ? 1.0 - lr * weight_decay : 1.0);
    return s;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, const S& s) {
    param = param * s.decay;
    if (s.weight_decay != 0) grad = grad + s.weight_decay * param;
    exp_avg = exp_avg + s.one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad;
    if constexpr (kAmsgrad) max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
    const T second_moment = kAmsgrad ? max_exp_avg_sq : exp_avg_sq;
    const T denom = square_root(second_moment) * s.inv_bias_correction2_sqrt + s.eps;
    param = param - s.step_size * exp_avg / denom;
  }
};

// An engine compiles itself once for each rule, through visit_rule.
template <class Visitor>
auto visit_rule(RuleId rule, Visitor&& visitor) {
  switch (rule) {
    case RuleId::kSgd:
      return visitor(Sgd<false>{});
    case RuleId::kSgdMomentum:
      return visitor(Sgd<true>{});
    case RuleId::kAdam:
      return visitor(Adam<false>{});
    default:
      return visitor(Adam<true>{});
  }
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep
