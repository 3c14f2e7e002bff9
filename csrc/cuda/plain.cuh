// Chunks of tensors that are stored in their dtypes alone: by packs where all is aligned and of a usual mixture of
// dtypes, else one element at a time.
#pragma once

#include "kernel.cuh"

namespace fusedstep::cuda {

// Param stored as P, grad as G, states as S, all 16-byte aligned: kPacks packs of kN numbers are read before the first
// is written, to keep enough loads in flight. What is left of the last pack is update_any's.
template <class Rule, class P, class G, class S, int kN, int kPacks>
__device__ __forceinline__ void update_packs(const Record& record, const void* grad, const Chunk& chunk, Team team,
                                             GradChange<float> change,
                                             const typename Rule::template Scalars<float>& scalars) {
  const auto s = scalars;
  P* const params = static_cast<P*>(record.param) + chunk.offset;
  const G* const grads = static_cast<const G*>(grad) + chunk.offset;
  constexpr int kPlaces = kNamed<Rule> > 0 ? kNamed<Rule> : 1;
  S* states[kPlaces];
#pragma unroll
  for (int k = 0; k < kNamed<Rule>; ++k) states[k] = static_cast<S*>(record.states[k]) + chunk.offset;
  const int whole = chunk.n / kN * kN;
  for (int first = team.index * kN; first < whole; first += team.size * kN * kPacks) {
    Pack<kN, P> param[kPacks];
    Pack<kN, G> g[kPacks];
    Pack<kN, S> state[kPlaces][kPacks];
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int at = first + team.size * kN * u;
      if (at >= whole) continue;
      param[u].load(params + at);
      g[u].load(grads + at);
#pragma unroll
      for (int k = 0; k < kNamed<Rule>; ++k)
        if (has_state<Rule>(k)) state[k][u].load(states[k] + at);
    }
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int at = first + team.size * kN * u;
      if (at >= whole) continue;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        float p = load<float>(param[u].numbers[i]);
        float values[kMaxStates] = {};
#pragma unroll
        for (int k = 0; k < kNamed<Rule>; ++k)
          if (has_state<Rule>(k)) values[k] = load<float>(state[k][u].numbers[i]);
        const float grad = change(load<float>(g[u].numbers[i]));
        if (change.write) g[u].numbers[i] = narrow<G>(grad * change.sign);
        update_with<Rule>(p, grad, values, s);
        param[u].numbers[i] = narrow<P>(p);
#pragma unroll
        for (int k = 0; k < kNamed<Rule>; ++k)
          if (has_state<Rule>(k)) state[k][u].numbers[i] = narrow<S>(values[k]);
      }
      param[u].store(params + at);
      if (change.zero) Pack<kN, G>{}.store(const_cast<G*>(grads) + at);
      if (change.write) g[u].store(const_cast<G*>(grads) + at);
#pragma unroll
      for (int k = 0; k < kNamed<Rule>; ++k)
        if (has_state<Rule>(k)) state[k][u].store(states[k] + at);
    }
  }
}

template <class Rule>
__device__ __forceinline__ bool is_aligned(const Record& record, const void* grad) {
  // Chunks begin at multiples of 16 elements, so that the tensors' own addresses decide.
  uint64_t bits = reinterpret_cast<uint64_t>(record.param) | reinterpret_cast<uint64_t>(grad);
#pragma unroll
  for (int k = 0; k < kNamed<Rule>; ++k)
    if (has_state<Rule>(k)) bits |= reinterpret_cast<uint64_t>(record.states[k]);
  return (bits & 15) == 0;
}

template <class Rule>
__device__ __forceinline__ bool states_are(const Record& record, Dtype dtype) {
  bool all = true;
#pragma unroll
  for (int k = 0; k < kNamed<Rule>; ++k) all = all && (!has_state<Rule>(k) || record.state_dtypes[k] == dtype);
  return all;
}

// Param and grad in 16 bits, aligned, the states like them or in fp32.
template <class Rule>
__device__ __noinline__ void update_16_bit(const Record& record, const void* grad, const Chunk& chunk, Team team,
                                           GradChange<float> change, const typename Rule::template Scalars<float>& s) {
  const bool bf16 = record.param_dtype == Dtype::kBF16;
  if (states_are<Rule>(record, Dtype::kF32) && bf16)
    update_packs<Rule, BF16, BF16, float, 8, 1>(record, grad, chunk, team, change, s);
  else if (states_are<Rule>(record, Dtype::kF32))
    update_packs<Rule, F16, F16, float, 8, 1>(record, grad, chunk, team, change, s);
  else if (bf16)
    update_packs<Rule, BF16, BF16, BF16, 8, 1>(record, grad, chunk, team, change, s);
  else
    update_packs<Rule, F16, F16, F16, 8, 1>(record, grad, chunk, team, change, s);
}

// Param and states in fp32, the gradient in 16 bits, aligned.
template <class Rule>
__device__ __noinline__ void update_by_16_bit(const Record& record, const void* grad, const Chunk& chunk, Team team,
                                              GradChange<float> change,
                                              const typename Rule::template Scalars<float>& s) {
  if (record.grad_dtype == Dtype::kBF16)
    update_packs<Rule, float, BF16, float, 8, 1>(record, grad, chunk, team, change, s);
  else
    update_packs<Rule, float, F16, float, 8, 1>(record, grad, chunk, team, change, s);
}

template <class Rule>
struct Plain {
  __device__ __forceinline__ static void update(const Record& record, const void* grad, const Chunk& chunk, Team team,
                                                GradChange<float> change,
                                                const typename Rule::template Scalars<float>& s) {
    const Dtype dtype = record.param_dtype, grad_dtype = record.grad_dtype;
    int rest = 0;
    if (!is_aligned<Rule>(record, grad)) {
      // update_any's
    } else if (grad_dtype == dtype) {
      if (dtype == Dtype::kF32 && states_are<Rule>(record, Dtype::kF32)) {
        constexpr int kPacks = kHeld<Rule> <= 2 ? 2 : 1;  // as many as the registers hold
        update_packs<Rule, float, float, float, 4, kPacks>(record, grad, chunk, team, change, s);
        rest = chunk.n / 4 * 4;
      } else if (dtype != Dtype::kF32 && (states_are<Rule>(record, Dtype::kF32) || states_are<Rule>(record, dtype))) {
        update_16_bit<Rule>(record, grad, chunk, team, change, s);
        rest = chunk.n / 8 * 8;
      }
    } else if (dtype == Dtype::kF32 && grad_dtype != Dtype::kF64 && states_are<Rule>(record, Dtype::kF32)) {
      update_by_16_bit<Rule>(record, grad, chunk, team, change, s);
      rest = chunk.n / 8 * 8;
    }
    if (rest < chunk.n) update_any<Rule, float>(record, grad, chunk, rest, team, change, s);
  }
};

}  // namespace fusedstep::cuda
