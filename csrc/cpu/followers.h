// What is updated after a parameter, while it is still in the caches: its average over the steps, and its copy in a
// narrower dtype.
#pragma once

#include "../table.h"
#include "stored.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

constexpr int64_t kFollowed = 4096;  // elements that are updated before their followers are

template <class T, class Param, class Copy>
void follow_stored(const Param& param, T* average, const Copy* copy, int64_t begin, int64_t end, T weight) {
  const Stored<T, T> averages{average};
  int64_t i = begin;
  for (; i + kLanes<T> <= end; i += kLanes<T>) {
    const Pack<T> p = param.load(i);
    if (average != nullptr) {
      const Pack<T> a = averages.load(i);
      averages.store(i, a + weight * (p - a));
    }
    if (copy != nullptr) copy->store(i, p);
  }
  if (const int64_t n = end - i; n > 0) {
    const Pack<T> p = param.load_part(i, n);
    if (average != nullptr) {
      const Pack<T> a = averages.load_part(i, n);
      averages.store_part(i, n, a + weight * (p - a));
    }
    if (copy != nullptr) copy->store_part(i, n, p);
  }
}

// The fp32 numbers of a split weight.
struct SplitStored {
  const BF16* upper;
  const int16_t* lower;

  FUSEDSTEP_FN FloatPack load(int64_t i) const { return load_part(i, kLanes<float>); }
  FUSEDSTEP_FN FloatPack load_part(int64_t i, int64_t n) const {
    alignas(64) float wide[kLanes<float>] = {};
    for (int64_t k = 0; k < n; ++k) wide[k] = join(upper[i + k], lower[i + k]);
    return load_pack<float, float>(wide);
  }
};

// After elements [begin, end) of a parameter; `weight` is that of the parameter in the average. They follow the fp32
// weight where one is kept, else the stored one.
template <class T>
__attribute__((noinline)) void follow(const Record& record, int64_t begin, int64_t end, T weight) {
  const AnyStored<T> copy{record.copy, record.copy_dtype};
  const AnyStored<T>* const copies = record.copy == nullptr ? nullptr : &copy;
  T* const average = static_cast<T*>(record.average);
  if constexpr (sizeof(T) == sizeof(float)) {
    void* const aux = record.precision.aux;
    if (record.precision.weight_format == WeightFormat::kMaster)
      return follow_stored<T>(Stored<T, T>{static_cast<T*>(aux)}, average, copies, begin, end, weight);
    if (record.precision.weight_format == WeightFormat::kSplit) {
      const SplitStored split{static_cast<const BF16*>(record.param), static_cast<const int16_t*>(aux)};
      return follow_stored<T>(split, average, copies, begin, end, weight);
    }
  }
  if (record.param_dtype == (sizeof(T) == sizeof(double) ? Dtype::kF64 : Dtype::kF32))
    follow_stored<T>(Stored<T, T>{static_cast<T*>(record.param)}, average, copies, begin, end, weight);
  else
    follow_stored<T>(AnyStored<T>{record.param, record.param_dtype}, average, copies, begin, end, weight);
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
