// Every update rule that reduces: one whose statistics belong to rows and columns of matrices, or whose step depends on
// the root mean square (RMS) of a tensor. Nothing here knows about dtypes, layouts, threads or devices: the engines
// load, sum, call, store.
//
// An engine sees a tensor as contiguous matrices [batch, rows, columns] whose rows, columns or both, its lines, have
// statistics; or, if it is flat, as numbers that are a line each. It takes a rule's functions in this order:
//
//   prepare    the scalars of one step, in float64                                        once a tensor
//   square     what is averaged, of a gradient                                            every element
//   line       from the mean of a line's squares: its states, and its factors             every line
//   matrix     what the factors of a matrix's rows are multiplied with, from the mean     every matrix, if kRowMean
//              of states[0] over these rows
//   direction  the update before its scale is known                                       every element, if kUpdateSum
//   finish     the scalars that depend on the RMS of the old parameter (if kParamSum)     once a tensor
//              and of the directions (if kUpdateSum), in float64
//   update     the parameter and the states that have a number for each element           every element
//
// The factors of an element are those of its line; where rows and columns both have some, their product, the row's
// first multiplied by the matrix's. square needs no scalars unless kSquareTakesScalars. T is the number that a function
// works on: float, double, or a vector of them; S holds scalars. An engine adds in a fixed order of its own: backends
// agree to rounding, and each with itself to the bit.
#pragma once

#include <cmath>

#include "amos.h"
#include "arithmetic.h"
#include "rule.h"

namespace fusedstep {

constexpr int kMaxFactors = 2;  // that a line hands to its elements

// The list of all reducing rules; visit_reducing_rule below gives each its type.
enum class ReducingRuleId : int {
  kAdafactor,
  kAdafactorMomentum,
  kTorchAdafactor,
  kAmosRows,
  kAmosRowsMomentum,
  kAmosColumns,
  kAmosColumnsMomentum,
  kCount,
};

// What a state has a number for.
enum class Span : uint8_t {
  kRow,      // each row of each matrix; flat tensors do not have the state
  kColumn,   // each column of each matrix; flat tensors do not have the state
  kFlat,     // each element of a flat tensor; others do not have the state
  kElement,  // each element of any tensor
  kTensor,   // the RMS of the old parameter
};

inline namespace FUSEDSTEP_ISA {

// Adafactor (arXiv 1804.04235) as transformers.Adafactor computes it.
template <bool kMomentum>
struct Adafactor {
  using FirstPasses = Adafactor<false>;  // a rule that has the same sums: a momentum takes no part in them
  static constexpr const char* kName = "adafactor";
  static constexpr const char* kHyper[] = {"lr",
                                           "eps1",
                                           "eps2",
                                           "clip_threshold",
                                           "decay_rate",
                                           "beta1",
                                           "weight_decay",
                                           "scale_parameter",
                                           "relative_step",
                                           "warmup_init"};
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "RMS"};
  static constexpr bool kPresent[] = {kMomentum, true, true, true, true};
  static constexpr Span kSpans[] = {Span::kElement, Span::kRow, Span::kColumn, Span::kFlat, Span::kTensor};
  static constexpr int kFactors = 1;
  static constexpr bool kRowMean = true, kParamSum = true, kUpdateSum = true, kSquareTakesScalars = false;

  template <class T>
  struct Scalars {
    T beta2, one_minus_beta2, eps1, beta1, one_minus_beta1;
    double rel_step, eps2, clip_threshold, weight_decay;
    bool scale_parameter;
  };
  template <class T>
  struct Finish {
    T step_size, decay;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double lr = hyper[0], eps1 = hyper[1], decay_rate = hyper[4], beta1 = hyper[5];
    const bool relative_step = hyper[8] != 0.0, warmup_init = hyper[9] != 0.0;
    const double t = static_cast<double>(step);
    const double beta2 = 1.0 - pow(t, decay_rate);
    const double min_step = warmup_init ? 1e-6 * t : 1e-2, relative = 1.0 / square_root(t);
    Scalars<T> s;
    s.beta2 = static_cast<T>(beta2);
    s.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    s.eps1 = static_cast<T>(eps1);
    s.beta1 = static_cast<T>(beta1);
    s.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    s.rel_step = !relative_step ? lr : relative < min_step ? relative : min_step;
    s.eps2 = hyper[2];
    s.clip_threshold = hyper[3];
    s.weight_decay = hyper[6];
    s.scale_parameter = hyper[7] != 0.0;
    return s;
  }

  template <class T, class S>
  static FUSEDSTEP_FN T square(T grad, const S&) {
    return grad * grad;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void line(T mean, T* states, T* factors, const S& s) {
    states[0] = s.beta2 * states[0] + s.one_minus_beta2 * (mean + s.eps1);
    factors[0] = (T{} + 1.0f) / square_root(states[0]);
  }

  template <class T, class S>
  static FUSEDSTEP_FN T matrix(T mean, const S&) {
    return square_root(mean);
  }

  template <class T, class S>
  static FUSEDSTEP_FN T direction(T grad, const T* factors, const S&) {
    return factors[0] * grad;
  }

  template <class T>
  static FUSEDSTEP_FN Finish<T> finish(const Scalars<T>& s, double param_rms, double update_rms) {
    const double scale = !s.scale_parameter ? 1.0 : param_rms > s.eps2 ? param_rms : s.eps2;
    const double lr = scale * s.rel_step, excess = update_rms / s.clip_threshold;
    Finish<T> f;
    f.step_size = static_cast<T>(excess < 1.0 ? lr : lr / excess);                      // NaN stays
    f.decay = static_cast<T>(s.weight_decay != 0.0 ? 1.0 - s.weight_decay * lr : 1.0);  // lr may be infinite
    return f;
  }

  template <class T, class S, class F>
  static FUSEDSTEP_FN void update(T& param, T grad, const T* factors, T& exp_avg, const S& s, const F& f) {
    T update = f.step_size * direction(grad, factors, s);
    if constexpr (kMomentum) {
      exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * update;
      update = exp_avg;
    }
    param = param * f.decay - update;
  }
};

// Adafactor as torch.optim.Adafactor computes it.
struct TorchAdafactor {
  using FirstPasses = TorchAdafactor;
  static constexpr const char* kName = "torch_adafactor";
  static constexpr const char* kHyper[] = {"lr", "beta2_decay", "eps1", "eps2", "d", "weight_decay"};
  static constexpr const char* kStateNames[] = {"row_var", "col_var", "variance"};
  static constexpr bool kPresent[] = {true, true, true};
  static constexpr Span kSpans[] = {Span::kRow, Span::kColumn, Span::kFlat};
  static constexpr int kFactors = 1;
  static constexpr bool kRowMean = true, kParamSum = true, kUpdateSum = true, kSquareTakesScalars = false;

  template <class T>
  struct Scalars {
    T one_minus_beta2, eps1, limit;
    double rho, eps2, d, decay;
  };
  template <class T>
  struct Finish {
    T step_size, decay;
  };

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double lr = hyper[0], beta2_decay = hyper[1], eps1 = hyper[2], weight_decay = hyper[5];
    const double t = static_cast<double>(step), relative = 1.0 / square_root(t);
    Scalars<T> s;
    s.one_minus_beta2 = static_cast<T>(pow(t, beta2_decay));
    s.eps1 = static_cast<T>(eps1);
    s.limit = static_cast<T>(1.0 / eps1);
    s.rho = relative < lr ? relative : lr;
    s.eps2 = hyper[3];
    s.d = hyper[4];
    s.decay = weight_decay != 0.0 ? 1.0 - lr * weight_decay : 1.0;  // lr may be infinite
    return s;
  }

  template <class T, class S>
  static FUSEDSTEP_FN T square(T grad, const S&) {
    return grad * grad;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void line(T mean, T* states, T* factors, const S& s) {
    states[0] = interpolate(states[0], mean, s.one_minus_beta2);
    factors[0] = (T{} + 1.0f) / square_root(states[0]);
  }

  template <class T, class S>
  static FUSEDSTEP_FN T matrix(T mean, const S& s) {
    return square_root(maximum(T{} + s.eps1, mean));
  }

  // Torch divides by the larger of the estimate's root and eps1.
  template <class T, class S>
  static FUSEDSTEP_FN T direction(T grad, const T* factors, const S& s) {
    const T limit = T{} + s.limit;
    return (limit < factors[0] ? limit : factors[0]) * grad;
  }

  template <class T>
  static FUSEDSTEP_FN Finish<T> finish(const Scalars<T>& s, double param_rms, double update_rms) {
    const double alpha = (param_rms > s.eps2 ? param_rms : s.eps2) * s.rho, excess = update_rms / s.d;
    Finish<T> f;
    f.step_size = static_cast<T>(excess > 1.0 ? alpha / excess : alpha);
    f.decay = static_cast<T>(s.decay);
    return f;
  }

  template <class T, class S, class F>
  static FUSEDSTEP_FN void update(T& param, T grad, const T* factors, T&, const S& s, const F& f) {
    param = param * f.decay - f.step_size * direction(grad, factors, s);
  }
};

// Amos with statistics of whole rows or columns.
template <Span kLine, bool kMomentum>
struct AmosOfLines {
  using FirstPasses = AmosOfLines<kLine, false>;
  using Elementwise = Amos<kMomentum>;
  static constexpr const char* kName = kLine == Span::kRow ? "amos_rows" : "amos_columns";
  static constexpr auto& kHyper = Elementwise::kHyper;
  static constexpr auto& kStateNames = Elementwise::kStateNames;
  static constexpr auto& kPresent = Elementwise::kPresent;
  static constexpr Span kSpans[] = {kLine, kLine, Span::kElement};
  static constexpr int kFactors = 2;
  static constexpr bool kRowMean = false, kParamSum = false, kUpdateSum = false, kSquareTakesScalars = true;

  template <class T>
  using Scalars = typename Elementwise::template Scalars<T>;
  template <class T>
  struct Finish {};

  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    return Elementwise::template prepare<T>(hyper, step);
  }

  template <class T, class S>
  static FUSEDSTEP_FN T square(T grad, const S& s) {
    const T clipped = Elementwise::clip(grad, s);
    return clipped * clipped;
  }

  template <class T, class S>
  static FUSEDSTEP_FN void line(T mean, T* states, T* factors, const S& s) {
    const auto f = Elementwise::advance(mean, states[0], states[1], s);
    factors[0] = s.init_lr * f.reciprocal_root / f.divisor;
    factors[1] = f.l2 / f.divisor;
  }

  template <class T>
  static FUSEDSTEP_FN Finish<T> finish(const Scalars<T>&, double, double) {
    return {};
  }

  template <class T, class S, class F>
  static FUSEDSTEP_FN void update(T& param, T grad, const T* factors, T& exp_avg, const S& s, const F&) {
    T delta = factors[0] * Elementwise::clip(grad, s) + factors[1] * param;
    if constexpr (kMomentum) {
      exp_avg = s.momentum * exp_avg + s.one_minus_momentum * delta;
      delta = exp_avg;
    }
    param = param - delta;
  }
};

// An engine compiles itself once for each rule, through visit_reducing_rule.
template <class Visitor>
auto visit_reducing_rule(ReducingRuleId rule, Visitor&& visitor) {
  switch (rule) {
    case ReducingRuleId::kAdafactor:
      return visitor(Adafactor<false>{});
    case ReducingRuleId::kAdafactorMomentum:
      return visitor(Adafactor<true>{});
    case ReducingRuleId::kAmosRows:
      return visitor(AmosOfLines<Span::kRow, false>{});
    case ReducingRuleId::kAmosRowsMomentum:
      return visitor(AmosOfLines<Span::kRow, true>{});
    case ReducingRuleId::kAmosColumns:
      return visitor(AmosOfLines<Span::kColumn, false>{});
    case ReducingRuleId::kAmosColumnsMomentum:
      return visitor(AmosOfLines<Span::kColumn, true>{});
    case ReducingRuleId::kTorchAdafactor:
      return visitor(TorchAdafactor{});
    case ReducingRuleId::kCount:
      break;
  }
  __builtin_unreachable();
}

// The place of a rule's n-th state of that span among all that it names; -1: there are not so many.
template <class Rule, Span span>
constexpr int state_index_of(int n) {
  static_assert(std::size(Rule::kSpans) == kNumNamed<Rule>, "every state has a span");
  for (int k = 0; k < kNumNamed<Rule>; ++k) {
    if (Rule::kSpans[k] == span && has_state<Rule>(k) && n-- == 0) return k;
  }
  return -1;
}
template <class Rule, Span span, int n = 0>
constexpr int kStateIndex = state_index_of<Rule, span>(n);

// Which lines have statistics, and how many states each.
template <class Rule>
constexpr bool kRows = kStateIndex<Rule, Span::kRow> >= 0;
template <class Rule>
constexpr bool kColumns = kStateIndex<Rule, Span::kColumn> >= 0;
// Numbers that each line hands to its elements.
struct LineFactors {
  int of_row, of_column;
};
template <class Rule>
constexpr LineFactors kLineFactors = {kRows<Rule> ? Rule::kFactors : 0, kColumns<Rule> ? Rule::kFactors : 0};
template <class Rule>
constexpr bool kTakesFlat = kStateIndex<Rule, Span::kFlat> >= 0;  // tensors that are no matrices
template <class Rule>
constexpr int kLineStates = [] {
  int n = 0;
  for (int k = 0; k < kNumNamed<Rule>; ++k) n += Rule::kSpans[k] == (kRows<Rule> ? Span::kRow : Span::kColumn);
  return n;
}();

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep
