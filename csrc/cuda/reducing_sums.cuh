// Pass 1 of a rule that reduces: squares of gradients by rows and columns, squares of parameters; and what follows from
// them: states, factors, totals.
#pragma once

#include "reducing_place.cuh"

namespace fusedstep::cuda {

// The sums that a block's warps have for the columns of a strip, each in its part of `stage`: together.
template <class Rule, class T>
__device__ __forceinline__ void add_columns(const Place<Rule, T>& place, int64_t first_column, int width,
                                            const Lanes& to, const T* stage) {
  __syncthreads();
  const Partition& p = place.p;
  const int sums = kWarps * to.rows, room = kStrip / to.rows;
  T* const column_sums = place.template at<T>(p.column_sums) +
                         (place.item.matrix * p.n_row_blocks + place.row_block()) * p.columns + first_column;
  for (int column = threadIdx.x; column < width; column += kThreads) {
    T sum{};
    for (int i = 0; i < sums; ++i) sum += stage[i * room + column];
    column_sums[column] = sum;
  }
  __syncthreads();
}

// One strip of an item whose rows are whole packs. A thread sums its columns in registers, and reads several rows
// before it needs the first, to keep enough loads in flight.
template <class Rule, class S, class Scalars>
__device__ __forceinline__ void sum_strip(const Place<Rule, float>& place, int64_t first_column, int width,
                                          const Scalars& scalars, float* stage) {
  constexpr int kN = kVector<S>, kPacks = kPerLane / kN, kAtOnce = 8 / kPacks;
  const auto s = scalars;
  const auto change = place.change;
  const Partition& p = place.p;
  const Item& item = place.item;
  const Lanes to(p.columns, kN);
  const int warp = threadIdx.x / kWarp, n_rows = item.n_rows, n_strips = p.n_strips;
  const int64_t columns = p.columns, first_row = item.matrix * p.rows + item.row;
  const S* const grads = static_cast<const S*>(place.grad) + first_row * columns + first_column;
  float* const row_sums = place.template at<float>(p.row_sums) + first_row * n_strips + first_column / p.strip;
  float sums[kPerLane] = {};
  for (int first = warp * to.rows; first < n_rows; first += kWarps * to.rows * kAtOnce) {
    Pack<kN, S> packs[kAtOnce][kPacks] = {};  // zeros add nothing
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int row = first + u * kWarps * to.rows + to.row;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int column = to.column + k * kWarp * kN;
        if (row < n_rows && column < width) packs[u][k].load(grads + row * columns + column);
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int row = first + u * kWarps * to.rows + to.row;
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const float square = Rule::square(change(load<float>(packs[u][k].numbers[i])), s);
          sums[k * kN + i] += square;
          sum += square;
        }
      }
      if constexpr (kRows<Rule>) {
        for (int lanes = to.lanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        if (to.column == 0 && row < n_rows) row_sums[int64_t{row} * n_strips] = sum;
      }
    }
  }
  if constexpr (kColumns<Rule>) {
    float* const mine = stage + (warp * to.rows + to.row) * (kStrip / to.rows);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = to.column + k * kWarp * kN;
      if (column >= width) continue;
#pragma unroll
      for (int i = 0; i < kN; ++i) mine[column + i] = sums[k * kN + i];
    }
    add_columns(place, first_column, width, to, stage);
  }
}

// One strip of an item of any dtype, alignment and number of columns; a thread sums its columns in `stage`.
template <class Rule, class T, class Scalars>
__device__ __noinline__ void sum_strip_any(const Place<Rule, T>& place, int64_t first_column, int width,
                                           const Scalars& scalars, T* stage) {
  const auto s = scalars;
  const auto change = place.change;
  const Partition& p = place.p;
  const Item& item = place.item;
  const int pack = pack_of<T>(place.record.grad_dtype, p);
  const Lanes to(p.columns, pack);
  const int warp = threadIdx.x / kWarp;
  const int64_t first_row = item.matrix * p.rows + item.row;
  T* const row_sums = place.template at<T>(p.row_sums) + first_row * p.n_strips + first_column / p.strip;
  T* const mine = stage + (warp * to.rows + to.row) * (kStrip / to.rows);
  for (int first = to.column; first < width; first += kWarp * pack) {
    for (int i = 0; i < pack; ++i) mine[first + i] = T{};
  }
  for (int first = warp * to.rows; first < item.n_rows; first += kWarps * to.rows) {
    const int row = first + to.row;
    T sum{};
    if (row < item.n_rows) {
      const int64_t begin = (first_row + row) * p.columns + first_column;
      for (int first = to.column; first < width; first += kWarp * pack) {
        for (int column = first; column < first + pack; ++column) {
          const T square = Rule::square(change(load_any<T>(place.grad, place.record.grad_dtype, begin + column)), s);
          mine[column] += square;
          sum += square;
        }
      }
    }
    if constexpr (kRows<Rule>) {
      for (int lanes = to.lanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (to.column == 0 && row < item.n_rows) row_sums[int64_t{row} * p.n_strips] = sum;
    }
  }
  if constexpr (kColumns<Rule>) add_columns(place, first_column, width, to, stage);
}

template <class Rule, class T, class Scalars>
__device__ __forceinline__ void sum_tile(const Place<Rule, T>& place, const Scalars& s, T* stage) {
  for (int at = 0; at < place.item.n_columns; at += place.p.strip) {
    const int width = min(place.p.strip, place.item.n_columns - at);
    const int64_t column = place.item.column + at;
    const bool packed = visit_packed<T>(place.grad, place.record.grad_dtype, place.p, [&](auto stored) {
      if constexpr (sizeof(T) == 4) sum_strip<Rule, decltype(stored)>(place, column, width, s, stage);
    });
    if (!packed) sum_strip_any<Rule, T>(place, column, width, s, stage);
  }
}

// What is left of pass 1 when all sums of a block of rows, a group of strips, a matrix are there.
template <class Rule, class T, class Scalars>
__device__ __noinline__ void finish_tile(const Place<Rule, T>& place, const Scalars& s, double* partial,
                                         bool* is_last) {
  const Partition& p = place.p;
  const Item& item = place.item;
  const int thread = threadIdx.x;
  uint32_t* const counters = place.counters + 2 + item.matrix * (p.n_row_blocks + p.n_groups + 1);
  if constexpr (kRows<Rule>) {
    if (last_of(counters + place.row_block(), p.n_groups, is_last)) {
      double states = 0.0;
      for (int row = thread; row < item.n_rows; row += kThreads) {
        const int64_t line = item.matrix * p.rows + item.row + row;
        const T* const sums = place.template at<T>(p.row_sums) + line * p.n_strips;
        double sum = 0.0;
        for (int strip = 0; strip < p.n_strips; ++strip) sum += sums[strip];
        T* const factors = place.template at<T>(p.row_factors) + line * Rule::kFactors;
        states += finish_line<Rule, T, Span::kRow>(place.record, line, static_cast<T>(sum / p.columns), factors, s);
      }
      if constexpr (Rule::kRowMean) {
        states = block_sum(states, partial);
        if (thread == 0)
          place.template at<double>(p.state_sums)[item.matrix * p.n_row_blocks + place.row_block()] = states;
      }
    }
  }
  if constexpr (kColumns<Rule>) {
    if (last_of(counters + p.n_row_blocks + place.group(), p.n_row_blocks, is_last)) {
      const T* const sums =
          place.template at<T>(p.column_sums) + item.matrix * p.n_row_blocks * p.columns + item.column;
      for (int column = thread; column < item.n_columns; column += kThreads) {
        double sum = 0.0;
#pragma unroll 8
        for (int block = 0; block < p.n_row_blocks; ++block) sum += sums[int64_t{block} * p.columns + column];
        const int64_t line = item.matrix * p.columns + item.column + column;
        T* const factors = place.template at<T>(p.column_factors) + line * Rule::kFactors;
        finish_line<Rule, T, Span::kColumn>(place.record, line, static_cast<T>(sum / p.rows), factors, s);
      }
    }
  }
  if constexpr (Rule::kRowMean) {
    if (last_of(counters + p.n_row_blocks + p.n_groups, int64_t{p.n_row_blocks} * p.n_groups, is_last)) {
      double sum = 0.0;
      const double* const sums = place.template at<double>(p.state_sums) + item.matrix * p.n_row_blocks;
      for (int block = thread; block < p.n_row_blocks; block += kThreads) sum += sums[block];
      sum = block_sum(sum, partial);
      if (thread == 0)
        place.template at<T>(p.matrix_factors)[item.matrix] = Rule::matrix(static_cast<T>(sum / p.rows), s);
    }
  }
}

// Whole small matrices: a team of one thread or a warp takes each.
template <class Rule, class T, class Scalars>
__device__ __noinline__ void sum_small(const Place<Rule, T>& place, const Scalars& scalars) {
  const auto s = scalars;
  const auto change = place.change;
  const Partition& p = place.p;
  const int team = p.team, lane = threadIdx.x % team;
  const int rows = static_cast<int>(p.rows), columns = static_cast<int>(p.columns);
  const auto square_at = [&](int64_t i) {
    return Rule::square(change(load_any<T>(place.grad, place.record.grad_dtype, i)), s);
  };
  for (int n = threadIdx.x / team; n < place.item.n_rows; n += kThreads / team) {
    const int64_t matrix = place.item.matrix + n, begin = matrix * rows * columns;
    if constexpr (kRows<Rule>) {
      double states = 0.0;
      for (int row = lane; row < rows; row += team) {
        T sum{};
        for (int column = 0; column < columns; ++column) sum += square_at(begin + row * columns + column);
        const int64_t line = matrix * rows + row;
        T* const factors = place.template at<T>(p.row_factors) + line * Rule::kFactors;
        states += finish_line<Rule, T, Span::kRow>(place.record, line, sum / static_cast<T>(columns), factors, s);
      }
      if constexpr (Rule::kRowMean) {
        for (int lanes = team / 2; lanes > 0; lanes /= 2) states += __shfl_xor_sync(0xffffffffu, states, lanes);
        if (lane == 0) place.template at<T>(p.matrix_factors)[matrix] = Rule::matrix(static_cast<T>(states / rows), s);
      }
    }
    if constexpr (kColumns<Rule>) {
      for (int column = lane; column < columns; column += team) {
        T sum{};
        for (int row = 0; row < rows; ++row) sum += square_at(begin + row * columns + column);
        const int64_t line = matrix * columns + column;
        T* const factors = place.template at<T>(p.column_factors) + line * Rule::kFactors;
        finish_line<Rule, T, Span::kColumn>(place.record, line, sum / static_cast<T>(rows), factors, s);
      }
    }
  }
}

// Squares of the parameter over a tile whose rows are whole packs: this thread's part of the sum.
template <class S>
__device__ __forceinline__ double sum_param_tile(const S* from, const Partition& p, const Item& item) {
  constexpr int kN = kVector<S>;
  const int64_t columns = p.columns;
  from += (item.matrix * p.rows + item.row) * columns + item.column;
  const Lanes to(columns, kN);
  constexpr int step = kWarp * kN;
  const int n_rows = item.n_rows, n_columns = item.n_columns;
  float sum = 0.0f;
  for (int row = threadIdx.x / kWarp * to.rows + to.row; row < n_rows; row += kWarps * to.rows) {
    for (int first = to.column; first < n_columns; first += 4 * step) {
      Pack<kN, S> packs[4] = {};  // zeros add nothing
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int column = first + u * step;
        if (column < n_columns) packs[u].load(from + row * columns + column);
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const float number = load<float>(packs[u].numbers[i]);
          sum += number * number;
        }
      }
    }
  }
  return sum;
}

// The same for any item.
template <class T>
__device__ __noinline__ double sum_param_any(const Record& record, const Partition& p, const Item& item) {
  T sum{};
  const auto add = [&](int64_t i) {
    const T number = load_any<T>(record.param, record.param_dtype, i);
    sum += number * number;
  };
  if (p.cut == Cut::kTiles) {
    const int pack = pack_of<T>(record.param_dtype, p);
    const Lanes to(p.columns, pack);
    for (int row = threadIdx.x / kWarp * to.rows + to.row; row < item.n_rows; row += kWarps * to.rows) {
      const int64_t begin = (item.matrix * p.rows + item.row + row) * p.columns + item.column;
      for (int first = to.column; first < item.n_columns; first += kWarp * pack) {
        for (int i = 0; i < pack; ++i) add(begin + first + i);
      }
    }
  } else {
    const int64_t begin = p.cut == Cut::kFlat ? item.column : item.matrix * p.rows * p.columns;
    const int n = p.cut == Cut::kFlat ? item.n_columns : static_cast<int>(item.n_rows * p.rows * p.columns);
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kThreads) add(begin + i);
  }
  return sum;
}

template <class T>
__device__ __forceinline__ double sum_param(const Record& record, const Partition& p, const Item& item) {
  double sum = 0.0;
  const bool packed = visit_packed<T>(record.param, record.param_dtype, p, [&](auto stored) {
    sum = sum_param_tile(static_cast<const decltype(stored)*>(record.param), p, item);
  });
  return packed ? sum : sum_param_any<T>(record, p, item);
}

}  // namespace fusedstep::cuda
