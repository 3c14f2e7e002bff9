// The ways to store a parameter that have a loop of their own; whatever is not in the list is updated by way of fp32
// tiles.
#pragma once

#include "quantized.h"
#include "weights.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

// States in codes of kBits bits, in place of a dtype.
template <int kBits_>
struct Quantized {
  static constexpr int kBits = kBits_;
};
// Calls visit(Quantized<bits>{}); bits: a record's.
template <class Visit>
FUSEDSTEP_FN void visit_bits(int bits, const Visit& visit) {
  if (bits == 8) return visit(Quantized<8>{});
  if (bits == 4) return visit(Quantized<4>{});
}
template <class S>
constexpr bool kIsQuantized = false;
template <int kBits>
constexpr bool kIsQuantized<Quantized<kBits>> = true;

// S: the dtype of all states, or Quantized.
template <class W, class G, class S, Order order>
struct Format {
  using Weight = W;
  using Grad = WideStored<G, order>;
  using State = S;
  static constexpr Order kOrder = order;
};

template <class Rule>
bool states_are(const Record& record, Dtype dtype) {
  for (int k = 0; k < kNumNamed<Rule>; ++k)
    if (has_state<Rule>(k) && record.state_dtypes[k] != dtype) return false;
  return true;
}

// Calls visit(the format of a record), if it is one of the list.
template <class Rule, class Visit>
FUSEDSTEP_FN void visit_format(const Record& record, const Visit& visit) {
  constexpr bool kHasStates = kNumPresent<Rule> > 0;
  constexpr Order kEvenOdd = Order::kEvenOdd, kInOrder = Order::kInOrder;
  if (record.grad_dtype != record.param_dtype) return;
  const int bits = kHasStates ? record.precision.state_bits : 0;
  const bool in_bf16 = bits == 0 && states_are<Rule>(record, Dtype::kBF16);
  [[maybe_unused]] const bool in_f16 = bits == 0 && states_are<Rule>(record, Dtype::kF16);
  [[maybe_unused]] const bool in_f32 = bits == 0 && states_are<Rule>(record, Dtype::kF32);
  const WeightFormat weight_format = record.precision.weight_format;
  switch (record.param_dtype) {
    case Dtype::kF32:
      if constexpr (kHasStates) {
        if (in_bf16) return visit(Format<PlainWeight<float, kInOrder>, float, BF16, kInOrder>{});
      }
      return;
    case Dtype::kF16:
      if constexpr (kConvertsF16) {  // number by number there would be nothing to win, and much to compile
        if constexpr (kHasStates) {
          if (bits == 8 && weight_format == WeightFormat::kPlain)
            return visit(Format<PlainWeight<F16, kInOrder>, F16, Quantized<8>, kInOrder>{});
          if (in_f32 && weight_format == WeightFormat::kMaster)
            return visit(Format<MasterWeight<F16, kInOrder>, F16, float, kInOrder>{});
        }
        if (in_f16 && weight_format == WeightFormat::kKahan)
          return visit(Format<KahanWeight<F16, kInOrder>, F16, F16, kInOrder>{});
        if (in_f16 && weight_format == WeightFormat::kStochastic)
          return visit(Format<StochasticWeight<F16, kInOrder>, F16, F16, kInOrder>{});
      }
      return;
    case Dtype::kBF16:
      if constexpr (kHasStates) {
        if (bits == 8 && weight_format == WeightFormat::kPlain)
          return visit(Format<PlainWeight<BF16, kEvenOdd>, BF16, Quantized<8>, kEvenOdd>{});
        if (bits == 8 && weight_format == WeightFormat::kSplit)
          return visit(Format<SplitWeight<kEvenOdd>, BF16, Quantized<8>, kEvenOdd>{});
        if (bits == 8 && weight_format == WeightFormat::kStochastic)
          return visit(Format<StochasticWeight<BF16, kEvenOdd>, BF16, Quantized<8>, kEvenOdd>{});
        if (bits == 4 && weight_format == WeightFormat::kPlain)
          return visit(Format<PlainWeight<BF16, kEvenOdd>, BF16, Quantized<4>, kEvenOdd>{});
        if (bits == 4 && weight_format == WeightFormat::kSplit)
          return visit(Format<SplitWeight<kEvenOdd>, BF16, Quantized<4>, kEvenOdd>{});
        if (in_f32 && weight_format == WeightFormat::kSplit)
          return visit(Format<SplitWeight<kInOrder>, BF16, float, kInOrder>{});
        if (in_f32 && weight_format == WeightFormat::kMaster)
          return visit(Format<MasterWeight<BF16, kInOrder>, BF16, float, kInOrder>{});
      }
      if (!in_bf16) return;
      if (weight_format == WeightFormat::kPlain)
        return visit(Format<PlainWeight<BF16, kEvenOdd>, BF16, BF16, kEvenOdd>{});
      if (weight_format == WeightFormat::kSplit) return visit(Format<SplitWeight<kEvenOdd>, BF16, BF16, kEvenOdd>{});
      if (weight_format == WeightFormat::kKahan)
        return visit(Format<KahanWeight<BF16, kEvenOdd>, BF16, BF16, kEvenOdd>{});
      if (weight_format == WeightFormat::kStochastic)
        return visit(Format<StochasticWeight<BF16, kEvenOdd>, BF16, BF16, kEvenOdd>{});
      return;
    case Dtype::kF64:
    case Dtype::kI8:
    case Dtype::kU8:
    case Dtype::kI16:
    case Dtype::kI4:
    case Dtype::kU4:
      return;
  }
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
