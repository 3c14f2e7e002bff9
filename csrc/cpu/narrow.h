// Blocks of narrow matrices, whose rows are no longer than the lanes that one is summed in. Row by row most of the time
// would go into what is done once for each; here it is done for as many of them at once as a pack has lanes.
#pragma once

#include <utility>

#include "reducing_parts.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

FUSEDSTEP_FN bool is_narrow(const Matrices& m) {
  return m.columns <= kStep<float>;
}

// How the numbers of narrow rows are taken: each row as the lanes of some packs, with zeros behind its numbers; or
// several rows as they lie in one.
template <int kPacksOfRow, int kRowsOfPack>
struct NarrowShape {
  static constexpr int kPacks = kPacksOfRow, kRows = kRowsOfPack, kColumns = kLanes<float> / kRowsOfPack;
};
// Calls visit(the shape of a matrix that is narrow).
template <class Visit>
FUSEDSTEP_FN void visit_shape(const Matrices& m, const Visit& visit) {
  if constexpr (kLanes<float> >= 8)
    if (2 * m.columns == kLanes<float>) return visit(NarrowShape<1, 2>{});
  if constexpr (kLanes<float> >= 16)
    if (4 * m.columns == kLanes<float>) return visit(NarrowShape<1, 4>{});
  if (m.columns <= kLanes<float>) return visit(NarrowShape<1, 1>{});
  if constexpr (kSplit<float> >= 2)
    if (m.columns <= 2 * kLanes<float>) return visit(NarrowShape<2, 1>{});
  if constexpr (kSplit<float> >= 4) visit(NarrowShape<4, 1>{});
}

// The numbers of up to kRowBlock narrow rows, one row after the other, with others behind them that may be read too.
class NarrowRows {
 public:
  // Calls visit(the numbers of `rows` rows from element `at` on, each as `change` makes it): where they lie, or in
  // fp32.
  template <class Numbers, class Change, class Visit>
  FUSEDSTEP_FN void visit(const Numbers& numbers, const Record& record, int64_t columns, int64_t at, int64_t rows,
                          const Change& change, bool changes, const Visit& visit) {
    const int64_t n = rows * columns;
    if constexpr (!std::is_same_v<Numbers, AnyStored<float>>) {
      if (!changes && rows % kLanes<float> == 0 && at + n + kStep<float> <= record.numel)
        return visit(numbers.data + at);
    }
    for_packs<float>(n, [&](int64_t i, int, auto size) FUSEDSTEP_INLINE {
      store_at(plain(buffer_), i, change(load_at(numbers, at + i, size)), size);
    });
    // Rows that only fill up a pack's lanes.
    for (int64_t i = n; i < kNumbers && i < n + kLanes<float> * columns; ++i) buffer_[i] = 0.0f;
    visit(static_cast<const float*>(buffer_));
  }

 private:
  static constexpr int64_t kNumbers = (kRowBlock + 1) * kStep<float>;
  alignas(64) float buffer_[kNumbers];
};

// Takes the packs of narrow rows one after the other.
template <class Shape, class S>
class NarrowPacks {
 public:
  FUSEDSTEP_FN NarrowPacks(const S* data, int64_t columns) : at_(data), columns_(columns) {
    for (int w = 0; w < Shape::kPacks; ++w)
      for (int i = 0; i < kLanes<float>; ++i) mask_[w][i] = w * kLanes<float> + i < columns ? 0xffffffffu : 0u;
  }
  FUSEDSTEP_FN FloatPack load(int w) const {
    const S* const from = at_ + w * kLanes<float>;
    if constexpr (sizeof(S) != sizeof(float)) return kept(load_pack<float, S>(from), w);
    FloatPack x;  // in one load, which load_pack's is not
    __builtin_memcpy(&x, from, sizeof(x));
    return kept(x, w);
  }
  // Zeros in place of the next row's numbers.
  FUSEDSTEP_FN FloatPack kept(FloatPack x, int w) const {
    return Shape::kRows > 1 ? x : (FloatPack)((WordPack)x & mask_[w]);
  }
  FUSEDSTEP_FN void next() { at_ += Shape::kRows > 1 ? kLanes<float> : columns_; }

 private:
  const S* at_;
  const int64_t columns_;
  WordPack mask_[Shape::kPacks];
};

// Adds the rows of a pack, one after the other, to the first of its lanes.
template <class Shape, int kRow = 0, size_t... i>
FUSEDSTEP_FN void add_rows(FloatPack& sums, FloatPack x, std::index_sequence<i...> lanes) {
  sums += x;
  if constexpr (kRow + 1 < Shape::kRows)
    add_rows<Shape, kRow + 1>(sums, __builtin_shufflevector(x, x, ((i + Shape::kColumns) % sizeof...(i))...), lanes);
}

FUSEDSTEP_FN void store_first(float* to, FloatPack numbers, int64_t n) {
  if (n >= kLanes<float>)
    store_pack<float, float>(to, numbers);
  else
    plain(to).store_part(0, n, numbers);
}

// The squares of gradients in up to kRowBlock narrow rows, that begin a row block: summed by row and column.
template <class Rule, class Shape, class S>
FUSEDSTEP_OUT_OF_LINE void sum_narrow_squares(const typename Rule::template Scalars<float>& scalars, const S* grads,
                                              int64_t rows, int64_t columns, float* row_sums, float* column_sums) {
  const auto s = scalars;
  NarrowPacks<Shape, S> numbers(grads, columns);
  [[maybe_unused]] FloatPack of_columns[Shape::kPacks] = {};
  for (int64_t row = 0; row < rows; row += kLanes<float>) {
    const FloatPack of_rows = Totals<Shape::kRows>::of([&](auto) FUSEDSTEP_INLINE {
      FloatPack squares[Shape::kPacks];
      for (int w = 0; w < Shape::kPacks; ++w) {
        squares[w] = Rule::square(numbers.load(w), s);
        if constexpr (kColumns<Rule>)
          add_rows<Shape>(of_columns[w], squares[w], std::make_index_sequence<kLanes<float>>{});
      }
      numbers.next();
      return Lanes<float>::folded(squares);
    });
    if constexpr (kRows<Rule>) store_first(row_sums + row, of_rows, rows - row);
  }
  for (int64_t j = 0; kColumns<Rule> && j < columns; ++j)
    column_sums[j] = of_columns[j / kLanes<float>][j % kLanes<float>];
}

// Adds the sum of each row's squares.
template <class Shape, class S>
FUSEDSTEP_OUT_OF_LINE void add_narrow_squares(const S* params, int64_t rows, int64_t columns, SumInOrder* total) {
  NarrowPacks<Shape, S> numbers(params, columns);
  alignas(64) float of_rows[kRowBlock];
  for (int64_t row = 0; row < rows; row += kLanes<float>) {
    const FloatPack sums = Totals<Shape::kRows>::of([&](auto) FUSEDSTEP_INLINE {
      FloatPack squares[Shape::kPacks];
      for (int w = 0; w < Shape::kPacks; ++w) {
        const FloatPack p = numbers.load(w);
        squares[w] = p * p;
      }
      numbers.next();
      return Lanes<float>::folded(squares);
    });
    store_pack<float, float>(of_rows + row, sums);
  }
  total->add(of_rows, rows);
}

template <class Rule, class Shape, class Param, class Grad>
void sum_narrow(const Context<Rule, float>& context, const Block<Rule, float>& block, int64_t index, const Param& param,
                const Grad& grad) {
  const Record& record = context.record();
  const GradChange<float> change = context.change();
  const int64_t columns = block.m.columns;
  NarrowRows buffer;
  [[maybe_unused]] SumInOrder sum;
  for (int64_t row = 0; row < block.tile.rows; row += kRowBlock) {
    const int64_t left = block.tile.rows - row, rows = left < kRowBlock ? left : kRowBlock;
    const int64_t at = block.at + row * columns;
    buffer.visit(grad, record, columns, at, rows, change, change.any, [&](const auto* grads) {
      sum_narrow_squares<Rule, Shape>(context.scalars, grads, rows, columns, block.row_sums() + row,
                                      block.column_sums(row));
    });
    if constexpr (Rule::kParamSum) {
      const auto same = [](FloatPack x) FUSEDSTEP_INLINE { return x; };
      buffer.visit(param, record, columns, at, rows, same, false,
                   [&](const auto* params) { add_narrow_squares<Shape>(params, rows, columns, &sum); });
    }
  }
  if constexpr (Rule::kParamSum) block.tensor.param_sums[index] = sum.total();
}

// The factors of narrow rows.
template <class Rule, class Shape>
class NarrowFactors {
 public:
  NarrowFactors(const Context<Rule, float>& context, const Block<Rule, float>& block)
      : rows_(block.tile.rows), of_matrix_(factor_of_matrix(context, block)) {
    for (int k = 0; kRows<Rule> && k < Rule::kFactors; ++k) given_[k].data = block.row_factors(k);
    for (int k = 0; kColumns<Rule> && k < Rule::kFactors; ++k) {
      alignas(64) float of_columns[Shape::kPacks * kLanes<float>] = {};
      for (int64_t j = 0; j < block.m.columns * Shape::kRows; ++j)
        of_columns[j] = block.column_factors(k)[j % block.m.columns];
      __builtin_memcpy(of_columns_[k], of_columns, sizeof(of_columns));
    }
  }
  // For as many rows as a pack has lanes, from this one of the tile on.
  FUSEDSTEP_FN void begin_rows(int64_t row) {
    const int64_t left = rows_ - row;
    for (int k = 0; kRows<Rule> && k < Rule::kFactors; ++k) {
      const FloatPack given = left >= kLanes<float> ? given_[k].load(row) : given_[k].load_part(row, left);
      store_pack<float, float>(of_rows_[k], of_matrix_ * given);
    }
    asm volatile("" : "+m"(of_rows_));  // each comes faster from memory than out of a pack
  }
  // The k-th of those in the w-th pack of the r-th row, or of the rows from there on. r: a constant.
  template <class R>
  FUSEDSTEP_FN FloatPack of(int k, R r, int w) const {
    if constexpr (kRows<Rule> && kColumns<Rule>) return of_columns_[k][w] * of_rows<r>(k, AllLanes{});
    if constexpr (kRows<Rule>) return FloatPack{} + of_rows<r>(k, AllLanes{});
    return of_columns_[k][w];
  }

 private:
  using AllLanes = std::make_index_sequence<kLanes<float>>;

  template <int r, size_t... i>
  FUSEDSTEP_FN auto of_rows(int k, std::index_sequence<i...>) const {
    if constexpr (Shape::kRows == 1) {
      return of_rows_[k][r];
    } else {
      const FloatPack all = load_pack<float, float>(of_rows_[k]);
      return FloatPack(__builtin_shufflevector(all, all, (r + i / Shape::kColumns)...));
    }
  }

  const int64_t rows_;
  const float of_matrix_;
  Stored<float, float> given_[Rule::kFactors];
  FloatPack of_columns_[Rule::kFactors][Shape::kPacks];
  alignas(64) float of_rows_[Rule::kFactors][kLanes<float>];
};

// Adds the sum of each row's squared directions, of up to kRowBlock rows from this one of the tile on.
template <class Rule, class Shape, class S>
FUSEDSTEP_OUT_OF_LINE void add_narrow_directions(const typename Rule::template Scalars<float>& scalars,
                                                 NarrowFactors<Rule, Shape>& factors, const S* grads, int64_t first,
                                                 int64_t rows, int64_t columns, SumInOrder* total) {
  const auto s = scalars;
  NarrowPacks<Shape, S> numbers(grads, columns);
  alignas(64) float of_rows[kRowBlock];
  for (int64_t row = 0; row < rows; row += kLanes<float>) {
    factors.begin_rows(first + row);
    const FloatPack sums = Totals<Shape::kRows>::of([&](auto r) FUSEDSTEP_INLINE {
      FloatPack squares[Shape::kPacks];
      for (int w = 0; w < Shape::kPacks; ++w) {
        FloatPack own[Rule::kFactors];
        for (int k = 0; k < Rule::kFactors; ++k) own[k] = factors.of(k, r, w);
        const FloatPack direction = numbers.kept(Rule::direction(numbers.load(w), own, s), w);
        squares[w] = direction * direction;
      }
      numbers.next();
      return Lanes<float>::folded(squares);
    });
    store_pack<float, float>(of_rows + row, sums);
  }
  total->add(of_rows, rows);
}

template <class Rule, class Shape, class Grad>
void sum_narrow_directions(const Context<Rule, float>& context, const Block<Rule, float>& block, int64_t index,
                           const Grad& grad) {
  NarrowFactors<Rule, Shape> factors(context, block);
  const GradChange<float> change = context.change();
  const int64_t columns = block.m.columns;
  NarrowRows buffer;
  SumInOrder sum;
  for (int64_t row = 0; row < block.tile.rows; row += kRowBlock) {
    const int64_t left = block.tile.rows - row, rows = left < kRowBlock ? left : kRowBlock;
    const auto add = [&](const auto* grads) {
      add_narrow_directions<Rule, Shape>(context.scalars, factors, grads, row, rows, columns, &sum);
    };
    buffer.visit(grad, context.record(), columns, block.at + row * columns, rows, change, change.any, add);
  }
  block.tensor.update_sums[index] = sum.total();
}

// The factors of narrow rows, one row after the other as their elements lie.
template <class Rule, class Shape, int... r>
FUSEDSTEP_OUT_OF_LINE void spread_factors(NarrowFactors<Rule, Shape>& factors, int64_t first, int64_t rows,
                                          int64_t columns, float* to, int64_t stride,
                                          std::integer_sequence<int, r...>) {
  // In order: each row is followed by zeros, where the next one begins.
  const auto store = [&](auto row) FUSEDSTEP_INLINE {
    for (int k = 0; k < Rule::kFactors; ++k)
      for (int w = 0; w < Shape::kPacks; ++w)
        store_pack<float, float>(to + k * stride + w * kLanes<float>, factors.of(k, row, w));
    to += Shape::kRows > 1 ? kLanes<float> : columns;
  };
  for (int64_t row = 0; row < rows; row += kLanes<float>) {
    factors.begin_rows(first + row);
    (store(std::integral_constant<int, r * Shape::kRows>{}), ...);
  }
}

template <class Rule, class Shape, class Param, class Grad, class State>
void update_narrow(const Context<Rule, float>& context, const Block<Rule, float>& block, const Param& param,
                   const Grad& grad, const State& state) {
  constexpr int64_t kAtOnce = (kRowBlock + 1) * kStep<float>;
  NarrowFactors<Rule, Shape> factors(context, block);
  const int64_t columns = block.m.columns, at_once = kRun / columns / kLanes<float> * kLanes<float>;
  alignas(64) float of_elements[Rule::kFactors][kAtOnce];
  for (int64_t row = 0; row < block.tile.rows; row += at_once) {
    const int64_t left = block.tile.rows - row, rows = left < at_once ? left : at_once;
    spread_factors(factors, row, rows, columns, of_elements[0], kAtOnce,
                   std::make_integer_sequence<int, kLanes<float> / Shape::kRows>{});
    update_run<Rule, float>(context, param, grad, state, block.at + row * columns, rows * columns, of_elements[0],
                            kAtOnce);
  }
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
