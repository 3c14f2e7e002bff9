// What is updated after a parameter, while it is still in the caches: its average over the steps, and its copy in a
// narrower dtype.
#pragma once

#include "parts.cuh"

namespace fusedstep::cuda {

// What followers follow: the fp32 weight where one is kept, else the stored one.
template <class T>
__device__ __forceinline__ T load_followed(const Record& record, int64_t i) {
  const void* const companion = record.precision.companion;
  if (record.precision.form == Form::kMaster) return load<T>(global(static_cast<const float*>(companion))[i]);
  if (record.precision.form == Form::kSplit)
    return load<T>(
        join(global(static_cast<const BF16*>(record.param))[i], global(static_cast<const int16_t*>(companion))[i]));
  return load_any<T>(record.param, record.param_dtype, i);
}

constexpr int kFollowed = 8192;  // elements that a team updates before their followers: whole blocks

template <class T>
__device__ __noinline__ void follow(const Record& record, int64_t offset, int64_t n, Team team, T weight) {
  T* const average = static_cast<T*>(record.average);
#pragma unroll 4
  for (int64_t i = offset + team.index; i < offset + n; i += team.size) {
    const T param = load_followed<T>(record, i);
    if (average != nullptr) {
      const T before = global(average)[i];
      global(average)[i] = before + weight * (param - before);
    }
    if (record.copy != nullptr) store_any(record.copy, record.copy_dtype, i, param);
  }
}

__device__ __forceinline__ void follow_any(const Record& record, int64_t offset, int64_t n, Team team, double weight) {
  if (record.param_dtype == Dtype::kF64)
    follow<double>(record, offset, n, team, weight);
  else
    follow<float>(record, offset, n, team, static_cast<float>(weight));
}

}  // namespace fusedstep::cuda
