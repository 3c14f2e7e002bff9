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

// After elements [begin, end) of a parameter; `weight` is that of the parameter in the average.
template <class T>
__attribute__((noinline)) void follow(const Record& record, int64_t begin, int64_t end, T weight) {
  const AnyStored<T> copy{record.copy, record.copy_dtype};
  const AnyStored<T>* const copies = record.copy == nullptr ? nullptr : &copy;
  T* const average = static_cast<T*>(record.average);
  if (record.param_dtype == (sizeof(T) == sizeof(double) ? Dtype::kF64 : Dtype::kF32))
    follow_stored<T>(Stored<T, T>{static_cast<T*>(record.param)}, average, copies, begin, end, weight);
  else
    follow_stored<T>(AnyStored<T>{record.param, record.param_dtype}, average, copies, begin, end, weight);
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
