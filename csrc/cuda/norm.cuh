// The kernel that sums over gradients: a persistent grid over the chunks of the step kernel.
//
// Compiled for sm_80, sm_90 and sm_100 and run thread by thread on the host in the tests; it has never run on a GPU.
#pragma once

#include "norm.h"
#include "reducing_place.cuh"

namespace fusedstep::cuda {

template <int kCapacity>
struct NormArguments {
  const Record* records;
  const Chunk* chunks;
  ChunkSums* sums;
  uint32_t* done;  // blocks that have finished; the last one sets it back to zero
  int32_t n_block_chunks, n_small_chunks;
  const float* grad_scale;
  const float* found_inf_before;
  float* found_inf;
  Norm* norm;
  bool first, last;
  NormLimits limits;
  const void* grads[kCapacity];
};

// What one thread has seen of a chunk. Of fp32 arithmetic at most kMaxChunk / kThreads squares come together in a
// float.
template <class T>
struct Seen {
  T sum, largest;
  T inverse;  // of the gradients' scale

  __device__ __forceinline__ void operator()(T grad) {
    const T size = grad < 0 ? -grad : grad, unscaled = grad * inverse;
    largest = maximum(largest, size);
    sum += unscaled * unscaled;
  }
};

template <class T>
__device__ __noinline__ void see_any(const void* grad, Dtype dtype, const Chunk& chunk, int begin, Team team,
                                     Seen<T>* seen) {
#pragma unroll 4
  for (int n = begin + team.index; n < chunk.n; n += team.size) (*seen)(load_any<T>(grad, dtype, chunk.offset + n));
}

// By 16-byte accesses, kPacks in flight. Which thread takes which element does not depend on the address.
template <class G>
__device__ __forceinline__ void see_packs(const void* grad, const Chunk& chunk, Team team, Seen<float>* seen) {
  constexpr int kN = kVector<G>, kPacks = 4;
  const G* const grads = static_cast<const G*>(grad) + chunk.offset;
  const bool aligned = (reinterpret_cast<uint64_t>(grad) & 15) == 0;
  const int whole = chunk.n / kN * kN;
  for (int first = team.index * kN; first < whole; first += team.size * kN * kPacks) {
    Pack<kN, G> packs[kPacks] = {};  // zeros add nothing
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int at = first + team.size * kN * u;
      if (at >= whole) continue;
      if (aligned) {
        packs[u].load(grads + at);
      } else {
#pragma unroll
        for (int i = 0; i < kN; ++i) packs[u].numbers[i] = global(grads)[at + i];
      }
    }
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
#pragma unroll
      for (int i = 0; i < kN; ++i) (*seen)(load<float>(packs[u].numbers[i]));
    }
  }
  for (int n = whole + team.index; n < chunk.n; n += team.size) (*seen)(load<float>(global(grads)[n]));
}

__device__ __forceinline__ ChunkSums see(const Record& record, const void* grad, const Chunk& chunk, Team team,
                                         float scale) {
  if (record.grad_dtype == Dtype::kF64) {
    Seen<double> seen{0.0, 0.0, 1.0 / static_cast<double>(scale)};
    see_any(grad, record.grad_dtype, chunk, 0, team, &seen);
    return {seen.sum, seen.largest};
  }
  Seen<float> seen{0.0f, 0.0f, static_cast<float>(1.0 / static_cast<double>(scale))};
  if (record.grad_dtype == Dtype::kF32)
    see_packs<float>(grad, chunk, team, &seen);
  else if (record.grad_dtype == Dtype::kBF16)
    see_packs<BF16>(grad, chunk, team, &seen);
  else
    see_packs<F16>(grad, chunk, team, &seen);
  return {seen.sum, seen.largest};
}

// Over the threads of a warp, known to all of them.
__device__ __forceinline__ ChunkSums warp_sums(ChunkSums mine) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    mine.sum_of_squares += __shfl_xor_sync(0xffffffffu, mine.sum_of_squares, lanes);
    mine.largest = maximum(mine.largest, __shfl_xor_sync(0xffffffffu, mine.largest, lanes));
  }
  return mine;
}

// Over the threads of a block, in a fixed order.
__device__ __forceinline__ ChunkSums block_sums(ChunkSums mine, ChunkSums* partial) {
  mine = warp_sums(mine);
  __syncthreads();  // the last sums have been read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = mine;
  __syncthreads();
  ChunkSums all{0.0, 0.0};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    all.sum_of_squares += partial[warp].sum_of_squares;
    all.largest = maximum(all.largest, partial[warp].largest);
  }
  return all;
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    norm_kernel(const __grid_constant__ NormArguments<kCapacity> a) {
  __shared__ ChunkSums partial[kWarps];
  __shared__ bool is_last;
  const int thread = threadIdx.x, warp = thread / kWarp;
  const float scale = a.grad_scale != nullptr ? *global(a.grad_scale) : 1.0f;
  const int items = a.n_block_chunks + (a.n_small_chunks + kWarps - 1) / kWarps;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    if (item < a.n_block_chunks) {
      const Chunk chunk = a.chunks[item];
      const void* const grad = a.grads[chunk.record];
      ChunkSums sums{0.0, 0.0};
      if (grad != nullptr) sums = see(a.records[chunk.record], grad, chunk, Team{thread, kThreads}, scale);
      sums = block_sums(sums, partial);
      if (thread == 0) a.sums[item] = sums;
    } else {
      const int small = (item - a.n_block_chunks) * kWarps + warp;
      if (small >= a.n_small_chunks) continue;  // of the whole warp, and none of the block's waits any more
      const Chunk chunk = a.chunks[a.n_block_chunks + small];
      const void* const grad = a.grads[chunk.record];
      ChunkSums sums{0.0, 0.0};
      if (grad != nullptr) sums = see(a.records[chunk.record], grad, chunk, Team{thread % kWarp, kWarp}, scale);
      sums = warp_sums(sums);
      if (thread % kWarp == 0) a.sums[a.n_block_chunks + small] = sums;
    }
  }

  if (!last_of(a.done, gridDim.x, &is_last)) return;
  ChunkSums sums{0.0, 0.0};
  for (int i = thread; i < a.n_block_chunks + a.n_small_chunks; i += kThreads) {
    sums.sum_of_squares += global(a.sums)[i].sum_of_squares;
    sums.largest = maximum(sums.largest, global(a.sums)[i].largest);
  }
  sums = block_sums(sums, partial);
  if (thread != 0) return;
  Norm norm = *global(a.norm);
  norm.sum_of_squares = a.first ? sums.sum_of_squares : norm.sum_of_squares + sums.sum_of_squares;
  norm.largest = a.first ? sums.largest : maximum(norm.largest, sums.largest);
  if (a.last) {
    const bool skipped = a.found_inf_before != nullptr && *global(a.found_inf_before) != 0.0f;
    finish_norm(norm, global(a.found_inf), a.limits, static_cast<double>(scale), skipped);
  }
  *global(a.norm) = norm;
}

// The arguments of the launch for a segment; whether it is the first and the last one that has gradients.
template <int kCapacity>
void set_arguments(NormArguments<kCapacity>* a, const NormCall& call, const Table& table, size_t segment_index,
                   bool first, bool last) {
  const Segment& segment = table.segments[segment_index];
  char* const chunks = call.device_table + table.records.size() * sizeof(Record);
  char* const counters = chunks + table.chunks.size() * sizeof(Chunk);
  a->records = reinterpret_cast<const Record*>(call.device_table) + segment.first_record;
  a->chunks = reinterpret_cast<const Chunk*>(chunks) + segment.first_chunk;
  a->sums = call.sums + segment.first_chunk;
  a->done = reinterpret_cast<uint32_t*>(counters) + segment_index;
  a->n_block_chunks = static_cast<int32_t>(segment.n_block_chunks);
  a->n_small_chunks = static_cast<int32_t>(segment.n_small_chunks);
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
int for_segments(const NormCall& call, const Table& table, Launch&& launch) {
  Call as_step{};
  as_step.grads = call.grads;
  std::vector<size_t> active;
  for (size_t i = 0; i < table.segments.size(); ++i) {
    if (takes_part(as_step, table.segments[i])) active.push_back(i);
  }
  for (size_t i = 0; i < active.size(); ++i)
    launch(active[i], call.first && i == 0, call.last && i + 1 == active.size());
  return static_cast<int>(active.size());
}

}  // namespace fusedstep::cuda
