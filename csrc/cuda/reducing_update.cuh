// Passes 2 and 3 of a rule that reduces: the sum of the squares of the update, and the update itself.
#pragma once

#include "reducing_place.cuh"

namespace fusedstep::cuda {

// The factors of an element from those of its row, its column and its matrix.
template <class Rule, class T>
struct RowFactors {
  T numbers[Rule::kFactors];

  // Of row `row` of matrix `matrix`.
  __device__ __forceinline__ RowFactors(const Place<Rule, T>& place, int64_t matrix, int64_t row) {
    if constexpr (kRows<Rule>) {
      const T* const factors =
          place.template at<T>(place.p.row_factors) + (matrix * place.p.rows + row) * Rule::kFactors;
#pragma unroll
      for (int f = 0; f < Rule::kFactors; ++f) {
        numbers[f] = factors[f];
        if constexpr (Rule::kRowMean) numbers[f] *= place.template at<T>(place.p.matrix_factors)[matrix];
      }
    }
  }
  __device__ __forceinline__ void times(const T* of_column, T* factors) const {
#pragma unroll
    for (int f = 0; f < Rule::kFactors; ++f)
      factors[f] = kRows<Rule> && kColumns<Rule> ? numbers[f] * of_column[f] : kRows<Rule> ? numbers[f] : of_column[f];
  }
};

// The column factors of a thread's columns in a strip.
template <class Rule, class T, int kN>
struct ColumnFactors {
  T numbers[kPerLane][Rule::kFactors];

  __device__ __forceinline__ ColumnFactors(const Place<Rule, T>& place, int64_t first_column, int width,
                                           const Lanes& to) {
    if constexpr (kColumns<Rule>) {
      const T* const factors = place.template at<T>(place.p.column_factors) +
                               (place.item.matrix * place.p.columns + first_column) * Rule::kFactors;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        const int column = to.column + k / kN * kWarp * kN + k % kN;
#pragma unroll
        for (int f = 0; f < Rule::kFactors; ++f)
          numbers[k][f] = column < width ? factors[int64_t{column} * Rule::kFactors + f] : T{};
      }
    }
  }
};

// The factors of element i of an item of small matrices.
template <class Rule, class T>
__device__ __forceinline__ void small_factors(const Place<Rule, T>& place, int i, T* factors) {
  const uint32_t columns = static_cast<uint32_t>(place.p.columns), rows = static_cast<uint32_t>(place.p.rows);
  const uint32_t line = static_cast<uint32_t>(i) / columns, column = static_cast<uint32_t>(i) % columns;
  const int64_t matrix = place.item.matrix + line / rows;
  const RowFactors<Rule, T> of_row(place, matrix, line % rows);
  T of_column[Rule::kFactors] = {};
  if constexpr (kColumns<Rule>) {
#pragma unroll
    for (int f = 0; f < Rule::kFactors; ++f)
      of_column[f] = place.template at<T>(place.p.column_factors)[(matrix * columns + column) * Rule::kFactors + f];
  }
  of_row.times(of_column, factors);
}

// Pass 2, one strip of an item whose rows are whole packs: this thread's part of the sum.
template <class Rule, class S, class Scalars>
__device__ __forceinline__ float square_strip(const Place<Rule, float>& place, int64_t first_column, int width,
                                              const Scalars& scalars) {
  constexpr int kN = kVector<S>, kPacks = kPerLane / kN, kAtOnce = 8 / kPacks;
  const auto s = scalars;
  const auto change = place.change;
  const Partition& p = place.p;
  const Item& item = place.item;
  const Lanes to(p.columns, kN);
  const ColumnFactors<Rule, float, kN> of_columns(place, first_column, width, to);
  const int n_rows = item.n_rows;
  const int64_t columns = p.columns;
  const S* const grads = static_cast<const S*>(place.grad) + (item.matrix * p.rows + item.row) * columns + first_column;
  float total = 0.0f;
  for (int first = threadIdx.x / kWarp * to.rows + to.row; first < n_rows; first += kWarps * to.rows * kAtOnce) {
    Pack<kN, S> packs[kAtOnce][kPacks] = {};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int row = first + u * kWarps * to.rows;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int column = to.column + k * kWarp * kN;
        if (row < n_rows && column < width) packs[u][k].load(grads + row * columns + column);
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int row = first + u * kWarps * to.rows;
      const RowFactors<Rule, float> of_row(place, item.matrix, item.row + (row < n_rows ? row : 0));
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const bool is_there = row < n_rows && to.column + k * kWarp * kN < width;
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          float factors[Rule::kFactors];
          of_row.times(of_columns.numbers[k * kN + i], factors);
          const float direction = Rule::direction(change(load<float>(packs[u][k].numbers[i])), factors, s);
          total += is_there ? direction * direction : 0.0f;
        }
      }
    }
  }
  return total;
}

// Calls body(i, factors) for each of this thread's elements of an item, i counted through the tensor. Flat elements
// have no factors yet.
template <class Rule, class T, class Body>
__device__ __forceinline__ void for_elements(const Place<Rule, T>& place, int pack, Body&& body) {
  const Partition& p = place.p;
  const Item& item = place.item;
  T factors[Rule::kFactors];
  if (p.cut == Cut::kFlat) {
    for (int n = threadIdx.x; n < item.n_columns; n += kThreads) body(item.column + n, factors);
  } else if (p.cut == Cut::kSmall) {
    const int64_t first = item.matrix * p.rows * p.columns;
    const int elements = static_cast<int>(item.n_rows * p.rows * p.columns);
    for (int n = threadIdx.x; n < elements; n += kThreads) {
      small_factors(place, n, factors);
      body(first + n, factors);
    }
  } else {
    const Lanes to(p.columns, pack);
    const T* const of_columns =
        place.template at<T>(p.column_factors) + (item.matrix * p.columns + item.column) * Rule::kFactors;
    for (int row = threadIdx.x / kWarp * to.rows + to.row; row < item.n_rows; row += kWarps * to.rows) {
      const RowFactors<Rule, T> of_row(place, item.matrix, item.row + row);
      const int64_t first = (item.matrix * p.rows + item.row + row) * p.columns + item.column;
      for (int begin = to.column; begin < item.n_columns; begin += kWarp * pack) {
        for (int column = begin; column < begin + pack; ++column) {
          of_row.times(of_columns + int64_t{column} * Rule::kFactors, factors);
          body(first + column, factors);
        }
      }
    }
  }
}

// Pass 2, an item of any kind.
template <class Rule, class T, class Scalars>
__device__ __noinline__ double square_any(const Place<Rule, T>& place, const Scalars& scalars) {
  const auto s = scalars;
  const auto change = place.change;
  const Record& record = place.record;
  const bool flat = kTakesFlat<Rule> && place.p.cut == Cut::kFlat;
  T total{};
  for_elements(place, pack_of<T>(record.grad_dtype, place.p), [&](int64_t i, T* factors) {
    const T grad = change(load_any<T>(place.grad, record.grad_dtype, i));
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

// Pass 2 for an item: this thread's part of the sum.
template <class Rule, class T, class Scalars>
__device__ __forceinline__ double square_item(const Place<Rule, T>& place, const Scalars& s) {
  double total = 0.0;
  const bool packed = visit_packed<T>(place.grad, place.record.grad_dtype, place.p, [&](auto stored) {
    if constexpr (sizeof(T) == 4) {
      for (int at = 0; at < place.item.n_columns; at += place.p.strip) {
        const int width = min(place.p.strip, place.item.n_columns - at);
        total += square_strip<Rule, decltype(stored)>(place, place.item.column + at, width, s);
      }
    }
  });
  return packed ? total : square_any<Rule, T>(place, s);
}

template <class Rule>
constexpr int kElementState = kPlace<Rule, Span::kElement>;

// Pass 3, one strip of an item, by 16-byte accesses: param and grad stored as P, the state of each element (if there is
// one) as S, all aligned, and rows made of whole packs.
template <class Rule, class P, class S, class Scalars, class Finish>
__device__ __forceinline__ void apply_strip(const Place<Rule, float>& place, int64_t first_column, int width,
                                            const Scalars& scalars, const Finish& finish) {
  constexpr int kN = kVector<P>, kState = kElementState<Rule>;
  constexpr int kPacks = kState < 0 ? kPerLane / kN : sizeof(P) == 2 ? 1 : 2;  // read before the first is written
  const auto s = scalars;
  const auto f = finish;
  const auto change = place.change;
  const Partition& p = place.p;
  const Item& item = place.item;
  const Lanes to(p.columns, kN);
  const ColumnFactors<Rule, float, kN> of_columns(place, first_column, width, to);
  const int n_rows = item.n_rows;
  const int64_t columns = p.columns, begin = (item.matrix * p.rows + item.row) * columns + first_column;
  P* const params = static_cast<P*>(place.record.param) + begin;
  const P* const grads = static_cast<const P*>(place.grad) + begin;
  S* const states = kState < 0 ? nullptr : static_cast<S*>(place.record.states[kState < 0 ? 0 : kState]) + begin;
  for (int row = threadIdx.x / kWarp * to.rows + to.row; row < n_rows; row += kWarps * to.rows) {
    const RowFactors<Rule, float> of_row(place, item.matrix, item.row + row);
    const int64_t at = row * columns;
#pragma unroll
    for (int first = 0; first < kPerLane / kN; first += kPacks) {
      Pack<kN, P> param[kPacks], grad[kPacks];
      Pack<kN, S> state[kPacks];
#pragma unroll
      for (int u = 0; u < kPacks; ++u) {
        const int column = to.column + (first + u) * kWarp * kN;
        if (column >= width) continue;
        param[u].load(params + at + column);
        grad[u].load(grads + at + column);
        if constexpr (kState >= 0) state[u].load(states + at + column);
      }
#pragma unroll
      for (int u = 0; u < kPacks; ++u) {
        const int column = to.column + (first + u) * kWarp * kN;
        if (column >= width) continue;
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          float factors[Rule::kFactors];
          of_row.times(of_columns.numbers[(first + u) * kN + i], factors);
          float number = load<float>(param[u].numbers[i]), value = 0.0f;
          if constexpr (kState >= 0) value = load<float>(state[u].numbers[i]);
          const float g = change(load<float>(grad[u].numbers[i]));
          if (change.write) grad[u].numbers[i] = narrow<P>(g * change.sign);
          Rule::update(number, g, factors, value, s, f);
          param[u].numbers[i] = narrow<P>(number);
          if constexpr (kState >= 0) state[u].numbers[i] = narrow<S>(value);
        }
        param[u].store(params + at + column);
        if (change.zero) Pack<kN, P>{}.store(const_cast<P*>(grads) + at + column);
        if (change.write) grad[u].store(const_cast<P*>(grads) + at + column);
        if constexpr (kState >= 0) state[u].store(states + at + column);
      }
    }
  }
}

// Pass 3, an item of any kind, dtypes and alignment, one element at a time.
template <class Rule, class T, class Scalars, class Finish>
__device__ __noinline__ void apply_any(const Place<Rule, T>& place, const Scalars& scalars, const Finish& finish) {
  constexpr int kState = kElementState<Rule>;
  const auto s = scalars;
  const auto f = finish;
  const auto change = place.change;
  const Record& record = place.record;
  [[maybe_unused]] const bool flat = place.p.cut == Cut::kFlat;
  for_elements(place, 1, [&](int64_t i, T* factors) {
    const T grad = change(load_any<T>(place.grad, record.grad_dtype, i));
    if (change.zero) store_any(const_cast<void*>(place.grad), record.grad_dtype, i, T(0));
    if (change.write) store_any(const_cast<void*>(place.grad), record.grad_dtype, i, grad * change.sign);
    if constexpr (kTakesFlat<Rule>) {
      if (flat) finish_line<Rule, T, Span::kFlat>(record, i, Rule::square(grad, s), factors, s);
    }
    T param = load_any<T>(record.param, record.param_dtype, i), state{};
    if constexpr (kState >= 0) state = load_any<T>(record.states[kState], record.state_dtypes[kState], i);
    Rule::update(param, grad, factors, state, s, f);
    store_any(record.param, record.param_dtype, i, param);
    if constexpr (kState >= 0) store_any(record.states[kState], record.state_dtypes[kState], i, state);
  });
}

// Pass 3 for an item.
template <class Rule, class T, class Scalars, class Finish>
__device__ __forceinline__ void apply_item(const Place<Rule, T>& place, const Scalars& s, const Finish& f) {
  constexpr int kState = kElementState<Rule>;
  const Record& record = place.record;
  uint64_t bits = reinterpret_cast<uint64_t>(record.param) | reinterpret_cast<uint64_t>(place.grad);
  bool same = record.grad_dtype == record.param_dtype, wide = true;
  if constexpr (kState >= 0) {
    bits |= reinterpret_cast<uint64_t>(record.states[kState]);
    wide = record.state_dtypes[kState] == Dtype::kF32;
    same = same && (wide || record.state_dtypes[kState] == record.param_dtype);
  }
  bool packed = false;
  if (same) {
    packed = visit_packed<T>(reinterpret_cast<const void*>(bits), record.param_dtype, place.p, [&](auto stored) {
      if constexpr (sizeof(T) == 4) {
        using P = decltype(stored);
        for (int at = 0; at < place.item.n_columns; at += place.p.strip) {
          const int width = min(place.p.strip, place.item.n_columns - at);
          const int64_t column = place.item.column + at;
          if (wide)
            apply_strip<Rule, P, float>(place, column, width, s, f);
          else if constexpr (kState >= 0 && sizeof(P) == 2)
            apply_strip<Rule, P, P>(place, column, width, s, f);
        }
      }
    });
  }
  if (!packed) apply_any<Rule, T>(place, s, f);
}

}  // namespace fusedstep::cuda
