// The one kernel, generic over rules and over how tensors are stored: a persistent grid over chunks of all tensors of a
// group. Storage<Rule>::update updates a chunk in fp32 arithmetic (plain.cuh, stored.cuh).
//
// Compiled for sm_80, sm_90 and sm_100 and run thread by thread on the host in the tests; it has never run on a GPU.
// It uses little of CUDA, so that the host can stand in for it: thread and block indices, shared memory, barriers,
// one atomic counter.
#pragma once

#include "followers.cuh"

namespace fusedstep::cuda {

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

// What the threads that share a chunk need, computed once by one of them.
template <class Rule>
union Prepared {
  typename Rule::template Scalars<float> single;
  typename Rule::template Scalars<double> twice;
};

template <class Rule>
__device__ __forceinline__ void prepare(const Record& record, const double* hyper, Prepared<Rule>* prepared) {
  const int64_t step = count_of(*global(record.step)) + 1;
  if (record.param_dtype == Dtype::kF64)
    prepared->twice = Rule::template prepare<double>(hyper, step);
  else
    prepared->single = Rule::template prepare<float>(hyper, step);
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
template <class Rule, template <class> class Storage>
__device__ __forceinline__ void update_and_follow(const Record& record, const void* grad, const Chunk& chunk, Team team,
                                                  const GradsBecome& grads_become, double average_weight,
                                                  const Prepared<Rule>& prepared) {
  const bool follows = record.has_followers();
  const int at_once = follows ? kFollowed : chunk.n;
  for (int at = 0; at < chunk.n; at += at_once) {
    const Chunk piece{chunk.record, min(chunk.n - at, at_once), chunk.offset + at};
    if (record.param_dtype == Dtype::kF64)
      update_any<Rule, double>(record, grad, piece, 0, team, grads_become.change<double>(), prepared.twice);
    else
      Storage<Rule>::update(record, grad, piece, team, grads_become.change<float>(), prepared.single);
    if (!follows) continue;
    team.wait();  // another thread may have written what this one reads
    follow_any(record, piece.offset, piece.n, team, average_weight);
  }
}

template <class Rule, template <class> class Storage, int kCapacity>
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
    update_and_follow<Rule, Storage>(record, grad, chunk, team, a.grads_become, a.average_weight, mine);
  }

  // The last block to come here advances the counters: by then every block has read those that it needed.
  __threadfence();
  __syncthreads();
  if (thread == 0) is_last = atomicInc(a.done, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = thread; i < a.n_records; i += blockDim.x) {
    if (a.grads[i] != nullptr) *global(a.records[i].step) = next_counter(*global(a.records[i].step));
  }
}

// The arguments of the launch for a segment.
template <int kCapacity>
void set_arguments(Arguments<kCapacity>* a, const Call& call, const Table& table, size_t segment_index) {
  const Segment& segment = table.segments[segment_index];
  char* const chunks = call.device_table + table.records.size() * sizeof(Record);
  char* const counters = chunks + table.chunks.size() * sizeof(Chunk);
  a->records = reinterpret_cast<const Record*>(call.device_table) + segment.first_record;
  a->chunks = reinterpret_cast<const Chunk*>(chunks) + segment.first_chunk;
  a->done = reinterpret_cast<uint32_t*>(counters) + segment_index;
  a->n_records = static_cast<int32_t>(segment.n_records);
  a->n_block_chunks = static_cast<int32_t>(segment.n_block_chunks);
  a->n_small_chunks = static_cast<int32_t>(segment.n_small_chunks);
  a->found_inf = call.found_inf;
  a->grads_become = grads_become(call);
  a->average_weight = call.average_weight;
  for (int k = 0; k < kMaxHyper; ++k) a->hyper[k] = call.hyper[k];
  for (int64_t i = 0; i < segment.n_records; ++i) a->grads[i] = call.grads[segment.first_record + i];
}

}  // namespace fusedstep::cuda
