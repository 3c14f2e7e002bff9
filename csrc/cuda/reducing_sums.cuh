// Pass 1 of a rule that reduces: squares of gradients by rows and columns, squares of parameters; and what follows from
// them: states, factors, totals.
//
// A tile has one vector of columns for each thread of a row, and up to 64 rows for each thread. A thread sums its
// columns in a register each, a warp its part of a row by shuffles.
#pragma once

#include "reducing_context.cuh"

namespace fusedstep::cuda {

// The parts of a row's sum that this thread's warp has, for kAhead rows from `row` on.
template <class Rule, class T>
__device__ __forceinline__ void leave_rows(const ItemContext<Rule, T>& context, const Tile& tile, int row,
                                           const T* sums) {
  const Partition& p = context.p;
  const Item& item = context.item;
  const int64_t first_row = item.matrix * p.rows + item.row;
  const int lane = threadIdx.x % kWarp;
  if (tile.lanes >= kWarp) {
    const int64_t part = (item.column / p.pack + tile.lane) / kWarp;
    T mine{};
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const T sum = sum_lanes(sums[k], kWarp);
      if (lane == k) mine = sum;
    }
    row += lane * tile.rows_at_once;
    if (lane < kAhead && row < item.n_rows && part < p.n_parts)
      context.template at<T>(p.row_sums)[(first_row + row) * p.n_parts + part] = mine;
  } else {
#pragma unroll 1
    for (int k = 0; k < kAhead; ++k) {
      T mine{};
#pragma unroll
      for (int i = 0; i < kAhead; ++i) mine = i == k ? sums[i] : mine;
      mine = sum_lanes(mine, tile.lanes);
      const int to = row + k * tile.rows_at_once;
      if (tile.lane == 0 && to < item.n_rows) context.template at<T>(p.row_sums)[first_row + to] = mine;
    }
  }
}

// The sums of an item's columns, of which each thread has some for its rows; `stage` has room for all of them.
template <int kPack, class Rule, class T>
__device__ __forceinline__ void leave_columns(const ItemContext<Rule, T>& context, const Tile& tile, const T* sums,
                                              T* stage) {
  const Partition& p = context.p;
  const Item& item = context.item;
  const int pack = p.pack, strip = tile.lanes * pack;
  const int64_t block = item.matrix * p.n_row_blocks + item.row / p.tall_rows;
  T* const column_sums = context.template at<T>(p.column_sums) + block * p.columns + item.column;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (i < pack) stage[tile.row * strip + tile.lane * pack + i] = sums[i];
  }
  __syncthreads();
  for (int column = threadIdx.x; column < item.n_columns; column += kReducingThreads) {
    T sum = stage[column];
    for (int row = 1; row < tile.rows_at_once; ++row) sum += stage[row * strip + column];
    column_sums[column] = sum;
  }
}

// An item whose rows are whole aligned vectors, param and grad stored alike. Returns this thread's sum of the squares
// of the parameter.
template <class Rule, class S, class Change, class Scalars>
__device__ __forceinline__ double sum_tile(const ItemContext<Rule, float>& context, const Change& change,
                                           const Scalars& scalars, float* stage) {
  constexpr int kN = kVector<S>;
  const auto s = scalars;
  const Partition& p = context.p;
  const Item& item = context.item;
  const Tile tile(p, item, kN);
  const int n_rows = item.n_rows;
  const int64_t begin = (item.matrix * p.rows + item.row + tile.row) * p.columns + tile.column;
  const int64_t stride = tile.rows_at_once * p.columns;
  Rows<S> grads(const_cast<void*>(context.grad), begin, stride), params(context.record.param, begin, stride);
  float columns[kN] = {};
  double of_params = 0.0;
#pragma unroll 1
  for (int first = 0; first < n_rows; first += kAhead * tile.rows_at_once) {
    const int row = first + tile.row;
    Pack<kN, S> grad[kAhead], param[kAhead];
    if (tile.inside && row + (kAhead - 1) * tile.rows_at_once < n_rows) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        grad[k].load(grads[k]);
        if constexpr (Rule::kParamSum) param[k].load(params[k]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        grad[k] = param[k] = {};  // zeros add nothing
        if (tile.inside && row + k * tile.rows_at_once < n_rows) {
          grad[k].load(grads[k]);
          if constexpr (Rule::kParamSum) param[k].load(params[k]);
        }
      }
    }
    grads.first += kAhead * stride;
    params.first += kAhead * stride;
    float rows[kAhead], squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      float g[kN], numbers[kN];
      unpack(grad[k], g);
      if constexpr (Rule::kParamSum) unpack(param[k], numbers);
      change.template operator()<kN>(g);
      rows[k] = 0.0f;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const float square = Rule::square(g[i], s);
        columns[i] += square;
        rows[k] += square;
        if constexpr (Rule::kParamSum) squares += numbers[i] * numbers[i];
      }
    }
    if constexpr (Rule::kParamSum) of_params += static_cast<double>(squares);
    if constexpr (kRows<Rule>) leave_rows(context, tile, row, rows);
  }
  if constexpr (kColumns<Rule>) leave_columns<kN>(context, tile, columns, stage);
  return of_params;
}

// The same for an item of any dtypes, alignment and number of columns, in the same order.
template <class Rule, class T, class Scalars>
__device__ __noinline__ double sum_tile_any(const ItemContext<Rule, T>& context, const GradChange<T>& changes,
                                            const Scalars& scalars, T* stage) {
  const auto s = scalars;
  const auto change = changes;
  const Partition& p = context.p;
  const Item& item = context.item;
  const Record& record = context.record;
  const Tile tile(p, item, p.pack);
  const int n = tile.inside ? static_cast<int>(min(int64_t{p.pack}, p.columns - tile.column)) : 0;
  const int64_t begin = (item.matrix * p.rows + item.row) * p.columns + tile.column;
  T columns[kMostPack] = {};
  double of_params = 0.0;
#pragma unroll 1
  for (int first = tile.row; first < item.n_rows + tile.row; first += kAhead * tile.rows_at_once) {
    T rows[kAhead], squares{};
#pragma unroll
    for (int k = 0; k < kAhead; ++k) rows[k] = T{};
#pragma unroll 1
    for (int k = 0; k < kAhead; ++k) {
      const int row = first + k * tile.rows_at_once;
      if (row >= item.n_rows) break;
      T sum{};
#pragma unroll
      for (int i = 0; i < kMostPack; ++i) {
        if (i >= n) break;
        const int64_t at = begin + row * p.columns + i;
        const T square = Rule::square(change(load_any<T>(context.grad, record.grad_dtype, at)), s);
        columns[i] += square;
        sum += square;
        if constexpr (Rule::kParamSum) {
          const T number = load_any<T>(record.param, record.param_dtype, at);
          squares += number * number;
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) rows[i] = i == k ? sum : rows[i];
    }
    of_params += static_cast<double>(squares);
    if constexpr (kRows<Rule>) leave_rows(context, tile, first, rows);
  }
  if constexpr (kColumns<Rule>) leave_columns<kMostPack>(context, tile, columns, stage);
  return of_params;
}

// How many threads take the parts of a row's sum: few, so that many rows are finished at once.
__device__ __forceinline__ int lanes_of_row(const Partition& p) {
  int lanes = 8;
  while (lanes > 1 && lanes / 2 >= p.n_parts) lanes /= 2;
  return lanes;
}

// The sum of the first states of the rows of an item, of which this thread has some.
template <class Rule, class T>
__device__ __forceinline__ void leave_states(const ItemContext<Rule, T>& context, double states, double* partial) {
  const Partition& p = context.p;
  states = block_sum(states, partial);
  if (threadIdx.x == 0)
    context.template at<double>(p.state_sums)[context.item.matrix * p.n_row_blocks + context.item.row / p.tall_rows] =
        states;
}

// Rows of an item, whose parts are all there: what becomes of their sums.
template <class Context, class Scalars>
__device__ __forceinline__ void finish_rows(const Context& context, const Scalars& s, double* partial) {
  using Rule = typename Context::RuleType;
  using T = typename Context::Number;
  const Partition& p = context.p;
  const Item& item = context.item;
  const int lanes = lanes_of_row(p), lane = threadIdx.x % lanes, rows_at_once = kReducingThreads / lanes;
  double states = 0.0;
  for (int first = 0; first < item.n_rows; first += rows_at_once) {
    const int row = first + threadIdx.x / lanes;
    const int64_t line = item.matrix * p.rows + item.row + row;
    double sum = 0.0;
    if (row < item.n_rows) {
      const T* const sums = context.template at<T>(p.row_sums) + line * p.n_parts;
#pragma unroll 4
      for (int part = lane; part < p.n_parts; part += lanes) sum += static_cast<double>(sums[part]);
    }
    sum = sum_lanes(sum, lanes);
    if (lane == 0 && row < item.n_rows) states += finish_row(context, line, sum, p.columns, s);
  }
  if constexpr (Rule::kRowMean && !Context::kIsPart) leave_states(context, states, partial);
}

// A matrix whose rows are all there.
template <class Context, class Scalars>
__device__ __forceinline__ void finish_matrix(const Context& context, const Scalars& s, double* partial) {
  const Partition& p = context.p;
  const double* const sums = context.template at<double>(p.state_sums) + context.item.matrix * p.n_row_blocks;
  double sum = 0.0;
  for (int block = threadIdx.x; block < p.n_row_blocks; block += kReducingThreads) sum += sums[block];
  sum = block_sum(sum, partial);
  if (threadIdx.x == 0) finish_rows_of(context, context.item.matrix, sum, p.rows, s);
}

// Columns of an item from n sums of each, which lie a row of the tensor apart: what becomes of them, or, if these are
// not all, their sum.
template <class Context, class S, class Scalars>
__device__ __forceinline__ void finish_columns(const Context& context, const S* sums, int n, double* unfinished,
                                               const Scalars& s) {
  const Partition& p = context.p;
  const Item& item = context.item;
  for (int column = threadIdx.x; column < item.n_columns; column += kReducingThreads) {
    double sum = 0.0;
#pragma unroll 8
    for (int i = 0; i < n; ++i) sum += static_cast<double>(sums[i * p.columns + column]);
    if (unfinished != nullptr)
      unfinished[column] = sum;
    else
      finish_column(context, item.matrix * p.columns + item.column + column, sum, p.rows, s);
  }
}

// What is left of pass 1 for an item, when its sums are there: whichever block is the last of its rows, of its columns
// or of its tensor finishes them. `prepare` leaves the scalars, known to all threads.
template <class Context, class Rule, class Prepare>
__device__ __forceinline__ void finish_item(const Context& context, double of_params, Shared<Rule>* shared,
                                            const Prepare& prepare) {
  using T = typename Context::Number;
  const Partition& p = context.p;
  const Item& item = context.item;
  const bool tiles = p.cut == Cut::kTiles;
  const int row_block = tiles ? static_cast<int>(item.row / p.tall_rows) : 0, band = row_block / kBand;
  const int strip = tiles ? static_cast<int>(item.column / (p.lanes * p.pack)) : 0;
  const int in_band = min(kBand, p.n_row_blocks - band * kBand);
  uint32_t* const of_matrix = context.counters + 2 + item.matrix * counters_of_matrix(p);
  uint32_t* const of_bands = of_matrix + p.n_row_blocks;
  uint32_t* const of_strips = of_bands + int64_t{p.n_bands} * p.n_strips;

  if constexpr (Rule::kParamSum) {
    of_params = sum_lanes(of_params, kWarp);
    if (threadIdx.x % kWarp == 0) shared->partial[threadIdx.x / kWarp] = of_params;
  }
  __syncthreads();  // what the block has written is there
  if (threadIdx.x < 3) {
    uint32_t* counter = context.counters;
    int64_t n = p.n_tall;
    bool counts = Rule::kParamSum;
    if (threadIdx.x == 0) {
      if constexpr (Rule::kParamSum) {
        double sum = 0.0;
#pragma unroll
        for (int warp = 0; warp < kReducingWarps; ++warp) sum += shared->partial[warp];
        context.sums(0)[item.index] = sum;
      }
    } else if (threadIdx.x == 1) {
      counter = of_matrix + row_block, n = p.n_strips, counts = tiles && kRows<Rule>;
    } else {
      counter = of_bands + int64_t{band} * p.n_strips + strip, n = in_band, counts = tiles && kColumns<Rule>;
    }
    fence();
    shared->flags[threadIdx.x] = counts && count(counter, n);
  }
  __syncthreads();
  const bool last = shared->flags[0] != 0, rows = shared->flags[1] != 0, columns = shared->flags[2] != 0;
  const bool first = item.index == 0;
  if (!last && !rows && !columns && !first) return;
  fence();  // now what others have written can be read

  prepare();
  const auto& s = pick<T>(shared->scalars);
  if (first && threadIdx.x == 0) *context.prepared() = s;
  if constexpr (Rule::kParamSum) {
    if (last) {
      double sum = 0.0;
#pragma unroll 8
      for (int i = threadIdx.x; i < p.n_tall; i += kReducingThreads) sum += context.sums(0)[i];
      sum = block_sum(sum, shared->partial);
      if (threadIdx.x == 0) finish_param(context, sum);
    }
  }
  if constexpr (kRows<Rule>) {
    if (rows) {
      finish_rows(context, s, shared->partial);
      if constexpr (Rule::kRowMean && !Context::kIsPart) {
        if (last_of(of_strips + p.n_strips, p.n_row_blocks, shared->flags + 3))
          finish_matrix(context, s, shared->partial);
      }
    }
  }
  if constexpr (kColumns<Rule>) {
    if (columns) {
      const T* const sums = context.template at<T>(p.column_sums) +
                            (item.matrix * p.n_row_blocks + int64_t{band} * kBand) * p.columns + item.column;
      double* const bands =
          context.template at<double>(p.band_sums) + item.matrix * p.n_bands * p.columns + item.column;
      finish_columns(context, sums, in_band, p.n_bands == 1 ? nullptr : bands + band * p.columns, s);
      if (p.n_bands > 1 && last_of(of_strips + strip, p.n_bands, shared->flags + 3))
        finish_columns(context, bands, p.n_bands, nullptr, s);
    }
  }
}

// The lines of whole small matrices: a team of one thread or a warp takes each. of_row(matrix, row, line) returns the
// first of a row's states, of_matrix gets the sum of these.
template <class Rule, class T, class OfRow, class OfMatrix, class OfColumn>
__device__ __forceinline__ void for_small_lines(const ItemContext<Rule, T>& context, OfRow&& of_row,
                                                OfMatrix&& of_matrix, OfColumn&& of_column) {
  const Partition& p = context.p;
  const int team = p.team, lane = threadIdx.x % team;
  const int rows = static_cast<int>(p.rows), columns = static_cast<int>(p.columns);
  for (int n = threadIdx.x / team; n < context.item.n_rows; n += kReducingThreads / team) {
    const int64_t matrix = context.item.matrix + n;
    if constexpr (kRows<Rule>) {
      double states = 0.0;
      for (int row = lane; row < rows; row += team) states += of_row(matrix, row, matrix * rows + row);
      if constexpr (Rule::kRowMean) {
        for (int lanes = team / 2; lanes > 0; lanes /= 2) states += __shfl_xor_sync(0xffffffffu, states, lanes);
        if (lane == 0) of_matrix(matrix, states);
      }
    }
    if constexpr (kColumns<Rule>) {
      for (int column = lane; column < columns; column += team) of_column(matrix, column, matrix * columns + column);
    }
  }
}

// Their sums.
template <class Context, class Scalars>
__device__ __noinline__ void sum_small(const Context& context, const GradChange<typename Context::Number>& changes,
                                       const Scalars& scalars) {
  using Rule = typename Context::RuleType;
  using T = typename Context::Number;
  const auto s = scalars;
  const auto change = changes;
  const int rows = static_cast<int>(context.p.rows), columns = static_cast<int>(context.p.columns);
  const auto square_at = [&](int64_t i) {
    return Rule::square(change(load_any<T>(context.grad, context.record.grad_dtype, i)), s);
  };
  for_small_lines(
      context,
      [&](int64_t matrix, int row, int64_t line) {
        const int64_t begin = matrix * rows * columns;
        T sum{};
        for (int column = 0; column < columns; ++column) sum += square_at(begin + row * columns + column);
        return finish_row(context, line, sum, columns, s);
      },
      [&](int64_t matrix, double states) {
        if constexpr (Rule::kRowMean && !Context::kIsPart) finish_rows_of(context, matrix, states, rows, s);
      },
      [&](int64_t matrix, int column, int64_t line) {
        const int64_t begin = matrix * rows * columns;
        T sum{};
        for (int row = 0; row < rows; ++row) sum += square_at(begin + row * columns + column);
        finish_column(context, line, sum, rows, s);
      });
}

// Squares of the parameter over an item that is no tile: this thread's part of the sum.
template <class Rule, class T>
__device__ __forceinline__ double sum_param(const ItemContext<Rule, T>& context) {
  const Partition& p = context.p;
  const Item& item = context.item;
  const int64_t begin = p.cut == Cut::kFlat ? item.column : item.matrix * p.rows * p.columns;
  const int n = p.cut == Cut::kFlat ? item.n_columns : static_cast<int>(item.n_rows * p.rows * p.columns);
  T sum{};
#pragma unroll 4
  for (int i = threadIdx.x; i < n; i += kReducingThreads) {
    const T number = load_any<T>(context.record.param, context.record.param_dtype, begin + i);
    sum += number * number;
  }
  return sum;
}

}  // namespace fusedstep::cuda
