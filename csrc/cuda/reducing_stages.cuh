// The kernels of a step on parts of tensors, beside those of reducing.cuh: a block for each item of pass 1.
//
//   part_sums_kernel    stage 0: the sums of pass 1, left as they are
//   lines_kernel        stage 1: what follows from the sums of whole rows and columns: states, factors; sums of states
//   matrices_kernel     stage 2: what follows from the sums of whole matrices' states
//   directions_kernel            and, behind pass 2, its sum
//   tensors_kernel      stage 3: what follows from the sums of whole tensors; behind it is pass 3
//
// The sums of a part are added up in the order of those of a tensor: one process has the bits of a step without stages.
//
// Compiled for sm_80, sm_90 and sm_100 and run thread by thread on the host in the tests; never run on a GPU.
#pragma once

#include "reducing.cuh"

namespace fusedstep::cuda {

struct StageArguments : ReducingArguments {
  const Part* parts;
  double* numbers[kSumStages];
};

// An item of a part: where its sums are, and what they are of.
template <class Rule, class T>
struct PartContext : ItemContext<Rule, T> {
  static constexpr bool kIsPart = true;
  const Part& part;
  double* const* numbers;

  __device__ __forceinline__ double* rows() const { return global(numbers[0]) + part.of_rows; }
  __device__ __forceinline__ double* columns() const { return global(numbers[0]) + part.of_columns; }
  __device__ __forceinline__ double* param() const { return global(numbers[0]) + part.of_param; }
  __device__ __forceinline__ double* matrices() const { return global(numbers[1]) + part.of_matrices; }
  __device__ __forceinline__ double* update() const { return global(numbers[2]) + part.of_update; }
};

template <class Rule, class T>
__device__ __forceinline__ PartContext<Rule, T> context_of(const StageArguments& a,
                                                           const ItemContext<Rule, T>& context) {
  return {context, global(a.parts)[context.item.record], a.numbers};
}

// Stage 0 leaves what a step without stages goes on with.
template <class Rule, class T, class Sum, class Count, class Scalars>
__device__ __forceinline__ T finish_row(const PartContext<Rule, T>& context, int64_t line, Sum sum, Count,
                                        const Scalars&) {
  context.rows()[line] = static_cast<double>(sum);
  return T{};
}
template <class Rule, class T, class Sum, class Count, class Scalars>
__device__ __forceinline__ void finish_column(const PartContext<Rule, T>& context, int64_t line, Sum sum, Count,
                                              const Scalars&) {
  context.columns()[line] = static_cast<double>(sum);
}
template <class Rule, class T>
__device__ __forceinline__ void finish_param(const PartContext<Rule, T>& context, double sum) {
  *context.param() = sum;
  context.template at<double>(context.p.totals)[0] = sum;  // which pass 2 reads, in vain
}
// And so does stage 1.
template <class Rule, class T, class Count, class Scalars>
__device__ __forceinline__ void finish_rows_of(const PartContext<Rule, T>& context, int64_t matrix, double sum, Count,
                                               const Scalars&) {
  context.matrices()[matrix] = sum;
}

template <class Rule, class Stored, class Change>
__global__ void __launch_bounds__(kReducingThreads, kTallBlocks)
    part_sums_kernel(const __grid_constant__ StageArguments a) {
  sum_item<Rule, Stored, Change>(a);
}

// A row from the sum of the whole one; returns the first of its states.
template <class Rule, class T, class Scalars>
__device__ __forceinline__ T finish_whole_row(const PartContext<Rule, T>& context, int64_t line, const Scalars& s) {
  const ItemContext<Rule, T>& own = context;
  return finish_row(own, line, context.rows()[line], context.part.columns, s);
}
template <class Rule, class T, class Scalars>
__device__ __forceinline__ void finish_whole_column(const PartContext<Rule, T>& context, int64_t line,
                                                    const Scalars& s) {
  const ItemContext<Rule, T>& own = context;
  finish_column(own, line, context.columns()[line], context.part.rows, s);
}

// The rows of a block of rows, and the columns of a strip, each by one of the items that they go through.
template <class Rule, class T, class Scalars>
__device__ __forceinline__ void finish_lines_of_tile(const PartContext<Rule, T>& context, const Scalars& s,
                                                     Shared<Rule>* shared) {
  const Partition& p = context.p;
  const Item& item = context.item;
  if constexpr (kColumns<Rule>) {
    for (int column = threadIdx.x; item.row == 0 && column < item.n_columns; column += kReducingThreads)
      finish_whole_column(context, item.matrix * p.columns + item.column + column, s);
  }
  if constexpr (kRows<Rule>) {
    if (item.column != 0) return;
    const int lanes = lanes_of_row(p), rows_at_once = kReducingThreads / lanes;
    double states = 0.0;
    for (int row = threadIdx.x / lanes; row < item.n_rows; row += rows_at_once) {
      if (threadIdx.x % lanes == 0) states += finish_whole_row(context, item.matrix * p.rows + item.row + row, s);
    }
    if constexpr (Rule::kRowMean) {
      leave_states(context, states, shared->partial);
      uint32_t* const of_next = context.counters + 2 + (item.matrix + 1) * counters_of_matrix(p);
      if (last_of(of_next - 1, p.n_row_blocks, shared->flags)) finish_matrix(context, s, shared->partial);
    }
  }
}

template <class Rule>
__global__ void __launch_bounds__(kReducingThreads) lines_kernel(const __grid_constant__ StageArguments a) {
  __shared__ Shared<Rule> shared;
  if (is_skipped(a)) return;
  with_item<Rule, AnyStored>(a, [&](const auto& context) {
    const auto s = *context.prepared();
    if (context.p.cut == Cut::kTiles) return finish_lines_of_tile(context, s, &shared);
    if (context.p.cut == Cut::kFlat) return;
    for_small_lines(
        context, [&](int64_t, int, int64_t line) { return finish_whole_row(context, line, s); },
        [&](int64_t matrix, double states) { finish_rows_of(context, matrix, states, 0, s); },
        [&](int64_t, int, int64_t line) { finish_whole_column(context, line, s); });
  });
}

template <class Rule>
__global__ void __launch_bounds__(kReducingThreads) matrices_kernel(const __grid_constant__ StageArguments a) {
  if (is_skipped(a)) return;
  with_item<Rule, AnyStored>(a, [&](const auto& context) {
    using Context = std::decay_t<decltype(context)>;
    const Item& item = context.item;
    const bool tiles = context.p.cut == Cut::kTiles;
    if (context.p.cut == Cut::kFlat || (tiles && (item.row != 0 || item.column != 0))) return;
    const ItemContext<Rule, typename Context::Number>& own = context;
    const auto s = *context.prepared();
    for (int n = threadIdx.x; n < (tiles ? 1 : item.n_rows); n += kReducingThreads)
      finish_rows_of(own, item.matrix + n, context.matrices()[item.matrix + n], context.part.rows, s);
  });
}

template <class Rule>
__global__ void __launch_bounds__(kReducingThreads) directions_kernel(const __grid_constant__ StageArguments a) {
  __shared__ double partial[kReducingWarps];
  if (is_skipped(a)) return;
  with_item<Rule, AnyStored>(a, [&](const auto& context) {
    if (context.item.index != 0) return;
    double sum = 0.0;
#pragma unroll 8
    for (int i = threadIdx.x; i < context.p.n_low; i += kReducingThreads) sum += context.sums(1)[i];
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) *context.update() = sum;
  });
}

template <class Rule>
__global__ void __launch_bounds__(kReducingThreads) tensors_kernel(const __grid_constant__ StageArguments a) {
  if (is_skipped(a)) return;
  with_item<Rule, AnyStored>(a, [&](const auto& context) {
    using T = typename std::decay_t<decltype(context)>::Number;
    if (context.item.index != 0 || threadIdx.x != 0) return;
    const double rms = root_mean(*context.param(), context.part.numel);
    *context.finished() = Rule::finish(*context.prepared(), rms, root_mean(*context.update(), context.part.numel));
    if constexpr (constexpr int kState = kStateIndex<Rule, Span::kTensor>; kState >= 0)
      store_any(context.record.states[kState], context.record.state_dtypes[kState], 0, static_cast<T>(rms));
  });
}

// The kernels of this file that a stage has before and behind the pass of reducing.cuh that is part of it.
enum class StageKernel { kSums, kLines, kMatrices, kDirections, kTensors };

// Makes a stage of own(kernel) and pass(pass), which return how many launches they were.
template <class Own, class OfPass>
int for_stage(int stage, const Own& own, const OfPass& pass) {
  if (stage == 0) return own(StageKernel::kSums);
  if (stage == 1) return own(StageKernel::kLines);
  if (stage == 3) {
    const int launches = own(StageKernel::kTensors);
    return launches + pass(Pass::kApply);
  }
  int launches = own(StageKernel::kMatrices);
  launches += pass(Pass::kUpdate);
  return launches + own(StageKernel::kDirections);
}

inline void set_arguments(StageArguments* a, const Call& call, const ReducingTable& table, char* work,
                          const std::array<double*, kSumStages>& numbers, size_t segment_index) {
  set_arguments(static_cast<ReducingArguments*>(a), call, table, work, segment_index);
  a->parts = reinterpret_cast<const Part*>(a->items + table.items.size()) + table.segments[segment_index].first_record;
  std::copy(numbers.begin(), numbers.end(), a->numbers);
}

// Calls launch(kernel, n_blocks, arguments) for each kernel of a step of a segment; returns how many there are.
template <class Rule, class Launch>
int for_launches(StageArguments* a, const Call& call, const ReducingTable& table, size_t segment_index,
                 StageKernel which, const Launch& launch) {
  const ReducingSegment& segment = table.segments[segment_index];
  using First = typename Rule::FirstPasses;
  a->backwards = false;
  if (which == StageKernel::kSums) {
    return for_kinds(
        a, table, segment_index, segment.tall, 1,
        [changed = changes_grads(call)](Kind kind, bool) {
          using F32 = Packed<float, float>;
          using B16 = Packed<BF16, float>;
          if (kind == Kind::kAny) return part_sums_kernel<First, AnyStored, Changes>;
          if (kind == Kind::kF32)
            return changed ? part_sums_kernel<First, F32, Changes> : part_sums_kernel<First, F32, Unchanged>;
          return changed ? part_sums_kernel<First, B16, Changes> : part_sums_kernel<First, B16, Unchanged>;
        },
        launch);
  }
  const Item* const all = a->items;
  int n = 0;
  for (const Span32& span : segment.tall) n += span.n;  // which follow one another
  a->items = all + segment.tall[0].first;
  a->unaligned_only = false;
  const auto with = [&](auto kernel) {
    launch(kernel, n, *a);
    a->items = all;
    return 1;
  };
  if (which == StageKernel::kLines) return with(lines_kernel<First>);
  if constexpr (Rule::kRowMean) {
    if (which == StageKernel::kMatrices) return with(matrices_kernel<First>);
  }
  if constexpr (Rule::kUpdateSum) {
    static_assert(Rule::kParamSum, "stage 3 takes both");
    if (which == StageKernel::kDirections) return with(directions_kernel<First>);
    if (which == StageKernel::kTensors) return with(tensors_kernel<First>);
  }
  a->items = all;
  return 0;
}

}  // namespace fusedstep::cuda
