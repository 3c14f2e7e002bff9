// The ways to store a parameter that have a kernel of their own, and for which rules. Whatever is not in the list, and
// whatever holds fp64, goes through one general kernel, which is slower. Plain C++: host and device read it.
#pragma once

#include <utility>

#include "../rules.h"
#include "../table.h"

namespace fusedstep::cuda {

// The last four are bf16 beside something else, or rounded in another way (WeightFormat in codecs.h).
enum class StoredWeight : uint8_t { kF32, kBF16, kF16, kSplit, kMaster, kKahan, kStochastic };
// k8Bit, k4Bit: in codes, where the rule says that a state can be; any other is fp32.
enum class StateFormat : uint8_t { kF32, kBF16, kF16, k8Bit, k4Bit };

enum class CompiledFor : uint8_t { kEveryRule, kWidelyUsedRules };

struct Format {
  const char* name;
  StoredWeight weight;
  Dtype grad;
  StateFormat states;
  CompiledFor rules;
  bool followed;  // there also is a kernel that updates averages and copies
  bool few;       // and one for few tensors, whose arguments fit into those of an ordinary launch
};

// Families are compiled one by one (step_*.cu).
constexpr Format kFormats[] = {
    // fp32 weights
    {"fp32", StoredWeight::kF32, Dtype::kF32, StateFormat::kF32, CompiledFor::kEveryRule, true, true},
    {"fp32, bf16 gradients", StoredWeight::kF32, Dtype::kBF16, StateFormat::kF32, CompiledFor::kWidelyUsedRules, false,
     false},
    {"fp32, bf16 states", StoredWeight::kF32, Dtype::kF32, StateFormat::kBF16, CompiledFor::kWidelyUsedRules, false,
     false},
    {"fp32, 8-bit states", StoredWeight::kF32, Dtype::kF32, StateFormat::k8Bit, CompiledFor::kWidelyUsedRules, false,
     false},
    {"fp32, 4-bit states", StoredWeight::kF32, Dtype::kF32, StateFormat::k4Bit, CompiledFor::kWidelyUsedRules, false,
     false},
    // 16-bit weights
    {"bf16", StoredWeight::kBF16, Dtype::kBF16, StateFormat::kBF16, CompiledFor::kEveryRule, true, true},
    {"bf16, fp32 states", StoredWeight::kBF16, Dtype::kBF16, StateFormat::kF32, CompiledFor::kWidelyUsedRules, true,
     false},
    {"bf16, 8-bit states", StoredWeight::kBF16, Dtype::kBF16, StateFormat::k8Bit, CompiledFor::kWidelyUsedRules, false,
     false},
    {"bf16, 4-bit states", StoredWeight::kBF16, Dtype::kBF16, StateFormat::k4Bit, CompiledFor::kWidelyUsedRules, false,
     false},
    {"fp16", StoredWeight::kF16, Dtype::kF16, StateFormat::kF16, CompiledFor::kWidelyUsedRules, false, false},
    // bf16 weights beside an fp32 number's other half, or all of it
    {"split", StoredWeight::kSplit, Dtype::kBF16, StateFormat::kF32, CompiledFor::kWidelyUsedRules, true, false},
    {"split, bf16 states", StoredWeight::kSplit, Dtype::kBF16, StateFormat::kBF16, CompiledFor::kWidelyUsedRules, true,
     false},
    {"split, 8-bit states", StoredWeight::kSplit, Dtype::kBF16, StateFormat::k8Bit, CompiledFor::kWidelyUsedRules, true,
     false},
    {"split, 4-bit states", StoredWeight::kSplit, Dtype::kBF16, StateFormat::k4Bit, CompiledFor::kWidelyUsedRules,
     false, false},
    {"master", StoredWeight::kMaster, Dtype::kBF16, StateFormat::kF32, CompiledFor::kWidelyUsedRules, true, false},
    // bf16 weights that are rounded in other ways
    {"kahan", StoredWeight::kKahan, Dtype::kBF16, StateFormat::kBF16, CompiledFor::kWidelyUsedRules, false, false},
    {"stochastic", StoredWeight::kStochastic, Dtype::kBF16, StateFormat::kBF16, CompiledFor::kWidelyUsedRules, false,
     false},
    {"stochastic, fp32 states", StoredWeight::kStochastic, Dtype::kBF16, StateFormat::kF32,
     CompiledFor::kWidelyUsedRules, false, false},
    {"stochastic, 8-bit states", StoredWeight::kStochastic, Dtype::kBF16, StateFormat::k8Bit,
     CompiledFor::kWidelyUsedRules, false, false},
};
constexpr int kNumFormats = static_cast<int>(std::size(kFormats));
constexpr int kGeneral = kNumFormats;  // in place of an index

// [first, end) of each family.
struct FormatRange {
  int first, end;
};
constexpr FormatRange kFP32Weights{0, 5}, k16BitWeights{5, 10}, kFullWeights{10, 15}, kRoundedWeights{15, 19};
static_assert(kRoundedWeights.end == kNumFormats, "each format belongs to a family");

constexpr bool is_quantized(StateFormat states) {
  return states == StateFormat::k8Bit || states == StateFormat::k4Bit;
}

// How many numbers of each array a thread holds: 16 bytes of the narrowest, 8 or 4 bytes of codes.
constexpr int numbers_per_thread(const Format& format) {
  return format.weight == StoredWeight::kF32 && format.grad == Dtype::kF32 && format.states == StateFormat::kF32 ? 4
                                                                                                                 : 8;
}
constexpr int kGeneralNumbers = 8;
// Tiles (what all threads of a block hold at a time) of one block at most: enough to hide what comes before the first,
// few enough that fresh blocks' loads overlap with the stores of old ones.
constexpr int most_tiles(int format) {
  return format != kGeneral && is_quantized(kFormats[format].states) ? 8 : 4;
}

// The dtype of state k in this format.
template <class Rule>
constexpr Dtype state_dtype(StateFormat format, int k) {
  switch (format) {
    case StateFormat::kBF16:
      return Dtype::kBF16;
    case StateFormat::kF16:
      return Dtype::kF16;
    case StateFormat::k8Bit:
    case StateFormat::k4Bit:
      return Rule::kCodes[k] == Code::kNone
                 ? Dtype::kF32
                 : code_dtype(format == StateFormat::k8Bit ? 8 : 4, Rule::kCodes[k] == Code::kSigned);
    case StateFormat::kF32:
      return Dtype::kF32;
  }
  __builtin_unreachable();
}

constexpr Dtype dtype_of(StoredWeight weight) {
  return weight == StoredWeight::kF32 ? Dtype::kF32 : weight == StoredWeight::kF16 ? Dtype::kF16 : Dtype::kBF16;
}
constexpr WeightFormat weight_format_of(StoredWeight weight) {
  switch (weight) {
    case StoredWeight::kSplit:
      return WeightFormat::kSplit;
    case StoredWeight::kMaster:
      return WeightFormat::kMaster;
    case StoredWeight::kKahan:
      return WeightFormat::kKahan;
    case StoredWeight::kStochastic:
      return WeightFormat::kStochastic;
    case StoredWeight::kF32:
    case StoredWeight::kBF16:
    case StoredWeight::kF16:
      return WeightFormat::kPlain;
  }
  __builtin_unreachable();
}

// Whether two formats are one for a rule, which may have no state, or none that 8 bits can hold.
template <class Rule>
constexpr bool same_format(const Format& a, const Format& b) {
  if (a.weight != b.weight || a.grad != b.grad) return false;
  for (int k = 0; k < kNumNamed<Rule>; ++k) {
    if (Rule::kPresent[k] && state_dtype<Rule>(a.states, k) != state_dtype<Rule>(b.states, k)) return false;
  }
  return true;
}

// Whether a rule has a kernel for that format.
template <class Rule>
constexpr bool is_compiled(int format, bool followed = false) {
  if (followed && !kFormats[format].followed) return false;
  if (kFormats[format].rules != CompiledFor::kEveryRule && !kWidelyUsed<Rule>) return false;
  for (int i = 0; i < format; ++i) {
    if (same_format<Rule>(kFormats[i], kFormats[format])) return false;
  }
  return true;
}

template <class Rule>
constexpr bool is_stored_as(const Record& record, const Format& format) {
  if (record.param_dtype != dtype_of(format.weight) ||
      record.precision.weight_format != weight_format_of(format.weight))
    return false;
  if (record.grad_dtype != format.grad) return false;
  for (int k = 0; k < kNumNamed<Rule>; ++k) {
    if (Rule::kPresent[k] && record.state_dtypes[k] != state_dtype<Rule>(format.states, k)) return false;
  }
  return true;
}

// The format whose kernel updates a record, or kGeneral.
template <class Rule>
int format_of(const Record& record) {
  if (record.copy != nullptr && record.copy_dtype == Dtype::kF64) return kGeneral;
  if (record.precision.weight_format == WeightFormat::kStochastic && !record.precision.element_map.keeps_groups())
    return kGeneral;
  for (int i = 0; i < kNumFormats; ++i) {
    if (is_compiled<Rule>(i, record.has_followers()) && is_stored_as<Rule>(record, kFormats[i])) return i;
  }
  return kGeneral;
}

}  // namespace fusedstep::cuda
