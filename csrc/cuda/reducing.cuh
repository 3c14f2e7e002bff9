// The kernels for rules that reduce, generic over rules: persistent grids over items of all tensors of a group.
//
//   sums_kernel     squares of gradients by rows and columns, and of parameters. The last block to come to the end of a
//                   block of rows, a group of strips, a matrix or a tensor finishes it: states, factors, totals
//   update_kernel   the sum of the squares of the update
//   apply_kernel    the update itself
//
// Every sum has a fixed order that the shape alone decides: a block adds up its own item, and whoever happens to be the
// last adds up what the others have left in memory.
//
// Compiled for sm_80, sm_90 and sm_100 and run thread by thread on the host in the tests; it has never run on a GPU.
#pragma once

#include "reducing_sums.cuh"
#include "reducing_update.cuh"

namespace fusedstep::cuda {

// Of one capacity: a second set of kernels for few tensors would cost every build minutes.
struct ReducingArguments {
  const Record* records;
  const Partition* partitions;
  const Item* items;
  uint32_t* counters;
  uint32_t* done;  // blocks that have finished the last launch; the last one sets it back to zero
  char* work;
  int32_t n_records, n_items;
  const float* found_inf;
  GradsBecome grads_become;
  double average_weight;
  Scalar hyper[kMaxHyper];
  const void* grads[kMaxTensorsPerLaunch];
};

// What every kernel does around its own work: goes through the items, and gives body<T>(place, scalars, shared) those
// whose tensor takes part.
template <class Rule, class Body>
__device__ __forceinline__ void for_items(const ReducingArguments& a, Shared<Rule>& shared, Body&& body) {
  const int thread = threadIdx.x;
  constexpr int kHyper = sizeof(Rule::kHyper) / sizeof(Rule::kHyper[0]);
  if (thread < kHyper) {
    const Scalar& scalar = a.hyper[thread];
    shared.hyper[thread] = scalar.tensor == nullptr ? scalar.value : load_any<double>(scalar.tensor, scalar.dtype, 0);
  }
  int prepared = -1;  // the record whose scalars are there
  for (int i = blockIdx.x; i < a.n_items; i += gridDim.x) {
    const Item& item = a.items[i];
    const void* grad = a.grads[item.record];
    if (grad == nullptr) continue;
    const Record& record = a.records[item.record];
    const Partition& p = a.partitions[item.record];
    const bool twice = record.param_dtype == Dtype::kF64;
    const bool fresh = item.record != prepared;
    if (fresh) {
      __syncthreads();  // hyper is there, and nobody needs the last tensor's scalars any more
      if (thread == 0) {
        const int64_t step = count_of(*global(record.step)) + 1;
        if (twice)
          shared.scalars.twice = Rule::template prepare<double>(shared.hyper, step);
        else
          shared.scalars.single = Rule::template prepare<float>(shared.hyper, step);
      }
      __syncthreads();
      prepared = item.record;
    }
    uint32_t* const counters = a.counters + p.counters;
    if (twice)
      body(Place<Rule, double>{record, p, item, grad, a.work, counters, a.grads_become.template change<double>()},
           fresh);
    else
      body(Place<Rule, float>{record, p, item, grad, a.work, counters, a.grads_become.template change<float>()}, fresh);
  }
}

__device__ __forceinline__ bool is_skipped(const ReducingArguments& a) {
  return a.found_inf != nullptr && *global(a.found_inf) != 0.0f;  // the same for all blocks and launches
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, kReducingBlocks) sums_kernel(const __grid_constant__ ReducingArguments a) {
  __shared__ Shared<Rule> shared;
  __shared__ double stage[kStrip * kWarps];
  if (is_skipped(a)) return;
  for_items<Rule>(a, shared, [&](const auto& place, bool) {
    using T = decltype(place.change.sign);
    const auto& s = pick<T>(shared.scalars);
    if (place.p.cut == Cut::kTiles) {
      sum_tile<Rule, T>(place, s, reinterpret_cast<T*>(stage));
      finish_tile<Rule, T>(place, s, shared.partial, &shared.is_last);
    } else if (place.p.cut == Cut::kSmall) {
      sum_small<Rule, T>(place, s);
    }
    if constexpr (Rule::kParamSum) {
      const double mine = sum_param<T>(place.record, place.p, place.item);
      const bool is_last = add_to_total<Rule, T>(place, 0, mine, &shared);
      if constexpr (constexpr int kState = kPlace<Rule, Span::kTensor>; kState >= 0) {
        const double total = place.template at<double>(place.p.totals)[0];
        if (is_last && threadIdx.x == 0)
          store_any(place.record.states[kState], place.record.state_dtypes[kState], 0,
                    static_cast<T>(root_mean(total, place.record.numel)));
      }
    }
  });
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, kReducingBlocks)
    update_kernel(const __grid_constant__ ReducingArguments a) {
  __shared__ Shared<Rule> shared;
  if (is_skipped(a)) return;
  for_items<Rule>(a, shared, [&](const auto& place, bool) {
    using T = decltype(place.change.sign);
    add_to_total<Rule, T>(place, 1, square_item<Rule, T>(place, pick<T>(shared.scalars)), &shared);
  });
}

// Calls body(begin, n) for each run of neighbours among an item's elements.
template <class Body>
__device__ __forceinline__ void for_runs(const Partition& p, const Item& item, Body&& body) {
  const int64_t matrix = item.matrix * p.rows * p.columns;
  if (p.cut == Cut::kFlat) {
    body(int64_t{item.column}, int64_t{item.n_columns});
  } else if (p.cut == Cut::kSmall) {
    body(matrix, item.n_rows * p.rows * p.columns);
  } else {
    for (int row = 0; row < item.n_rows; ++row)
      body(matrix + (item.row + row) * p.columns + item.column, int64_t{item.n_columns});
  }
}

// What is left of a step that is skipped.
__device__ __noinline__ void zero_grads(const ReducingArguments& a) {
  for (int i = blockIdx.x; i < a.n_items; i += gridDim.x) {
    const Item& item = a.items[i];
    void* const grad = const_cast<void*>(a.grads[item.record]);
    if (grad == nullptr) continue;
    const Dtype dtype = a.records[item.record].grad_dtype;
    for_runs(a.partitions[item.record], item, [&](int64_t begin, int64_t n) {
      for (int64_t i = begin + threadIdx.x; i < begin + n; i += kThreads) store_any(grad, dtype, i, 0.0f);
    });
  }
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, kReducingBlocks) apply_kernel(const __grid_constant__ ReducingArguments a) {
  __shared__ Shared<Rule> shared;
  if (is_skipped(a)) {
    if (a.grads_become.zero) zero_grads(a);
    return;
  }
  for_items<Rule>(a, shared, [&](const auto& place, bool fresh) {
    using T = decltype(place.change.sign);
    const auto& s = pick<T>(shared.scalars);
    auto& f = pick<T>(shared.finish);
    if (fresh) {
      if (threadIdx.x == 0) {
        const double* const totals = place.template at<double>(place.p.totals);
        const int64_t n = place.record.numel;
        f = Rule::finish(s, Rule::kParamSum ? root_mean(totals[0], n) : 0.0,
                         Rule::kUpdateSum ? root_mean(totals[1], n) : 0.0);
      }
      __syncthreads();
    }
    apply_item<Rule, T>(place, s, f);
    if (place.record.has_followers()) {
      __syncthreads();  // another thread may have written what this one reads
      for_runs(place.p, place.item, [&](int64_t begin, int64_t n) {
        follow_any(place.record, begin, n, Team{static_cast<int>(threadIdx.x), kThreads}, a.average_weight);
      });
    }
  });
  // The last block to come here advances the step counters: by then every block has read those that it needed.
  if (!last_of(a.done, gridDim.x, &shared.is_last)) return;
  for (int i = threadIdx.x; i < a.n_records; i += kThreads) {
    if (a.grads[i] != nullptr) *global(a.records[i].step) = next_counter(*global(a.records[i].step));
  }
}

// The arguments of all launches of a segment.
inline void set_arguments(ReducingArguments* a, const Call& call, const ReducingTable& table, char* work,
                          size_t segment_index) {
  const Segment& segment = table.segments[segment_index];
  char* const partitions = call.device_table + table.records.size() * sizeof(Record);
  char* const items = partitions + table.partitions.size() * sizeof(Partition);
  auto* const counters = reinterpret_cast<uint32_t*>(items + table.items.size() * sizeof(Item));
  a->records = reinterpret_cast<const Record*>(call.device_table) + segment.first_record;
  a->partitions = reinterpret_cast<const Partition*>(partitions) + segment.first_record;
  a->items = reinterpret_cast<const Item*>(items) + segment.first_chunk;
  a->counters = counters;
  a->done = counters + segment_index;
  a->work = work;
  a->n_records = static_cast<int32_t>(segment.n_records);
  a->n_items = static_cast<int32_t>(segment.n_block_chunks);
  a->found_inf = call.found_inf;
  a->grads_become = grads_become(call);
  a->average_weight = call.average_weight;
  for (int k = 0; k < kMaxHyper; ++k) a->hyper[k] = call.hyper[k];
  for (int64_t i = 0; i < segment.n_records; ++i) a->grads[i] = call.grads[segment.first_record + i];
}

// Calls launch(kernel) for each kernel of a step; returns how many there are.
template <class Rule, class Launch>
int for_launches(Launch&& launch) {
  launch(sums_kernel<Rule>);
  if constexpr (Rule::kUpdateSum) launch(update_kernel<Rule>);
  launch(apply_kernel<Rule>);
  return Rule::kUpdateSum ? 3 : 2;
}

}  // namespace fusedstep::cuda
