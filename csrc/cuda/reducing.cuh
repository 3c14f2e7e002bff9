// The kernels for rules that reduce, generic over rules and over how tensors are stored: a block for each item.
//
//   sums_kernel     squares of gradients by rows and columns, and of parameters. The last block to come to the end of a
//                   block of rows, of a strip of columns, a matrix or a tensor finishes it: states, factors, totals
//   update_kernel   the sum of the squares of the update
//   apply_kernel    the update itself
//
// Every sum has a fixed order that shape and dtypes alone decide: a block adds up its own item, and whoever happens to
// be the last adds up what the others have left in memory. The first pass leaves a tensor's scalars, the second what
// follows from its sums, for the later ones to read.
//
// Each pass has kernels for the usual ways of storing (Kind), compiled for whether anything is done beside the update,
// and one for all others, which takes tensors of the usual kinds too if their gradients are not aligned.
//
// Compiled for sm_80, sm_90 and sm_100 and run thread by thread on the host in the tests.
#pragma once

#include "reducing_sums.cuh"
#include "reducing_update.cuh"

namespace fusedstep::cuda {

// The arguments have one capacity: a second set of kernels for few tensors would cost every build time.
struct ReducingArguments {
  const Record* records;
  const Partition* partitions;
  const Item* items;  // of the launch
  int32_t last_block;
  bool backwards;  // in the order of blocks
  uint32_t* counters;
  char* work;
  bool unaligned_only;  // tensors whose gradients are aligned are another launch's
  Step step;
  const void* grads[kMaxTensorsPerLaunch];
};

// How the kernels for one kind have their tensors: param and grad as P, a state with a number for each element as S.
template <class P, class S>
struct Packed {
  using Param = P;
  using State = S;
};
struct AnyStored {};

__device__ __forceinline__ bool is_skipped(const ReducingArguments& a) {
  return a.step.found_inf != nullptr && *global(a.step.found_inf) != 0.0f;  // the same for all blocks and launches
}

__device__ __forceinline__ bool is_aligned(const void* address) {
  return (reinterpret_cast<uint64_t>(address) & 15) == 0;
}

// A pass goes through the items from where the one before has ended, whose gradients are still in the cache.
__device__ __forceinline__ int block_of(const ReducingArguments& a) {
  return a.backwards ? a.last_block - static_cast<int>(blockIdx.x) : static_cast<int>(blockIdx.x);
}

// Gives body the place of this block's item, if its tensor takes part in this launch; an item may have several blocks.
template <class Rule, class Stored, int kBlocksPerItem = 1, class Arguments, class Body>
__device__ __forceinline__ void with_item(const Arguments& a, Body&& body) {
  const int block = block_of(a);
  const Item item = global(a.items)[block / kBlocksPerItem];
  const void* const grad = a.grads[item.record];
  constexpr bool kAny = std::is_same_v<Stored, AnyStored>;
  if (grad == nullptr || (kAny ? a.unaligned_only && is_aligned(grad) : !is_aligned(grad))) return;
  const Record& record = global(a.records)[item.record];
  const Partition& p = global(a.partitions)[item.record];
  uint32_t* const counters = global(a.counters) + p.counters;
  const auto with = [&](const auto& context) {
    if constexpr (std::is_same_v<Arguments, ReducingArguments>)
      body(context);
    else
      body(context_of(a, context));  // which knows more
  };
  if constexpr (kAny) {
    if (record.param_dtype == Dtype::kF64)
      return with(ItemContext<Rule, double>{record, p, item, grad, a.work, counters});
  }
  with(ItemContext<Rule, float>{record, p, item, grad, a.work, counters});
}

// The scalars of this step, known to all threads of the block.
template <class Rule, class T>
__device__ __noinline__ void prepare(const ReducingArguments& a, const float* step_counter, Shared<Rule>* shared) {
  constexpr int kHyper = sizeof(Rule::kHyper) / sizeof(Rule::kHyper[0]);
  const int thread = threadIdx.x;
  if (thread < kHyper) {
    const Scalar& scalar = a.step.hyper[thread];
    shared->hyper[thread] = scalar.tensor == nullptr ? scalar.value : load_any<double>(scalar.tensor, scalar.dtype, 0);
  }
  __syncthreads();
  if (thread == 0) {
    const int64_t step = count_of(*global(step_counter)) + 1;
    pick<T>(shared->scalars) = Rule::template prepare<T>(shared->hyper, step);
  }
  __syncthreads();
}

// Pass 1 of this block's item.
template <class Rule, class Stored, class Change, class Arguments>
__device__ __forceinline__ void sum_item(const Arguments& a) {
  __shared__ Shared<Rule> shared;
  if (is_skipped(a)) return;
  with_item<Rule, Stored>(a, [&](const auto& context) {
    using T = typename std::decay_t<decltype(context)>::Number;
    bool prepared = false;
    const auto prepare_once = [&] {
      if (!prepared) prepare<Rule, T>(a, context.record.step, &shared);
      prepared = true;
    };
    auto& s = pick<T>(shared.scalars);
    double of_params = 0.0;
    if constexpr (std::is_same_v<Stored, AnyStored>) {
      __shared__ double stage[kMostPack * kReducingThreads];
      prepare_once();
      const auto change = grad_change<T>(a.step);
      if (context.p.cut == Cut::kTiles) {
        of_params = sum_tile_any<Rule, T>(context, change, s, reinterpret_cast<T*>(stage));
      } else {
        if (context.p.cut == Cut::kSmall) sum_small(context, change, s);
        if constexpr (Rule::kParamSum) of_params = sum_param(context);
      }
    } else {
      using S = typename Stored::Param;
      __shared__ float stage[kVector<S> * kReducingThreads];
      if constexpr (Rule::kSquareTakesScalars) prepare_once();
      of_params = sum_tile<Rule, S>(context, Change(a.step), s, stage);
    }
    finish_item(context, of_params, &shared, prepare_once);
  });
}

template <class Rule, class Stored, class Change>
__global__ void __launch_bounds__(kReducingThreads, kTallBlocks)
    sums_kernel(const __grid_constant__ ReducingArguments a) {
  sum_item<Rule, Stored, Change>(a);
}

template <class Rule, class Stored, class Change>
__global__ void __launch_bounds__(kReducingThreads, kLowBlocks)
    update_kernel(const __grid_constant__ ReducingArguments a) {
  __shared__ Shared<Rule> shared;
  if (is_skipped(a)) return;
  with_item<Rule, Stored>(a, [&](const auto& context) {
    using T = typename std::decay_t<decltype(context)>::Number;
    double of_update;
    if constexpr (std::is_same_v<Stored, AnyStored>)
      of_update = square_any<Rule, T>(context, grad_change<T>(a.step));
    else
      of_update = square_tile<Rule, typename Stored::Param>(context, Change(a.step));
    finish_update<Rule, T>(context, of_update, &shared);
  });
}

// What is left of a step that is skipped.
template <class Rule, class T>
__device__ __forceinline__ void zero_grads(const ItemContext<Rule, T>& context) {
  const Partition& p = context.p;
  const Item& item = context.item;
  void* const grad = const_cast<void*>(context.grad);
  const bool tiles = p.cut == Cut::kTiles;
  const int64_t matrix = item.matrix * p.rows * p.columns,
                n = p.cut == Cut::kSmall ? item.n_rows * p.rows * p.columns : int64_t{item.n_columns};
  for (int row = 0; row < (tiles ? item.n_rows : 1); ++row) {
    const int64_t begin = matrix + (item.row + row) * p.columns + item.column;
    for (int64_t i = begin + threadIdx.x; i < begin + n; i += kReducingThreads)
      store_any(grad, context.record.grad_dtype, i, 0.0f);
  }
}

template <class Rule, class Stored, class Does>
__global__ void __launch_bounds__(kReducingThreads, std::is_same_v<Does, Beside> ? kBesideBlocks
                                                    : kElementState<Rule> < 0    ? kLowBlocks
                                                                                 : kStateBlocks)
    apply_kernel(const __grid_constant__ ReducingArguments a) {
  constexpr bool kAny = std::is_same_v<Stored, AnyStored>;
  const bool skipped = is_skipped(a);
  if (skipped && !a.step.zero_grads) return;
  constexpr int kBlocksPerItem = kAny ? 1 : kApplyBlocksPerItem<Rule>;
  with_item<Rule, Stored, kBlocksPerItem>(a, [&](const auto& context) {
    using T = typename std::decay_t<decltype(context)>::Number;
    const int part = block_of(a) % kBlocksPerItem;
    const bool first = part == 0;
    if constexpr (kAny || std::is_same_v<Does, Beside>) {
      if (skipped) return first ? zero_grads(context) : void();
    }
    if constexpr (kAny)
      apply_any<Rule, T>(context, grad_change<T>(a.step), static_cast<T>(a.step.average_weight));
    else
      apply_tile<Rule, typename Stored::Param, typename Stored::State>(context, part, Does(a.step));
    // The passes before have read it.
    if (first && context.item.index == 0 && threadIdx.x == 0)
      *global(context.record.step) = next_counter(*global(context.record.step));
  });
}

// The arguments of all launches of a segment, but for the items.
inline void set_arguments(ReducingArguments* a, const Call& call, const ReducingTable& table, char* work,
                          size_t segment_index) {
  const ReducingSegment& segment = table.segments[segment_index];
  char* const partitions = call.device_table + table.records.size() * sizeof(Record);
  char* const items = partitions + table.partitions.size() * sizeof(Partition);
  a->records = reinterpret_cast<const Record*>(call.device_table) + segment.first_record;
  a->partitions = reinterpret_cast<const Partition*>(partitions) + segment.first_record;
  a->items = reinterpret_cast<const Item*>(items);
  a->counters =
      reinterpret_cast<uint32_t*>(items + table.items.size() * sizeof(Item) + table.parts.size() * sizeof(Part));
  a->work = work;
  a->step = call;
  for (int64_t i = 0; i < segment.n_records; ++i) a->grads[i] = call.grads[segment.first_record + i];
}

// Calls launch(kernel, n_blocks, arguments) for each way of storing that occurs among some items of a segment;
// kernel_of(kind, followed) is its kernel. Returns how many there are.
template <class Arguments, class KernelOf, class Launch>
int for_kinds(Arguments* a, const ReducingTable& table, size_t segment_index, const Span32* spans, int blocks_per_item,
              const KernelOf& kernel_of, const Launch& launch) {
  const ReducingSegment& segment = table.segments[segment_index];
  bool unaligned[kKinds] = {};
  for (int64_t i = 0; i < segment.n_records; ++i) {
    if ((reinterpret_cast<uintptr_t>(a->grads[i]) & 15) != 0)
      unaligned[static_cast<int>(table.kinds[segment.first_record + i])] = true;
  }
  const Item* const all = a->items;
  int launches = 0;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (const bool any : {false, true}) {
      const bool is_any = kind == static_cast<int>(Kind::kAny);
      if (spans[kind].n == 0 || (any ? !is_any && !unaligned[kind] : is_any)) continue;
      a->items = all + spans[kind].first;
      a->unaligned_only = any && !is_any;
      const int blocks = spans[kind].n * (any ? 1 : blocks_per_item);
      a->last_block = blocks - 1;
      launch(kernel_of(any ? Kind::kAny : static_cast<Kind>(kind), segment.followed[kind]), blocks, *a);
      ++launches;
    }
  }
  a->items = all;
  return launches;
}

// Whether rules take other gradients than the stored ones.
inline bool changes_grads(const Call& call) {
  return call.maximize || call.grad_scale != nullptr || call.coefficient != nullptr;
}

// Calls launch(kernel, n_blocks, arguments) for each kernel of a pass of a segment; returns how many there are.
template <class Rule, class Launch>
int for_launches(ReducingArguments* a, const Call& call, const ReducingTable& table, size_t segment_index, Pass pass,
                 const Launch& launch) {
  const ReducingSegment& segment = table.segments[segment_index];
  using First = typename Rule::FirstPasses;
  using F32 = Packed<float, float>;
  using B16 = Packed<BF16, float>;
  constexpr bool kHasState = kElementState<Rule> >= 0;
  const bool changed = changes_grads(call);
  const auto for_items = [&](const Span32* spans, int blocks_per_item, const auto& kernel_of) {
    return for_kinds(a, table, segment_index, spans, blocks_per_item, kernel_of, launch);
  };
  a->backwards = pass == (Rule::kUpdateSum ? Pass::kUpdate : Pass::kApply);
  if (pass == Pass::kSums) {
    return for_items(segment.tall, 1, [&](Kind kind, bool) {
      if (kind == Kind::kAny) return sums_kernel<First, AnyStored, Changes>;
      if (kind == Kind::kF32) return changed ? sums_kernel<First, F32, Changes> : sums_kernel<First, F32, Unchanged>;
      return changed ? sums_kernel<First, B16, Changes> : sums_kernel<First, B16, Unchanged>;
    });
  }
  if (pass == Pass::kUpdate) {
    if constexpr (Rule::kUpdateSum) {
      return for_items(segment.low, 1, [&](Kind kind, bool) {
        if (kind == Kind::kAny) return update_kernel<First, AnyStored, Changes>;
        if (kind == Kind::kF32)
          return changed ? update_kernel<First, F32, Changes> : update_kernel<First, F32, Unchanged>;
        return changed ? update_kernel<First, B16, Changes> : update_kernel<First, B16, Unchanged>;
      });
    }
    return 0;
  }
  return for_items(segment.low, kApplyBlocksPerItem<Rule>, [&](Kind kind, bool followed) {
    const bool more = changed || call.zero_grads || call.write_grads || followed;
    if (kind == Kind::kAny) return apply_kernel<Rule, AnyStored, Beside>;
    if (kind == Kind::kF32) return more ? apply_kernel<Rule, F32, Beside> : apply_kernel<Rule, F32, NothingBeside>;
    if constexpr (kHasState) {
      if (kind == Kind::kBF16WithBF16State) {
        using Narrow = Packed<BF16, BF16>;
        return more ? apply_kernel<Rule, Narrow, Beside> : apply_kernel<Rule, Narrow, NothingBeside>;
      }
    }
    return more ? apply_kernel<Rule, B16, Beside> : apply_kernel<Rule, B16, NothingBeside>;
  });
}

// Whether a tensor of the segment has a gradient.
inline bool takes_part(const Call& call, const ReducingTable& table, size_t segment_index) {
  const ReducingSegment& segment = table.segments[segment_index];
  const void* const* const grads = call.grads + segment.first_record;
  return std::any_of(grads, grads + segment.n_records, [](const void* grad) { return grad != nullptr; });
}

}  // namespace fusedstep::cuda
