// The kernel that sums over gradients: a block for each chunk, whose threads ask for eight 16-byte vectors before they
// use the first.
//
// Compiled for sm_80, sm_90 and sm_100 and run thread by thread on the host in the tests.
#pragma once

#include "norm.h"
#include "parts.cuh"

namespace fusedstep::cuda {

template <int kCapacity>
struct NormArguments {
  const NormChunk* chunks;
  ChunkSums* sums;
  uint32_t* counters;  // the first one of groups that have finished; every last one sets its counter back to zero
  int32_t n_block_chunks, n_small_chunks, n_blocks;
  const float* grad_scale;
  const float* found_inf_before;
  float* found_inf;
  Norm* norm;
  bool first, last;
  NormLimits limits;
  const void* grads[kCapacity];
};

// The larger of a magnitude and that of x; NaN wins.
__device__ __forceinline__ float larger(float max_abs, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float larger;
  asm("{ .reg .f32 size; abs.f32 size, %2; max.NaN.f32 %0, %1, size; }" : "=f"(larger) : "f"(max_abs), "f"(x));
  return larger;
#else
  return maximum(max_abs, x < 0 ? -x : x);
#endif
}
__device__ __forceinline__ double larger(double max_abs, double x) {
  return maximum(max_abs, x < 0 ? -x : x);
}

// What one thread has seen: squares come together in T within a vector, in double beyond.
template <class T, bool kScaled>
struct Seen {
  T inverse;  // of the gradients' scale
  double sum = 0.0;
  T max_abs = 0;

  // At most kN neighbours.
  template <int kN, class Number>
  __device__ __forceinline__ void operator()(int n, Number&& number) {
    T squares = 0;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (i >= n) break;
      const T grad = number(i), unscaled = kScaled ? grad * inverse : grad;
      max_abs = larger(max_abs, grad);
      squares += unscaled * unscaled;
    }
    sum += static_cast<double>(squares);
  }
};

// Any dtype and alignment, in the order of the vectors. Its arguments are passed in registers.
template <class T, bool kScaled>
__device__ __noinline__ ChunkSums see_any(const void* grad, Dtype dtype, int64_t offset, int n, Team team, T inverse) {
  Seen<T, kScaled> seen{inverse};
  const int pack = 16 / static_cast<int>(size_of(dtype)), whole = n / pack * pack;
  for (int first = team.index * pack; first < whole; first += team.size * pack)
    seen.template operator()<8>(pack, [&](int i) { return load_any<T>(grad, dtype, offset + first + i); });
  if (whole + team.index < n)
    seen.template operator()<1>(1, [&](int) { return load_any<T>(grad, dtype, offset + whole + team.index); });
  return {seen.sum, static_cast<double>(seen.max_abs)};
}

// By 16-byte accesses of kTeam threads, a few rounds of all that each can ask for. Which thread takes which element
// does not depend on the address.
template <class G, bool kScaled, int kTeam>
__device__ __forceinline__ ChunkSums see_packs(const void* grad, const NormChunk& chunk, int thread, float inverse) {
  constexpr int kN = 16 / static_cast<int>(sizeof(G)), kStride = kTeam * kN;
  const G* const grads = global(static_cast<const G*>(grad)) + chunk.offset;
  const int whole = chunk.n / kN * kN;
  Seen<float, kScaled> seen{inverse};
#pragma unroll 1
  for (int first = thread * kN; first < whole; first += kStride * kNormPacks) {
    const G* const at = grads + first;
    Pack<kN, G> packs[kNormPacks];
    if (first + (kNormPacks - 1) * kStride < whole) {
#pragma unroll
      for (int u = 0; u < kNormPacks; ++u) packs[u].load(at + u * kStride);
    } else {
#pragma unroll
      for (int u = 0; u < kNormPacks; ++u) {
        packs[u] = {};  // zeros add nothing
        if (first + u * kStride < whole) packs[u].load(at + u * kStride);
      }
    }
#pragma unroll
    for (int u = 0; u < kNormPacks; ++u) {
      float numbers[kN];
      unpack(packs[u], numbers);
      seen.template operator()<kN>(kN, [&](int i) { return numbers[i]; });
    }
  }
  if (whole + thread < chunk.n) seen.template operator()<1>(1, [&](int) { return load<float>(grads[whole + thread]); });
  return {seen.sum, static_cast<double>(seen.max_abs)};
}

template <bool kScaled, int kTeam>
__device__ __forceinline__ ChunkSums see(const void* grad, const NormChunk& chunk, float scale) {
  const int thread = threadIdx.x % kTeam;
  const Team team{thread, kTeam};
  const double inverse = 1.0 / static_cast<double>(scale);
  if (chunk.dtype == Dtype::kF64)
    return see_any<double, kScaled>(grad, chunk.dtype, chunk.offset, chunk.n, team, inverse);
  const float narrowed = static_cast<float>(inverse);
  if ((reinterpret_cast<uint64_t>(grad) & 15) != 0)
    return see_any<float, kScaled>(grad, chunk.dtype, chunk.offset, chunk.n, team, narrowed);
  if (chunk.dtype == Dtype::kF32) return see_packs<float, kScaled, kTeam>(grad, chunk, thread, narrowed);
  if (chunk.dtype == Dtype::kBF16) return see_packs<BF16, kScaled, kTeam>(grad, chunk, thread, narrowed);
  return see_packs<F16, kScaled, kTeam>(grad, chunk, thread, narrowed);
}

__device__ __forceinline__ void add(ChunkSums* sums, const ChunkSums& more) {
  sums->sum_of_squares += more.sum_of_squares;
  sums->max_abs = maximum(sums->max_abs, more.max_abs);
}

// Over the threads of a warp, known to all of them.
__device__ __forceinline__ ChunkSums warp_sums(ChunkSums mine) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    add(&mine,
        {__shfl_xor_sync(0xffffffffu, mine.sum_of_squares, lanes), __shfl_xor_sync(0xffffffffu, mine.max_abs, lanes)});
  return mine;
}

// Over n sums in memory, by a warp, always in the same order.
__device__ __forceinline__ ChunkSums warp_sums(const ChunkSums* sums, int n) {
  ChunkSums mine{0.0, 0.0};
#pragma unroll 8
  for (int i = threadIdx.x; i < n; i += kWarp) add(&mine, global(sums)[i]);
  return warp_sums(mine);
}

// Writes the sums that lane 0 has; whether this warp is the last of n to do so, which then sees those of the others.
__device__ __forceinline__ bool leave(const ChunkSums& sums, ChunkSums* target, uint32_t* counter, int n) {
  uint32_t last = 0;
  if (threadIdx.x == 0) {
    *global(target) = sums;
    fence();
    last = atomicInc(counter, static_cast<uint32_t>(n - 1)) == static_cast<uint32_t>(n - 1);
  }
  last = __shfl_sync(0xffffffffu, last, 0);
  if (last != 0) fence();  // now what others have written can be read
  return last != 0;
}

template <int kCapacity, bool kScaled>
__global__ void __launch_bounds__(kNormThreads, kNormMinBlocks)
    norm_kernel(const __grid_constant__ NormArguments<kCapacity> a) {
  __shared__ ChunkSums partial[kNormWarps];
  const int thread = threadIdx.x, warp = thread / kWarp, block = blockIdx.x;
  const float scale = kScaled ? *global(a.grad_scale) : 1.0f;
  const bool small = block >= a.n_block_chunks;
  const int index = small ? a.n_block_chunks + (block - a.n_block_chunks) * kNormWarps + warp : block;
  ChunkSums sums{0.0, 0.0};
  if (index < a.n_block_chunks + a.n_small_chunks) {
    const NormChunk chunk = global(a.chunks)[index];
    const void* const grad = a.grads[chunk.record];
    if (grad != nullptr)
      sums = small ? see<kScaled, kWarp>(grad, chunk, scale) : see<kScaled, kNormThreads>(grad, chunk, scale);
  }
  sums = warp_sums(sums);
  if (thread % kWarp == 0) partial[warp] = sums;
  __syncthreads();
  if (warp != 0) return;
  if (thread == 0) {
#pragma unroll
    for (int other = 1; other < kNormWarps; ++other) add(&sums, partial[other]);
  }

  // The last block of a group adds up the group's sums, the last group those of the groups.
  const int group = block / kNormGroup, n_groups = (a.n_blocks + kNormGroup - 1) / kNormGroup;
  const int n = min(kNormGroup, a.n_blocks - group * kNormGroup);
  ChunkSums* const group_sums = a.sums + a.n_blocks;
  if (!leave(sums, a.sums + block, a.counters + 1 + group, n)) return;
  sums = warp_sums(a.sums + group * kNormGroup, n);
  if (!leave(sums, group_sums + group, a.counters, n_groups)) return;
  sums = warp_sums(group_sums, n_groups);
  if (thread != 0) return;
  Norm norm = *global(a.norm);
  if (!a.first) add(&sums, {norm.sum_of_squares, norm.max_abs});
  norm.sum_of_squares = sums.sum_of_squares;
  norm.max_abs = sums.max_abs;
  if (a.last) {
    const bool skipped = a.found_inf_before != nullptr && *global(a.found_inf_before) != 0.0f;
    finish_norm(norm, global(a.found_inf), a.limits, static_cast<double>(scale), skipped);
  }
  *global(a.norm) = norm;
}

// The arguments of the launch for a segment; whether it is the first and the last one that has gradients.
template <int kCapacity>
void set_arguments(NormArguments<kCapacity>* a, const NormCall& call, const NormTable& table, size_t segment_index,
                   bool first, bool last) {
  const NormSegment& segment = table.segments[segment_index];
  char* const sums = call.memory + table.chunks.size() * sizeof(NormChunk);
  char* const counters = sums + table.n_sums * sizeof(ChunkSums);
  a->chunks = reinterpret_cast<const NormChunk*>(call.memory) + segment.first_chunk;
  a->sums = reinterpret_cast<ChunkSums*>(sums) + segment.first_sum;
  a->counters = reinterpret_cast<uint32_t*>(counters) + segment.first_counter;
  a->n_block_chunks = static_cast<int32_t>(segment.n_block_chunks);
  a->n_small_chunks = static_cast<int32_t>(segment.n_small_chunks);
  a->n_blocks = static_cast<int32_t>(norm_blocks(segment));
  a->grad_scale = call.grad_scale;
  a->found_inf_before = call.found_inf_before;
  a->found_inf = call.found_inf;
  a->norm = call.norm;
  a->first = first;
  a->last = last;
  a->limits = call.limits;
  for (int64_t i = 0; i < segment.n_records; ++i) a->grads[i] = call.grads[segment.first_record + i];
}

// Calls launch(segment's index, first, last) for each segment of which a tensor takes part; returns how many there are.
template <class Launch>
int for_segments(const NormCall& call, const NormTable& table, Launch&& launch) {
  std::vector<size_t> active;
  for (size_t i = 0; i < table.segments.size(); ++i) {
    const void* const* const grads = call.grads + table.segments[i].first_record;
    if (std::any_of(grads, grads + table.segments[i].n_records, [](const void* grad) { return grad != nullptr; }))
      active.push_back(i);
  }
  for (size_t i = 0; i < active.size(); ++i)
    launch(active[i], call.first && i == 0, call.last && i + 1 == active.size());
  return static_cast<int>(active.size());
}

}  // namespace fusedstep::cuda
