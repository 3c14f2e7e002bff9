// The one kernel, generic over rules: a persistent grid over chunks of all tensors of a group.
//
// Compiled for sm_80, sm_90 and sm_100 and run thread by thread on the host in the tests; it has never run on a GPU.
// It uses little of CUDA, so that the host can stand in for it: thread and block indices, shared memory, barriers,
// one atomic counter.
#pragma once

#include "stored.cuh"

namespace fusedstep::cuda {

constexpr int kThreads = 256;
constexpr int kMinBlocks = 3;  // for each multiprocessor: at most 64 registers a thread

template <int kCapacity>
struct Arguments {
  const Record* records;
  const Chunk* chunks;
  uint32_t* done;  // blocks that have finished; the last one sets it back to zero
  int32_t n_records, n_block_chunks, n_small_chunks;
  const float* found_inf;
  GradsBecome grads_become;
  double average_weight;
  Scalar hyper[kMaxHyper];
  const void* grads[kCapacity];
};

template <class T>
__device__ __forceinline__ T load_any(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kBF16:
      return load<T>(global(static_cast<const BF16*>(data))[i]);
    case Dtype::kF16:
      return load<T>(global(static_cast<const F16*>(data))[i]);
    case Dtype::kF64:
      return load<T>(global(static_cast<const double*>(data))[i]);
    default:
      return load<T>(global(static_cast<const float*>(data))[i]);
  }
}

template <class T>
__device__ __forceinline__ void store_any(void* data, Dtype dtype, int64_t i, T value) {
  switch (dtype) {
    case Dtype::kBF16:
      global(static_cast<BF16*>(data))[i] = narrow<BF16>(value);
      break;
    case Dtype::kF16:
      global(static_cast<F16*>(data))[i] = narrow<F16>(value);
      break;
    case Dtype::kF64:
      global(static_cast<double*>(data))[i] = narrow<double>(value);
      break;
    default:
      global(static_cast<float*>(data))[i] = narrow<float>(value);
      break;
  }
}

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

// What is updated after a parameter, while it is still in the caches: its average over the steps, and its copy in a
// narrower dtype.
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

// The ways through a chunk other than fp32's are functions that are called, not inlined: inlined they would take
// registers from it, and a call is little beside a chunk.

// Any dtypes, any alignment: one element at a time, from element `begin` of the chunk.
template <class Rule, class T>
__device__ __noinline__ void update_any(const Record& record, const void* grad, const Chunk& chunk, int begin,
                                        Team team, GradChange<T> change,
                                        const typename Rule::template Scalars<T>& scalars) {
  const auto s = scalars;
  for (int n = begin + team.index; n < chunk.n; n += team.size) {
    const int64_t i = chunk.offset + n;
    T param = load_any<T>(record.param, record.param_dtype, i);
    const T g = change(load_any<T>(grad, record.grad_dtype, i));
    if (change.zero) store_any(const_cast<void*>(grad), record.grad_dtype, i, T(0));
    if (change.write) store_any(const_cast<void*>(grad), record.grad_dtype, i, g * change.sign);
    T states[kMaxStates] = {};
#pragma unroll
    for (int k = 0; k < kNamed<Rule>; ++k)
      if (has_state<Rule>(k)) states[k] = load_any<T>(record.states[k], record.state_dtypes[k], i);
    update_with<Rule>(param, g, states, s);
    store_any(record.param, record.param_dtype, i, param);
#pragma unroll
    for (int k = 0; k < kNamed<Rule>; ++k)
      if (has_state<Rule>(k)) store_any(record.states[k], record.state_dtypes[k], i, states[k]);
  }
}

// kN numbers stored as S, by 16-byte accesses.
template <int kN, class S>
struct Pack {
  static constexpr int kVectors = kN * static_cast<int>(sizeof(S)) / 16;
  static_assert(kVectors * 16 == kN * static_cast<int>(sizeof(S)), "a pack is made of whole vectors");
  union {
    Vector vectors[kVectors];
    S numbers[kN];
  };

  __device__ __forceinline__ void load(const S* from) {
    const Vector* source = global(reinterpret_cast<const Vector*>(from));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) vectors[v] = source[v];
  }
  __device__ __forceinline__ void store(S* to) const {
    Vector* target = global(reinterpret_cast<Vector*>(to));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) target[v] = vectors[v];
  }
};

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

// A chunk in fp32 arithmetic.
template <class Rule>
__device__ __forceinline__ void update_single(const Record& record, const void* grad, const Chunk& chunk, Team team,
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

// What the threads that share a chunk need, computed once by one of them.
template <class Rule>
union Prepared {
  typename Rule::template Scalars<float> single;
  typename Rule::template Scalars<double> twice;
};

template <class Rule>
__device__ __forceinline__ void prepare(const Record& record, const double* hyper, Prepared<Rule>* prepared) {
  const int64_t step = static_cast<int64_t>(*global(record.step)) + 1;
  if (record.param_dtype == Dtype::kF64)
    prepared->twice = Rule::template prepare<double>(hyper, step);
  else
    prepared->single = Rule::template prepare<float>(hyper, step);
}

template <class Rule>
__device__ __forceinline__ void update(const Record& record, const void* grad, const Chunk& chunk, Team team,
                                       const GradsBecome& grads_become, const Prepared<Rule>& prepared) {
  if (record.param_dtype == Dtype::kF64)
    update_any<Rule, double>(record, grad, chunk, 0, team, grads_become.change<double>(), prepared.twice);
  else if (!is_plain(record))
    update_stored<Rule>(record, grad, chunk, team, grads_become.change<float>(), prepared.single);
  else
    update_single<Rule>(record, grad, chunk, team, grads_become.change<float>(), prepared.single);
}

// What is left of a step that is skipped.
template <int kCapacity>
__device__ __noinline__ void zero_grads(const Arguments<kCapacity>& a) {
  for (int item = blockIdx.x; item < a.n_block_chunks + a.n_small_chunks; item += gridDim.x) {
    const Chunk chunk = a.chunks[item];
    void* const grad = const_cast<void*>(a.grads[chunk.record]);
    if (grad == nullptr) continue;
    const Dtype dtype = a.records[chunk.record].grad_dtype;
    for (int n = threadIdx.x; n < chunk.n; n += blockDim.x) store_any(grad, dtype, chunk.offset + n, 0.0f);
  }
}

// The same and what follows it, piece by piece.
template <class Rule>
__device__ __forceinline__ void update_and_follow(const Record& record, const void* grad, const Chunk& chunk, Team team,
                                                  const GradsBecome& grads_become, double average_weight,
                                                  const Prepared<Rule>& prepared) {
  const bool follows = record.has_followers();
  const int at_once = follows ? kFollowed : chunk.n;
  for (int at = 0; at < chunk.n; at += at_once) {
    const Chunk piece{chunk.record, min(chunk.n - at, at_once), chunk.offset + at};
    update<Rule>(record, grad, piece, team, grads_become, prepared);
    if (!follows) continue;
    team.wait();  // another thread may have written what this one reads
    follow_any(record, piece.offset, piece.n, team, average_weight);
  }
}

template <class Rule, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    step_kernel(const __grid_constant__ Arguments<kCapacity> arguments) {
  __shared__ double hyper[kMaxHyper];
  __shared__ Prepared<Rule> prepared[kThreads / kWarp];
  __shared__ bool is_last;
  const auto& a = arguments;
  // The same for all blocks: none counts itself as done, and no step counter moves.
  if (a.found_inf != nullptr && *global(a.found_inf) != 0.0f) {
    if (a.grads_become.zero) zero_grads(a);
    return;
  }

  const int thread = threadIdx.x, warp = thread / kWarp, warps = blockDim.x / kWarp;
  constexpr int kHyper = sizeof(Rule::kHyper) / sizeof(Rule::kHyper[0]);
  if (thread < kHyper) {
    const Scalar& scalar = a.hyper[thread];
    hyper[thread] = scalar.tensor == nullptr ? scalar.value : load_any<double>(scalar.tensor, scalar.dtype, 0);
  }
  const int items = a.n_block_chunks + (a.n_small_chunks + warps - 1) / warps;

  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    __syncthreads();  // hyper is there, and nobody needs the last item's `prepared` any more
    // The block takes one chunk, or each of its warps takes one.
    const bool whole = item < a.n_block_chunks;
    const int index = whole ? item : a.n_block_chunks + (item - a.n_block_chunks) * warps + warp;
    if (index >= a.n_block_chunks + a.n_small_chunks) continue;  // the whole warp; it meets the others at the barrier
    const Chunk chunk = a.chunks[index];
    const void* grad = a.grads[chunk.record];
    const Record& record = a.records[chunk.record];
    if (grad == nullptr) continue;
    const Team team = whole ? Team{thread, static_cast<int>(blockDim.x)} : Team{thread % kWarp, kWarp};
    Prepared<Rule>& mine = prepared[whole ? 0 : warp];
    if (team.index == 0) prepare<Rule>(record, hyper, &mine);
    team.wait();
    update_and_follow<Rule>(record, grad, chunk, team, a.grads_become, a.average_weight, mine);
  }

  // The last block to come here advances the counters: by then every block has read those that it needed.
  __threadfence();
  __syncthreads();
  if (thread == 0) is_last = atomicInc(a.done, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = thread; i < a.n_records; i += blockDim.x) {
    if (a.grads[i] != nullptr) *global(a.records[i].step) += 1.0f;
  }
}

}  // namespace fusedstep::cuda
