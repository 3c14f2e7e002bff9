// What a rule is, and what an engine asks of any of them. The rules themselves are in rules.h and reducing_rules.h; no
// rule's name and no engine belongs here.
//
// A rule whose option adds a state takes that option as a template flag; an option that only changes a number is a
// hyperparameter. T is the number that update() works on: float, double, or a vector of them; S holds the scalars, of
// plain float or double. update() names every state that the rule can have, in one fixed order; kPresent says which
// there are, and an absent one (its flag is off) is a dummy that the compiler removes; kCodes says how each is
// quantized. Operations are written one by one because all backends keep this order: they agree bit for bit in fp32 (no
// contraction into FMA, IEEE division and square root).
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <utility>

#include "numeric.h"

namespace fusedstep {

constexpr int kMaxHyper = 10;
constexpr int kMaxStates = 5;

// How a state is quantized (codecs.h): not at all, with a sign, or without one.
enum class Code : uint8_t { kNone, kSigned, kNonNegative };

inline namespace FUSEDSTEP_ISA {

// How many states a rule names, how many of them it has, and which: as bits, because device code reads no arrays of the
// host's.
template <class Rule>
constexpr int kNumNamed = [] {
  constexpr size_t n = std::size(Rule::kPresent);
  static_assert(n <= kMaxStates, "a record has places for kMaxStates states: enlarge it");
  static_assert(std::size(Rule::kStateNames) == n, "every state has a name");
  return static_cast<int>(n);
}();
template <class Rule>
constexpr uint32_t kPresentBits = [] {
  uint32_t bits = 0;
  for (int k = 0; k < kNumNamed<Rule>; ++k) bits |= Rule::kPresent[k] ? 1u << k : 0u;
  return bits;
}();
template <class Rule>
constexpr int kNumPresent = __builtin_popcount(kPresentBits<Rule>);
template <class Rule>
FUSEDSTEP_FN constexpr bool has_state(int k) {
  return (kPresentBits<Rule> >> k & 1u) != 0;
}

// Rule::update with its states, as many as it names, in an array.
template <class Rule, class T, class S, size_t... k>
FUSEDSTEP_FN void update_with(T& param, T grad, [[maybe_unused]] T* states, const S& s, std::index_sequence<k...>) {
  Rule::update(param, grad, states[k]..., s);
}
template <class Rule, class T, class S>
FUSEDSTEP_FN void update_with(T& param, T grad, T* states, const S& s) {
  update_with<Rule>(param, grad, states, s, std::make_index_sequence<kNumNamed<Rule>>{});
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep
