// Every elementwise update rule: its hyperparameters, its states, prepare() once per tensor and step in float64, and
// update() of one element. rule.h says what a rule has. Nothing here knows about dtypes, layouts, threads or devices:
// the engines load, call, store.
#pragma once

#include <array>
#include <type_traits>

#include "amos.h"
#include "arithmetic.h"
#include "rule.h"

namespace fusedstep {

// The list of all rules; visit_rule below gives each its type.
enum class RuleId : int {
  kSgd,
  kSgdMomentum,
  kAdam,
  kAdamAmsgrad,
  kRmsprop,
  kRmspropMomentum,
  kRmspropCentered,
  kRmspropCenteredMomentum,
  kAdagrad,
  kLion,
  kAdaBelief,
  kAdaBeliefAmsgrad,
  kAmos,
  kAmosMomentum,
  kAccumulate,
  kCount
};

inline namespace FUSEDSTEP_ISA {

// Stochastic gradient descent as torch.optim.SGD computes it: the first buffer is the gradient itself.
template <bool kMomentum>
struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr const char* kHyper[] = {"lr", "momentum", "dampening", "weight_decay", "nesterov"};
  static constexpr const char* kStateNames[] = {"momentum_buffer"};
  static constexpr bool kPresent[] = {kMomentum};
  static constexpr Code kCodes[] = {Code::kSigned};

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

// Adam (arXiv 1412.6980), AMSGrad, and with decoupled decay AdamW (arXiv 1711.05101). epsilon_hat: eps is added to the
// root of the second moment before its bias is corrected, which is the form before section 2.1 of the paper.
template <bool kAmsgrad>
struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr const char* kHyper[] = {
      "lr", "beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay", "epsilon_hat", "lr_decay"};
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr bool kPresent[] = {true, true, kAmsgrad};
  static constexpr Code kCodes[] = {Code::kSigned, Code::kNonNegative, Code::kNonNegative};

  template <class T>
  struct Scalars {
    T one_minus_beta1, beta2, one_minus_beta2, step_size, inv_bias_correction2_sqrt, eps, weight_decay, decay;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], weight_decay = hyper[4], lr_decay = hyper[7];
    const bool decoupled = hyper[5] != 0.0, epsilon_hat = hyper[6] != 0.0;
    const double lr = hyper[0] / (1.0 + static_cast<double>(step - 1) * lr_decay);
    const double bias_correction1 = 1.0 - power(beta1, step);
    const double inv_bias_correction2_sqrt = 1.0 / square_root(1.0 - power(beta2, step));
    Scalars<T> s;
    s.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    s.beta2 = static_cast<T>(beta2);
    s.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    s.step_size = static_cast<T>(lr / bias_correction1);
    s.inv_bias_correction2_sqrt = static_cast<T>(inv_bias_correction2_sqrt);
    s.eps = static_cast<T>(epsilon_hat ? eps * inv_bias_correction2_sqrt : eps);
    s.weight_decay = static_cast<T>(decoupled ? 0.0 : weight_decay);
    s.decay = static_cast<T>(decoupled && weight_decay != 0.0 ? 1.0 - lr * weight_decay : 1.0);  // lr may be infinite
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

// RMSprop as torch.optim.RMSprop computes it; a centered variance that rounding has made negative counts as zero.
template <bool kMomentum, bool kCentered>
struct Rmsprop {
  static constexpr const char* kName = "rmsprop";
  static constexpr const char* kHyper[] = {"lr", "alpha", "eps", "weight_decay", "momentum", "momentum_decay"};
  static constexpr const char* kStateNames[] = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr bool kPresent[] = {true, kMomentum, kCentered};
  // The variance is a difference of two states, which fewer bits would make zero.
  static constexpr Code kCodes[] = {kCentered ? Code::kNone : Code::kNonNegative, Code::kSigned, Code::kNone};

  template <class T>
  struct Scalars {
    T lr, alpha, one_minus_alpha, eps, weight_decay, momentum;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double lr = hyper[0], alpha = hyper[1], eps = hyper[2], weight_decay = hyper[3], momentum = hyper[4];
    const double momentum_decay = hyper[5];
    Scalars<T> s;
    s.lr = static_cast<T>(lr);
    s.alpha = static_cast<T>(alpha);
    s.one_minus_alpha = static_cast<T>(1.0 - alpha);
    s.eps = static_cast<T>(eps);
    s.weight_decay = static_cast<T>(weight_decay);
    s.momentum = static_cast<T>(momentum * power(1.0 - momentum_decay, step - 1));
    return s;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, T& square_avg, T& momentum_buffer, T& grad_avg, const S& s) {
    if (s.weight_decay != 0) grad = grad + s.weight_decay * param;
    square_avg = s.alpha * square_avg + s.one_minus_alpha * grad * grad;
    T variance = square_avg;
    if constexpr (kCentered) {
      grad_avg = grad_avg + s.one_minus_alpha * (grad - grad_avg);
      variance = maximum(square_avg - grad_avg * grad_avg, T{});
    }
    const T denom = square_root(variance) + s.eps;
    if constexpr (kMomentum) {
      momentum_buffer = s.momentum * momentum_buffer + grad / denom;
      param = param - s.lr * momentum_buffer;
    } else {
      param = param - s.lr * grad / denom;
    }
  }
};

// Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011) as torch.optim.Adagrad computes it.
struct Adagrad {
  static constexpr const char* kName = "adagrad";
  static constexpr const char* kHyper[] = {"lr", "lr_decay", "weight_decay", "eps"};
  static constexpr const char* kStateNames[] = {"sum"};
  static constexpr bool kPresent[] = {true};
  static constexpr Code kCodes[] = {Code::kNonNegative};

  template <class T>
  struct Scalars {
    T step_size, weight_decay, eps;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double lr = hyper[0], lr_decay = hyper[1], weight_decay = hyper[2], eps = hyper[3];
    Scalars<T> s;
    s.step_size = static_cast<T>(lr / (1.0 + static_cast<double>(step - 1) * lr_decay));
    s.weight_decay = static_cast<T>(weight_decay);
    s.eps = static_cast<T>(eps);
    return s;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, T& sum, const S& s) {
    if (s.weight_decay != 0) grad = grad + s.weight_decay * param;
    sum = sum + grad * grad;
    param = param - s.step_size * grad / (square_root(sum) + s.eps);
  }
};

// Lion (arXiv 2302.06675): the sign of an interpolation, which is zero where that is exactly zero.
struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr const char* kHyper[] = {"lr", "beta1", "beta2", "weight_decay"};
  static constexpr const char* kStateNames[] = {"exp_avg"};
  static constexpr bool kPresent[] = {true};
  static constexpr Code kCodes[] = {Code::kSigned};

  template <class T>
  struct Scalars {
    T lr, beta1, one_minus_beta1, beta2, one_minus_beta2, decay;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t) {
    const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], weight_decay = hyper[3];
    Scalars<T> s;
    s.lr = static_cast<T>(lr);
    s.beta1 = static_cast<T>(beta1);
    s.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    s.beta2 = static_cast<T>(beta2);
    s.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    s.decay = static_cast<T>(1.0 - lr * weight_decay);
    return s;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, T& exp_avg, const S& s) {
    const T zero{}, direction = s.beta1 * exp_avg + s.one_minus_beta1 * grad;
    const T down = zero - s.lr, up = zero + s.lr;
    const T step = direction > zero ? down : direction < zero ? up : direction;
    param = param * s.decay + step;
    exp_avg = s.beta2 * exp_avg + s.one_minus_beta2 * grad;
  }
};

// AdaBelief (arXiv 2010.07468) as adabelief-pytorch 0.2.1 computes it: eps stays in the running variance, and the
// rectified step (RAdam's, arXiv 1908.03265) takes neither the maximum nor the correction of the variance's bias.
template <bool kAmsgrad>
struct AdaBelief {
  static constexpr const char* kName = "adabelief";
  static constexpr const char* kHyper[] = {
      "lr", "beta1", "beta2", "eps", "weight_decay", "weight_decouple", "fixed_decay", "rectify", "degenerated_to_sgd"};
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_var", "max_exp_avg_var"};
  static constexpr bool kPresent[] = {true, true, kAmsgrad};
  static constexpr Code kCodes[] = {Code::kSigned, Code::kNonNegative, Code::kNonNegative};

  template <class T>
  struct Scalars {
    T beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_bias_correction2_sqrt, eps, weight_decay, decay;
    bool rectify, adaptive;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], weight_decay = hyper[4];
    const bool decouple = hyper[5] != 0.0, fixed_decay = hyper[6] != 0.0, rectify = hyper[7] != 0.0;
    const bool degenerated_to_sgd = hyper[8] != 0.0;
    const double beta2_t = power(beta2, step), bias_correction1 = 1.0 - power(beta1, step);
    double step_size = lr / bias_correction1;
    bool adaptive = true;
    if (rectify) {
      const double n_max = 2.0 / (1.0 - beta2) - 1.0;
      const double n = n_max - 2.0 * static_cast<double>(step) * beta2_t / (1.0 - beta2_t);
      adaptive = n >= 5.0;
      if (adaptive) {
        const double ratio = (n - 4.0) / (n_max - 4.0) * (n - 2.0) / n * n_max / (n_max - 2.0);
        step_size = step_size * square_root((1.0 - beta2_t) * ratio);
      } else if (!degenerated_to_sgd) {
        step_size = 0.0;
      }
    }
    Scalars<T> s;
    s.beta1 = static_cast<T>(beta1);
    s.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    s.beta2 = static_cast<T>(beta2);
    s.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    s.step_size = static_cast<T>(step_size);
    s.inv_bias_correction2_sqrt = static_cast<T>(rectify ? 1.0 : 1.0 / square_root(1.0 - beta2_t));
    s.eps = static_cast<T>(eps);
    s.weight_decay = static_cast<T>(decouple ? 0.0 : weight_decay);
    s.decay = static_cast<T>(!decouple ? 1.0 : fixed_decay ? 1.0 - weight_decay : 1.0 - lr * weight_decay);
    s.rectify = rectify;
    s.adaptive = adaptive;
    return s;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, T& exp_avg, T& exp_avg_var, T& max_exp_avg_var, const S& s) {
    param = param * s.decay;
    if (s.weight_decay != 0) grad = grad + s.weight_decay * param;
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad;
    const T residual = grad - exp_avg;
    exp_avg_var = s.beta2 * exp_avg_var + s.one_minus_beta2 * residual * residual + s.eps;
    T variance = exp_avg_var;
    if constexpr (kAmsgrad) {
      max_exp_avg_var = maximum(max_exp_avg_var, exp_avg_var);
      variance = s.rectify ? exp_avg_var : max_exp_avg_var;
    }
    if (s.adaptive) {
      const T denom = square_root(variance) * s.inv_bias_correction2_sqrt + s.eps;
      param = param - s.step_size * exp_avg / denom;
    } else if (s.step_size != 0) {
      param = param - s.step_size * exp_avg;
    }
  }
};

// A weighted sum over micro-batches: the parameter is the sum, and its first gradient overwrites whatever is there.
struct Accumulate {
  static constexpr const char* kName = "accumulate";
  static constexpr const char* kHyper[] = {"weight"};
  static constexpr std::array<const char*, 0> kStateNames{};
  static constexpr std::array<bool, 0> kPresent{};
  static constexpr std::array<Code, 0> kCodes{};

  template <class T>
  struct Scalars {
    T weight;
    bool first;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double weight = hyper[0];
    Scalars<T> s;
    s.weight = static_cast<T>(weight);
    s.first = step == 1;
    return s;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, const S& s) {
    grad = s.weight * grad;
    param = s.first ? grad : param + grad;
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
    case RuleId::kAdamAmsgrad:
      return visitor(Adam<true>{});
    case RuleId::kRmsprop:
      return visitor(Rmsprop<false, false>{});
    case RuleId::kRmspropMomentum:
      return visitor(Rmsprop<true, false>{});
    case RuleId::kRmspropCentered:
      return visitor(Rmsprop<false, true>{});
    case RuleId::kRmspropCenteredMomentum:
      return visitor(Rmsprop<true, true>{});
    case RuleId::kAdagrad:
      return visitor(Adagrad{});
    case RuleId::kLion:
      return visitor(Lion{});
    case RuleId::kAdaBelief:
      return visitor(AdaBelief<false>{});
    case RuleId::kAdaBeliefAmsgrad:
      return visitor(AdaBelief<true>{});
    case RuleId::kAmos:
      return visitor(Amos<false>{});
    case RuleId::kAmosMomentum:
      return visitor(Amos<true>{});
    case RuleId::kAccumulate:
      return visitor(Accumulate{});
    case RuleId::kCount:
      break;
  }
  __builtin_unreachable();
}

// Whether an engine that is compiled for each way to store a parameter has this rule in all of them; of the others it
// has the usual ones.
template <class Rule>
constexpr bool kWidelyUsed =
    std::is_same_v<Rule, Sgd<false>> || std::is_same_v<Rule, Sgd<true>> || std::is_same_v<Rule, Adam<false>> ||
    std::is_same_v<Rule, Lion> || std::is_same_v<Rule, Accumulate>;

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep
