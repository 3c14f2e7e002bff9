// Rules with numbers of states that no real one has, which an engine's own source is compiled for in place of the real
// ones (visit_own): they take four steps, and must make of each state and weight what the real rules do of theirs.
// Included behind what must come before rules.h.
#pragma once

#include <cstdio>

#include "../../csrc/rules.h"
#include "../other_cpu/tensors.h"

namespace fusedstep {
inline namespace FUSEDSTEP_ISA {

constexpr double kAdamHyper[] = {0.01, 0.9, 0.99, 1e-8, 0.02, 1.0, 0.0, 0.0};
constexpr double kSgdHyper[] = {0.01, 0.9, 0.1, 0.0, 0.0};  // without decay, states depend on gradients alone
constexpr double kAdagradHyper[] = {0.01, 0.0, 0.0, 1e-8};

struct None : Sgd<false> {
  static constexpr std::array<const char*, 0> kStateNames{};
  static constexpr std::array<bool, 0> kPresent{};
  static constexpr std::array<Code, 0> kCodes{};

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, const S& s) {
    T absent{};
    Sgd<false>::update(param, grad, absent, s);
  }
};

struct Two : Adam<false> {
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq"};
  static constexpr bool kPresent[] = {true, true};
  static constexpr Code kCodes[] = {Code::kSigned, Code::kNonNegative};

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, T& exp_avg, T& exp_avg_sq, const S& s) {
    T absent{};
    Adam<false>::update(param, grad, exp_avg, exp_avg_sq, absent, s);
  }
};

struct Four : Adam<true> {
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"};
  static constexpr bool kPresent[] = {true, true, true, true};
  static constexpr Code kCodes[] = {Code::kSigned, Code::kNonNegative, Code::kNonNegative, Code::kSigned};

  template <class T>
  struct Scalars : Adam<true>::Scalars<T> {
    Sgd<true>::Scalars<T> of_momentum;
  };
  template <class T>
  static FUSEDSTEP_FN Scalars<T> prepare(const double* hyper, int64_t step) {
    const double of_momentum[] = {0.01, 0.9, 0.1, 0.0, 0.0};  // device code reads no arrays of the host's
    return {Adam<true>::prepare<T>(hyper, step), Sgd<true>::prepare<T>(of_momentum, step)};
  }
  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, T& momentum_buffer,
                                  const S& s) {
    T other = param;
    Sgd<true>::update(other, grad, momentum_buffer, s.of_momentum);
    Adam<true>::update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, s);
  }
};

// The last is present, the one before it is not.
struct Five : Adam<true> {
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "absent", "sum"};
  static constexpr bool kPresent[] = {true, true, true, false, true};
  static constexpr Code kCodes[] = {Code::kSigned, Code::kNonNegative, Code::kNonNegative, Code::kSigned,
                                    Code::kNonNegative};

  template <class T, class S>
  static FUSEDSTEP_FN void update(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, T&, T& sum,
                                  const S& s) {
    sum = sum + grad * grad;
    Adam<true>::update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, s);
  }
};

#if defined(TOO_MANY_STATES)
struct Six : Five {
  static constexpr const char* kStateNames[] = {"a", "b", "c", "d", "e", "f"};
  static constexpr bool kPresent[] = {true, true, true, true, true, true};
};
constexpr int kSix = kNumNamed<Six>;
#endif

// The kernels of every format are for these.
template <>
constexpr bool kWidelyUsed<Two> = true;
template <>
constexpr bool kWidelyUsed<Four> = true;
template <>
constexpr bool kWidelyUsed<Five> = true;

template <class Visitor>
auto visit_own(RuleId rule, Visitor&& visitor) {
  switch (static_cast<int>(rule)) {
    case 0:
      return visitor(None{});
    case 1:
      return visitor(Two{});
    case 2:
      return visitor(Four{});
    case 3:
      return visitor(Five{});
    case 4:
      return visitor(Sgd<false>{});
    case 5:
      return visitor(Sgd<true>{});
    case 6:
      return visitor(Adam<false>{});
    case 7:
      return visitor(Adam<true>{});
    default:
      return visitor(Adagrad{});
  }
}

}  // namespace FUSEDSTEP_ISA

// One step of the engine under test.
void take_step(int rule, Record& record, void* grad, const double* hyper, int n_hyper);

template <class Rule, size_t n>
void take_steps(int rule, Tensor<Rule>& tensor, const double (&hyper)[n]) {
  Random random;
  for (int turn = 0; turn < 4; ++turn) {
    tensor.fill_grad(random);
    take_step(rule, tensor.record, tensor.grad.data(), hyper, static_cast<int>(n));
  }
}

inline int compared = 0, different = 0;

inline void compare(const char* what, int k, const Format& format, uint64_t a, uint64_t b) {
  ++compared;
  if (a == b) return;
  ++different;
  std::printf("%s %d, %s: differs\n", what, k, format.name);
}

// Whether a state of one's own, from the k-th on, is what a real rule makes of its own; and the weight, if `weight`.
template <class Own, class Real, size_t n>
void check(int own_id, int real_id, const double (&hyper)[n], int k, bool weight) {
  for (const Format& format : kFormats) {
    for (const int64_t numel : {1, 255, 5003}) {
      Random random, same;
      Tensor<Own> own(format, numel, random);
      Tensor<Real> real(format, numel, same);
      take_steps(own_id, own, kAdamHyper);
      take_steps(real_id, real, hyper);
      if (weight) compare(Own::kName, -1, format, own.hash_of_weight(0), real.hash_of_weight(0));
      for (int j = 0; j < kNumNamed<Real>; ++j)
        if (has_state<Real>(j))
          compare(Own::kName, k + j, format, own.hash_of_state(k + j, 0), real.hash_of_state(j, 0));
    }
  }
}

inline int check_all() {
  for (const Format& format : kFormats) {
    Random random, same;
    Tensor<None> own(format, 5003, random);
    Tensor<Sgd<false>> real(format, 5003, same);
    take_steps(0, own, kSgdHyper);
    take_steps(4, real, kSgdHyper);
    compare("none", -1, format, own.hash_of_weight(0), real.hash_of_weight(0));
  }
  check<Two, Adam<false>>(1, 6, kAdamHyper, 0, true);
  check<Four, Adam<true>>(2, 7, kAdamHyper, 0, true);
  check<Four, Sgd<true>>(2, 5, kSgdHyper, 3, false);
  check<Five, Adam<true>>(3, 7, kAdamHyper, 0, true);
  check<Five, Adagrad>(3, 8, kAdagradHyper, 4, false);
  std::printf("%d of %d differ\n", different, compared);
  return different != 0 || compared == 0;
}

}  // namespace fusedstep
