// Passes 2 and 3 of a rule that reduces: the sum of the squares of the update, and the update itself.
#pragma once

#include "reducing_context.cuh"

namespace fusedstep::cuda {

template <class Rule>
constexpr int kElementState = kStateIndex<Rule, Span::kElement>;

// Where the factors of a matrix's rows are, and what all of them are multiplied with.
template <class Rule, class T>
struct MatrixFactors {
  const T* of_rows;
  T of_matrix;

  __device__ __forceinline__ MatrixFactors(const ItemContext<Rule, T>& context, int64_t matrix, int64_t first_row) {
    if constexpr (kRows<Rule>)
      of_rows = context.template at<T>(context.p.row_factors) + (matrix * context.p.rows + first_row) * Rule::kFactors;
    if constexpr (Rule::kRowMean) of_matrix = context.template at<T>(context.p.matrix_factors)[matrix];
  }
};

// The factors of a row, the matrix's among them.
template <class Rule, class T>
struct RowFactors {
  T numbers[Rule::kFactors] = {};

  // The factors of one row, counted from the matrix's first.
  __device__ __forceinline__ RowFactors(const MatrixFactors<Rule, T>& matrix, int row) {
    if constexpr (kRows<Rule>) {
#pragma unroll
      for (int f = 0; f < Rule::kFactors; ++f) {
        numbers[f] = matrix.of_rows[row * Rule::kFactors + f];
        if constexpr (Rule::kRowMean) numbers[f] *= matrix.of_matrix;
      }
    }
  }
};

// The factors of an element from those of its row and of its column.
template <class Rule, class T>
__device__ __forceinline__ void times(const T* of_row, const T* of_column, T* factors) {
#pragma unroll
  for (int f = 0; f < Rule::kFactors; ++f)
    factors[f] = kRows<Rule> && kColumns<Rule> ? of_row[f] * of_column[f] : kRows<Rule> ? of_row[f] : of_column[f];
}

// The factors of a thread's columns in a tile whose rows are whole vectors.
template <class Rule, int kN>
struct ColumnFactors {
  Pack<kN * Rule::kFactors, float> factors;

  __device__ __forceinline__ ColumnFactors(const ItemContext<Rule, float>& context, const Tile& tile) {
    if constexpr (kColumns<Rule>) {
      const int64_t line = context.item.matrix * context.p.columns + tile.column;
      factors.load(context.template at<float>(context.p.column_factors) + line * Rule::kFactors);
    }
  }
  __device__ __forceinline__ const float* of(int i) const { return factors.numbers + i * Rule::kFactors; }
};

// Pass 2, rows of a tile whose rows are whole aligned vectors: this thread's part of the sum. All of them are asked for
// at once; without kWhole some are not there.
template <class Rule, class S, bool kWhole, class Change>
__device__ __forceinline__ float square_rows(const ItemContext<Rule, float>& context, const Tile& tile,
                                             const Change& change) {
  constexpr int kN = kVector<S>;
  const Partition& p = context.p;
  const Item& item = context.item;
  const int64_t begin = (item.matrix * p.rows + item.row + tile.row) * p.columns + tile.column;
  const int64_t stride = tile.rows_at_once * p.columns;
  const Rows<S> grads(const_cast<void*>(context.grad), begin, stride);
  const auto is_there = [&](int k) { return kWhole || tile.row + k * tile.rows_at_once < item.n_rows; };
  Pack<kN, S> grad[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    if constexpr (!kWhole) grad[k] = {};
    if (is_there(k)) grad[k].load(grads[k]);
  }
  const ColumnFactors<Rule, kN> of_columns(context, tile);
  const MatrixFactors<Rule, float> of_matrix(context, item.matrix, item.row);
  const auto s = *context.prepared();
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    if (!is_there(k)) continue;
    const RowFactors<Rule, float> of_row(of_matrix, tile.row + k * tile.rows_at_once);
    float g[kN];
    unpack(grad[k], g);
    change.template operator()<kN>(g);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      float factors[Rule::kFactors];
      times<Rule>(of_row.numbers, of_columns.of(i), factors);
      const float direction = Rule::direction(g[i], factors, s);
      total += direction * direction;
    }
  }
  return total;
}

template <class Rule, class S, class Change>
__device__ __forceinline__ double square_tile(const ItemContext<Rule, float>& context, const Change& change) {
  const Tile tile(context.p, context.item, kVector<S>);
  if (!tile.inside) return 0.0;
  if (tile.row + (kAhead - 1) * tile.rows_at_once < context.item.n_rows)
    return square_rows<Rule, S, true>(context, tile, change);
  return square_rows<Rule, S, false>(context, tile, change);
}

// The factors of element i of an item of small matrices.
template <class Rule, class T>
__device__ __forceinline__ void small_factors(const ItemContext<Rule, T>& context, int i, T* factors) {
  const uint32_t columns = static_cast<uint32_t>(context.p.columns), rows = static_cast<uint32_t>(context.p.rows);
  const uint32_t line = static_cast<uint32_t>(i) / columns, column = static_cast<uint32_t>(i) % columns;
  const int64_t matrix = context.item.matrix + line / rows;
  const RowFactors<Rule, T> of_row(MatrixFactors<Rule, T>(context, matrix, 0), static_cast<int>(line % rows));
  T of_column[Rule::kFactors] = {};
  if constexpr (kColumns<Rule>) {
#pragma unroll
    for (int f = 0; f < Rule::kFactors; ++f)
      of_column[f] = context.template at<T>(context.p.column_factors)[(matrix * columns + column) * Rule::kFactors + f];
  }
  times<Rule>(of_row.numbers, of_column, factors);
}

// Calls body(i, factors) for each of this thread's elements of an item of any kind, i counted through the tensor. Flat
// elements have no factors yet.
template <class Rule, class T, class Body>
__device__ __forceinline__ void for_elements(const ItemContext<Rule, T>& context, Body&& body) {
  const Partition& p = context.p;
  const Item& item = context.item;
  T factors[Rule::kFactors];
  if (p.cut == Cut::kFlat) {
    for (int n = threadIdx.x; n < item.n_columns; n += kReducingThreads) body(item.column + n, factors);
  } else if (p.cut == Cut::kSmall) {
    const int64_t first = item.matrix * p.rows * p.columns;
    const int elements = static_cast<int>(item.n_rows * p.rows * p.columns);
    for (int n = threadIdx.x; n < elements; n += kReducingThreads) {
      small_factors(context, n, factors);
      body(first + n, factors);
    }
  } else {
    const Tile tile(p, item, p.pack);
    const int64_t end = min(tile.column + p.pack, p.columns);
    const T* const of_columns = context.template at<T>(p.column_factors) + item.matrix * p.columns * Rule::kFactors;
    const MatrixFactors<Rule, T> of_matrix(context, item.matrix, item.row);
    for (int row = tile.row; row < item.n_rows && tile.inside; row += tile.rows_at_once) {
      const RowFactors<Rule, T> of_row(of_matrix, row);
      const int64_t first = (item.matrix * p.rows + item.row + row) * p.columns;
      for (int64_t column = tile.column; column < end; ++column) {
        times<Rule>(of_row.numbers, of_columns + column * Rule::kFactors, factors);
        body(first + column, factors);
      }
    }
  }
}

// Pass 2, an item of any kind, in the same order.
template <class Rule, class T>
__device__ __noinline__ double square_any(const ItemContext<Rule, T>& context, const GradChange<T>& changes) {
  const auto s = *context.prepared();
  const auto change = changes;
  const Record& record = context.record;
  const bool flat = kTakesFlat<Rule> && context.p.cut == Cut::kFlat;
  T total{};
  for_elements(context, [&](int64_t i, T* factors) {
    const T grad = change(load_any<T>(context.grad, record.grad_dtype, i));
    if (flat) {  // its states are for the last pass to write
      T states[kLineStates<Rule>];
      load_line<Rule, T, Span::kFlat>(record, i, states);
      Rule::line(Rule::square(grad, s), states, factors, s);
    }
    const T direction = Rule::direction(grad, factors, s);
    total += direction * direction;
  });
  return total;
}

// What is left of pass 2 for an item: the last block of its tensor finishes what depends on the sums.
template <class Rule, class T>
__device__ __forceinline__ void finish_update(const ItemContext<Rule, T>& context, double of_update,
                                              Shared<Rule>* shared) {
  const Partition& p = context.p;
  of_update = sum_lanes(of_update, kWarp);
  if (threadIdx.x % kWarp == 0) shared->partial[threadIdx.x / kWarp] = of_update;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0.0;
#pragma unroll
    for (int warp = 0; warp < kReducingWarps; ++warp) sum += shared->partial[warp];
    context.sums(1)[context.item.index] = sum;
  }
  if (!last_of(context.counters + 1, p.n_low, shared->flags)) return;
  double sum = 0.0;
#pragma unroll 8
  for (int i = threadIdx.x; i < p.n_low; i += kReducingThreads) sum += context.sums(1)[i];
  sum = block_sum(sum, shared->partial);
  if (threadIdx.x != 0) return;
  const double* const totals = context.template at<double>(p.totals);
  const int64_t n = context.record.numel;
  static_assert(sizeof(typename Rule::template Finish<T>) <= kFinishedBytes, "what a tensor has room for");
  *context.finished() = Rule::finish(*context.prepared(), root_mean(totals[0], n), root_mean(sum, n));
}

// What a step is to do beside the update: the general form, and the one in which there is nothing.
struct Beside {
  Changes changes;
  bool zero, write;
  float average_weight;

  __device__ __forceinline__ Beside(const Step& step)
      : changes(step),
        zero(step.zero_grads),
        write(step.write_grads),
        average_weight(static_cast<float>(step.average_weight)) {}
};
struct NothingBeside {
  Unchanged changes;

  __device__ __forceinline__ NothingBeside(const Step& step) : changes(step) {}
};

// kN numbers rounded to the stored format. A NaN stays one.
template <int kN, class S>
__device__ __forceinline__ void pack_numbers(const float* numbers, Pack<kN, S>* pack) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr bool kPairs = std::is_same_v<S, BF16>;
#else
  constexpr bool kPairs = false;
#endif
  if constexpr (kPairs) {
#pragma unroll
    for (int i = 0; i < kN; i += 2)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
          : "=r"(pack->vectors[i / 8].words[i % 8 / 2])
          : "f"(numbers[i + 1]), "f"(numbers[i]));
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) pack->numbers[i] = narrow<S>(numbers[i]);
  }
}

// The average and the copy of kN numbers, as the parameter is stored.
template <int kN, class P>
__device__ __forceinline__ void follow_pack(const Record& record, int64_t at, const Pack<kN, P>& param, float weight) {
  if (record.average != nullptr) {
    Pack<kN, float> average;
    float* const to = static_cast<float*>(record.average) + at;
    average.load(to);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float before = average.numbers[i];
      average.numbers[i] = before + weight * (load<float>(param.numbers[i]) - before);
    }
    average.store(to);
  }
  if (record.copy == nullptr) return;
#pragma unroll
  for (int i = 0; i < kN; ++i) store_any(record.copy, record.copy_dtype, at + i, load<float>(param.numbers[i]));
}

// How many rows of a tile a thread updates: as many as leave room for enough blocks. A low item is the work of several.
template <class Rule>
constexpr int kApplyAhead = kElementState<Rule> < 0 ? 4 : 2;
template <class Rule>
constexpr int kApplyBlocksPerItem = kAhead / kApplyAhead<Rule>;

// Pass 3, kApplyAhead rows from `row` on of a tile whose rows are whole aligned vectors: param and grad stored as P,
// the state of each element (if there is one) as S. All is asked for at once and looked up before anything is written;
// without kWhole some rows are not there.
template <class Rule, class P, class S, bool kWhole, class Does>
__device__ __forceinline__ void apply_rows(const ItemContext<Rule, float>& context, const Tile& tile, int row,
                                           const Does& does) {
  constexpr int kN = kVector<P>, kState = kElementState<Rule>, kRowsAtOnce = kApplyAhead<Rule>;
  constexpr bool kMore = std::is_same_v<Does, Beside>;
  const Record& record = context.record;
  const int n_rows = context.item.n_rows, rows_at_once = tile.rows_at_once;
  const int64_t begin =
      (context.item.matrix * context.p.rows + context.item.row + row) * context.p.columns + tile.column;
  const int64_t stride = rows_at_once * context.p.columns;
  const Rows<P> params(record.param, begin, stride), grads(const_cast<void*>(context.grad), begin, stride);
  const Rows<S> states(kState < 0 ? record.param : record.states[kState < 0 ? 0 : kState], begin, stride);
  const auto is_there = [&](int k) { return kWhole || row + k * rows_at_once < n_rows; };
  Pack<kN, P> param[kRowsAtOnce], grad[kRowsAtOnce];
  Pack<kN, S> state[kRowsAtOnce];
#pragma unroll
  for (int k = 0; k < kRowsAtOnce; ++k) {
    if (!is_there(k)) continue;
    param[k].load(params[k]);
    grad[k].load(grads[k]);
    if constexpr (kState >= 0) state[k].load(states[k]);
  }
  const ColumnFactors<Rule, kN> of_columns(context, tile);
  const MatrixFactors<Rule, float> of_matrix(context, context.item.matrix, context.item.row);
  const auto s = *context.prepared();
  const auto f = *context.finished();
  float of_rows[kRowsAtOnce][Rule::kFactors];
#pragma unroll
  for (int k = 0; k < kRowsAtOnce; ++k) {
    if (!is_there(k)) continue;
    const RowFactors<Rule, float> of_row(of_matrix, row + k * rows_at_once);
#pragma unroll
    for (int n = 0; n < Rule::kFactors; ++n) of_rows[k][n] = of_row.numbers[n];
  }
#pragma unroll
  for (int k = 0; k < kRowsAtOnce; ++k) {
    if (!is_there(k)) continue;
    float g[kN], numbers[kN], values[kN] = {};
    unpack(grad[k], g);
    unpack(param[k], numbers);
    if constexpr (kState >= 0) unpack(state[k], values);
    does.changes.template operator()<kN>(g);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      float factors[Rule::kFactors];
      times<Rule>(of_rows[k], of_columns.of(i), factors);
      Rule::update(numbers[i], g[i], factors, values[i], s, f);
    }
    pack_numbers(numbers, &param[k]);
    param[k].store(params[k]);
    if constexpr (kState >= 0) {
      pack_numbers(values, &state[k]);
      state[k].store(states[k]);
    }
    if constexpr (kMore) {
      P* const back = grads[k];
      if (does.zero) Pack<kN, P>{}.store(back);
      if (does.write) {
#pragma unroll
        for (int i = 0; i < kN; ++i) g[i] = g[i] * does.changes.sign;
        pack_numbers(g, &grad[k]);
        grad[k].store(back);
      }
      follow_pack(record, begin + k * stride, param[k], does.average_weight);
    }
  }
}

template <class Rule, class P, class S, class Does>
__device__ __forceinline__ void apply_tile(const ItemContext<Rule, float>& context, int part, const Does& does) {
  const Tile tile(context.p, context.item, kVector<P>);
  const int row = tile.row + part * kApplyAhead<Rule> * tile.rows_at_once;
  if (!tile.inside) return;
  if (row + (kApplyAhead<Rule> - 1) * tile.rows_at_once < context.item.n_rows)
    apply_rows<Rule, P, S, true>(context, tile, row, does);
  else
    apply_rows<Rule, P, S, false>(context, tile, row, does);
}

// Pass 3, an item of any kind, dtypes and alignment, one element at a time.
template <class Rule, class T>
__device__ __noinline__ void apply_any(const ItemContext<Rule, T>& context, const GradChange<T>& changes,
                                       T average_weight) {
  constexpr int kState = kElementState<Rule>;
  const auto s = *context.prepared();
  const auto f = *context.finished();
  const auto change = changes;
  const Record& record = context.record;
  [[maybe_unused]] const bool flat = context.p.cut == Cut::kFlat;
  for_elements(context, [&](int64_t i, T* factors) {
    const T grad = change(load_any<T>(context.grad, record.grad_dtype, i));
    if (change.zero) store_any(const_cast<void*>(context.grad), record.grad_dtype, i, T(0));
    if (change.write) store_any(const_cast<void*>(context.grad), record.grad_dtype, i, grad * change.sign);
    if constexpr (kTakesFlat<Rule>) {
      if (flat) finish_line<Rule, T, Span::kFlat>(record, i, Rule::square(grad, s), factors, s);
    }
    T param = load_any<T>(record.param, record.param_dtype, i), state{};
    if constexpr (kState >= 0) state = load_any<T>(record.states[kState], record.state_dtypes[kState], i);
    Rule::update(param, grad, factors, state, s, f);
    store_any(record.param, record.param_dtype, i, param);
    if constexpr (kState >= 0) store_any(record.states[kState], record.state_dtypes[kState], i, state);
    if (!record.has_followers()) return;
    param = load_any<T>(record.param, record.param_dtype, i);  // as it is stored
    if (T* const average = static_cast<T*>(record.average); average != nullptr) {
      const T before = global(average)[i];
      global(average)[i] = before + average_weight * (param - before);
    }
    if (record.copy != nullptr) store_any(record.copy, record.copy_dtype, i, param);
  });
}

}  // namespace fusedstep::cuda
