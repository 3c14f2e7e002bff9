// What the kernels of rules that reduce share: where the numbers of a tensor are, sums over a block, lines.
#pragma once

#include "followers.cuh"
#include "reducing.h"

namespace fusedstep::cuda {

constexpr int kWarps = kThreads / kWarp;
constexpr int kPerLane = kStrip / kWarp;  // columns of a strip that a thread has
// For each multiprocessor: at most 128 registers a thread, which hold enough loads in flight.
constexpr int kReducingBlocks = 2;

// What a block shares. One kernel has one.
template <class Rule>
struct Shared {
  union Scalars {
    typename Rule::template Scalars<float> single;
    typename Rule::template Scalars<double> twice;
  };
  union Finish {
    typename Rule::template Finish<float> single;
    typename Rule::template Finish<double> twice;
  };
  double hyper[kMaxHyper];
  double partial[kWarps];
  Scalars scalars;
  Finish finish;
  bool is_last;
};

template <class T, class Both>
__device__ __forceinline__ auto& pick(Both& both) {
  if constexpr (sizeof(T) == 4)
    return both.single;
  else
    return both.twice;
}

// A tensor in one call: where everything is.
template <class Rule, class T>
struct Place {
  const Record& record;
  const Partition& p;
  const Item& item;
  const void* grad;
  char* work;
  uint32_t* counters;  // the tensor's own
  GradChange<T> change;

  template <class N>
  __device__ __forceinline__ N* at(int64_t offset) const {
    return global(reinterpret_cast<N*>(work + offset));
  }
  __device__ __forceinline__ double* sums(int which) const { return at<double>(p.sums) + int64_t{which} * p.n_items; }
  __device__ __forceinline__ int32_t row_block() const { return static_cast<int32_t>(item.row / p.item_rows); }
  __device__ __forceinline__ int32_t group() const { return static_cast<int32_t>(item.column / p.item_columns); }
};

// The places of a rule's states of one span, four bits each, because device code reads no arrays of the host's.
template <class Rule, Span span>
constexpr uint32_t kPlaces = [] {
  uint32_t bits = 0;
  for (int n = 0; n < kLineStates<Rule>; ++n) bits |= static_cast<uint32_t>(place_of<Rule, span>(n) & 15) << 4 * n;
  return bits;
}();
template <class Rule, Span span>
__device__ __forceinline__ constexpr int line_state(int n) {
  return kPlaces<Rule, span> >> 4 * n & 15;
}

// The sum over a block's threads, known to all of them. Always in the same order.
__device__ __forceinline__ double block_sum(double value, double* partial) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp];
  return sum;
}

// Whether this block is the last of n to come here; then it sees what the others have written. The counter is zero
// again afterwards.
__device__ __forceinline__ bool last_of(uint32_t* counter, int64_t n, bool* is_last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t last = static_cast<uint32_t>(n - 1);
    *is_last = atomicInc(counter, last) == last;
  }
  __syncthreads();
  const bool last = *is_last;
  if (last) __threadfence();
  return last;
}

// How a warp goes through rows of a strip or tile: `lanes` threads to a row. Each takes kN columns from `column` on,
// and again every kWarp * kN columns; a row that needs less than a warp has no such columns.
struct Lanes {
  int lanes, rows;  // threads for a row, rows at once
  int row, column;  // this thread's

  __device__ __forceinline__ Lanes(int64_t columns, int kN) {
    lanes = kWarp;
    while (lanes > 1 && int64_t{lanes / 2} * kN >= columns) lanes /= 2;
    rows = kWarp / lanes;
    row = threadIdx.x % kWarp / lanes;
    column = threadIdx.x % kWarp % lanes * kN;
  }
};

// How many numbers make 16 bytes.
template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));

__device__ __forceinline__ double root_mean(double sum, int64_t n) {
  return square_root(sum / static_cast<double>(n));
}

// How many neighbours in a row a thread takes of a tensor's tiles. It decides the order of sums, and must not depend on
// where the numbers lie.
template <class T>
__device__ __forceinline__ int pack_of(Dtype dtype, const Partition& p) {
  if (sizeof(T) == 8 || dtype == Dtype::kF64) return 1;
  const int n = dtype == Dtype::kF32 ? kVector<float> : kVector<BF16>;
  return p.columns % n == 0 ? n : 1;
}

// Calls visitor(S{}) if numbers of this dtype are read as packs of S, in fp32 arithmetic; false if they are not.
template <class T, class Visitor>
__device__ __forceinline__ bool visit_packed(const void* data, Dtype dtype, const Partition& p, Visitor&& visitor) {
  if constexpr (sizeof(T) == 4) {
    if (p.cut != Cut::kTiles || pack_of<T>(dtype, p) == 1 || (reinterpret_cast<uint64_t>(data) & 15) != 0) return false;
    if (dtype == Dtype::kF32)
      visitor(float{});
    else if (dtype == Dtype::kBF16)
      visitor(BF16{});
    else
      visitor(F16{});
    return true;
  }
  return false;
}

template <class Rule, class T, Span span>
__device__ __forceinline__ void load_line(const Record& record, int64_t line, T* states) {
#pragma unroll
  for (int n = 0; n < kLineStates<Rule>; ++n)
    states[n] =
        load_any<T>(record.states[line_state<Rule, span>(n)], record.state_dtypes[line_state<Rule, span>(n)], line);
}

// From the mean of a line's squares to its states and factors; returns the first of its states.
template <class Rule, class T, Span span, class Scalars>
__device__ __forceinline__ T finish_line(const Record& record, int64_t line, T mean, T* factors, const Scalars& s) {
  T states[kLineStates<Rule>];
  load_line<Rule, T, span>(record, line, states);
  Rule::line(mean, states, factors, s);
#pragma unroll
  for (int n = 0; n < kLineStates<Rule>; ++n)
    store_any(record.states[line_state<Rule, span>(n)], record.state_dtypes[line_state<Rule, span>(n)], line,
              states[n]);
  return states[0];
}

// Adds up an item's number into the tensor's total; true for all threads of the block that has done so.
template <class Rule, class T>
__device__ __forceinline__ bool add_to_total(const Place<Rule, T>& place, int which, double mine,
                                             Shared<Rule>* shared) {
  mine = block_sum(mine, shared->partial);
  if (threadIdx.x == 0) place.sums(which)[place.item.index] = mine;
  if (!last_of(place.counters + which, place.p.n_items, &shared->is_last)) return false;
  double sum = 0.0;
  for (int i = threadIdx.x; i < place.p.n_items; i += kThreads) sum += place.sums(which)[i];
  sum = block_sum(sum, shared->partial);
  if (threadIdx.x == 0) place.template at<double>(place.p.totals)[which] = sum;
  return true;
}

}  // namespace fusedstep::cuda
