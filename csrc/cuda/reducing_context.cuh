// What the kernels of rules that reduce share: where the numbers of a tensor are, sums over a block, lines, tiles.
#pragma once

#include "parts.cuh"
#include "reducing.h"

namespace fusedstep::cuda {

constexpr int kReducingWarps = kReducingThreads / kWarp;

// What a block shares. One kernel has one.
template <class Rule>
struct Shared {
  union Scalars {
    typename Rule::template Scalars<float> single;
    typename Rule::template Scalars<double> fp64;
  };
  Scalars scalars;
  double hyper[kMaxHyper];
  double partial[kReducingWarps];
  uint32_t flags[4];
  static_assert(sizeof(Scalars) <= kPreparedBytes, "what a tensor has room for");
};

template <class T, class Both>
__device__ __forceinline__ auto& pick(Both& both) {
  if constexpr (sizeof(T) == 4)
    return both.single;
  else
    return both.fp64;
}

// A tensor in one call: where everything is.
template <class Rule, class T>
struct ItemContext {
  using RuleType = Rule;
  using Number = T;
  static constexpr bool kIsPart = false;
  const Record& record;
  const Partition& p;
  const Item& item;
  const void* grad;
  char* work;
  uint32_t* counters;  // the tensor's own

  template <class N>
  __device__ __forceinline__ N* at(int64_t offset) const {
    return global(reinterpret_cast<N*>(work + offset));
  }
  __device__ __forceinline__ double* sums(int which) const {
    return at<double>(p.sums) + (which == 0 ? 0 : int64_t{p.n_tall});
  }
  // The rule's scalars as the first pass has left them.
  __device__ __forceinline__ auto prepared() const { return at<typename Rule::template Scalars<T>>(p.prepared); }
  __device__ __forceinline__ auto finished() const { return at<typename Rule::template Finish<T>>(p.finished); }
};

// The places of a rule's states of one span, four bits each, because device code reads no arrays of the host's.
template <class Rule, Span span>
constexpr uint32_t kStateIndices = [] {
  uint32_t bits = 0;
  for (int n = 0; n < kLineStates<Rule>; ++n)
    bits |= static_cast<uint32_t>(state_index_of<Rule, span>(n) & 15) << 4 * n;
  return bits;
}();
template <class Rule, Span span>
__device__ __forceinline__ constexpr int line_state(int n) {
  return kStateIndices<Rule, span> >> 4 * n & 15;
}

// The sum over neighbouring lanes, a power of two of them, known to all of them. Always in the same order.
template <class T>
__device__ __forceinline__ T sum_lanes(T value, int lanes) {
  if (lanes >= kWarp) {
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  } else {
    for (int apart = lanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  }
  return value;
}

// The sum over a block's threads, known to all of them. Always in the same order.
__device__ __forceinline__ double block_sum(double value, double* partial) {
  value = sum_lanes(value, kWarp);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kReducingWarps; ++warp) sum += partial[warp];
  return sum;
}

// One more of n has come to this counter: whether it was the last. Then the counter is zero again.
__device__ __forceinline__ bool count(uint32_t* counter, int64_t n) {
  return n == 1 || atomicInc(counter, static_cast<uint32_t>(n - 1)) == static_cast<uint32_t>(n - 1);
}

// Whether this block is the last of n to come here; then it sees what the others have written.
__device__ __forceinline__ bool last_of(uint32_t* counter, int64_t n, uint32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    fence();
    *flag = count(counter, n);
  }
  __syncthreads();
  const bool last = *flag != 0;
  if (last) fence();
  return last;
}

__device__ __forceinline__ double root_mean(double sum, int64_t n) {
  return square_root(sum / static_cast<double>(n));
}

// How many numbers make 16 bytes.
template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));

// Where this thread stands in an item of tiles: `lanes` threads take a row, kReducingThreads / lanes rows at a time.
struct Tile {
  int lanes, lane;  // threads of a row, and this one among them
  int rows_at_once, row;
  int64_t column;  // the first one of this thread
  bool inside;     // whether there is such a column

  __device__ __forceinline__ Tile(const Partition& p, const Item& item, int pack) {
    const int thread = threadIdx.x, shift = 31 - __clz(p.lanes);
    lanes = p.lanes;
    lane = thread & (lanes - 1);
    rows_at_once = kReducingThreads >> shift;
    row = thread >> shift;
    column = item.column + lane * pack;
    inside = column < p.columns;
  }
};

// The rows of a tile that one thread has. Their distance in bytes has 32 bits: one instruction makes an address of it.
template <class S>
struct Rows {
  S* first;
  uint32_t apart;

  __device__ __forceinline__ Rows(void* array, int64_t begin, int64_t stride)
      : first(global(static_cast<S*>(array) + begin)), apart(static_cast<uint32_t>(stride * sizeof(S))) {}
  __device__ __forceinline__ S* operator[](int k) const {
    return reinterpret_cast<S*>(reinterpret_cast<char*>(first) + uint64_t{static_cast<uint32_t>(k)} * apart);
  }
};

// What the numbers of a gradient become, where all are divided by the same scale: exactly so.
struct Changes {
  float scale, inverse, factor, sign;
  bool exact;  // the inverse is: scale is a power of two

  __device__ __forceinline__ explicit Changes(const Step& step) {
    const auto change = grad_change<float>(step);
    const uint32_t bits = bit_cast<uint32_t>(change.scale), exponent = bits >> 23;
    scale = change.scale;
    factor = change.factor;
    sign = change.sign;
    exact = (bits & 0x807fffffu) == 0 && exponent >= 1 && exponent <= 253;
    inverse = bit_cast<float>((254u - exponent) << 23);
  }

  template <int kN>
  __device__ __forceinline__ void operator()(float* grads) const {
    if (exact) {
#pragma unroll
      for (int i = 0; i < kN; ++i) grads[i] = grads[i] * inverse;
    } else {
#pragma unroll
      for (int i = 0; i < kN; ++i) grads[i] = grads[i] / scale;
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) grads[i] = grads[i] * factor;
  }
};
struct Unchanged {
  __device__ __forceinline__ explicit Unchanged(const Step&) {}
  template <int kN>
  __device__ __forceinline__ void operator()(float*) const {}
};

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

// What becomes of the sum of a line, of `count` numbers; returns the first of the line's states. What is known of a
// part instead is in reducing_stages.cuh.
template <class Rule, class T, class Sum, class Count, class Scalars>
__device__ __forceinline__ T finish_row(const ItemContext<Rule, T>& context, int64_t line, Sum sum, Count count,
                                        const Scalars& s) {
  T* const factors = context.template at<T>(context.p.row_factors) + line * Rule::kFactors;
  return finish_line<Rule, T, Span::kRow>(context.record, line, static_cast<T>(sum / static_cast<Sum>(count)), factors,
                                          s);
}
template <class Rule, class T, class Sum, class Count, class Scalars>
__device__ __forceinline__ void finish_column(const ItemContext<Rule, T>& context, int64_t line, Sum sum, Count count,
                                              const Scalars& s) {
  T* const factors = context.template at<T>(context.p.column_factors) + line * Rule::kFactors;
  finish_line<Rule, T, Span::kColumn>(context.record, line, static_cast<T>(sum / static_cast<Sum>(count)), factors, s);
}

// The same of the sum of the first states of a matrix's rows, and of the squares of the parameter.
template <class Rule, class T, class Count, class Scalars>
__device__ __forceinline__ void finish_rows_of(const ItemContext<Rule, T>& context, int64_t matrix, double sum,
                                               Count count, const Scalars& s) {
  context.template at<T>(context.p.matrix_factors)[matrix] = Rule::matrix(static_cast<T>(sum / count), s);
}
template <class Rule, class T>
__device__ __forceinline__ void finish_param(const ItemContext<Rule, T>& context, double sum) {
  context.template at<double>(context.p.totals)[0] = sum;
  if constexpr (constexpr int kState = kStateIndex<Rule, Span::kTensor>; kState >= 0)
    store_any(context.record.states[kState], context.record.state_dtypes[kState], 0,
              static_cast<T>(root_mean(sum, context.record.numel)));
}

}  // namespace fusedstep::cuda
