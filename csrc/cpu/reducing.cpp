// The phases of a rule that reduces, compiled once per instruction set (FUSEDSTEP_ISA). It knows dtypes and tails, but
// no optimizer by name and no threads.
// clang-format off
#include "lanes.h"  // first: the rules that reducing.h brings in then find packs' square root
#include "narrow.h"
// clang-format on

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {
namespace {

template <class T, class Numbers>
double sum_of_squares(const Numbers& numbers, int64_t begin, int64_t n) {
  double sum = 0.0;
  for (int64_t done = 0; done < n; done += kRun) {
    Lanes<T> lanes;
    for_packs<T>(n - done < kRun ? n - done : kRun, [&](int64_t i, int w, auto size) FUSEDSTEP_INLINE {
      const Pack<T> x = load_at(numbers, begin + done + i, size);
      lanes.packs[w] += x * x;
    });
    sum += lanes.total();
  }
  return sum;
}

// Blocks of large matrices.

// Row after row, as they lie in memory: that is read faster than several rows at once.
template <class Rule, class T, class Param, class Grad>
void sum_block(const Context<Rule, T>& context, const Tile& tile, int64_t index, const Param& param, const Grad& grad) {
  const Block<Rule, T> block(context, tile);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (is_narrow(block.m))
      return visit_shape(block.m,
                         [&](auto shape) { sum_narrow<Rule, decltype(shape)>(context, block, index, param, grad); });
  }
  const auto s = context.scalars;
  const GradChange<T> change = context.change();
  [[maybe_unused]] double sum = 0.0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    [[maybe_unused]] const auto columns = plain(block.column_sums(row));
    if (kColumns<Rule> && row % kRowBlock == 0) {
      for (int64_t j = 0; j < (tile.columns + 15) / 16 * 16; ++j) columns.data[j] = 0;
    }
    const int64_t at = block.at + row * block.m.columns;
    Lanes<T> squares;
    [[maybe_unused]] Lanes<T> of_param;
    for_packs<T>(tile.columns, [&](int64_t i, int w, auto size) FUSEDSTEP_INLINE {
      const Pack<T> square = Rule::square(change(load_at(grad, at + i, size)), s);
      squares.packs[w] += square;
      if constexpr (kColumns<Rule>) columns.store(i, columns.load(i) + square);
      if constexpr (Rule::kParamSum) {
        const Pack<T> p = load_at(param, at + i, size);
        of_param.packs[w] += p * p;
      }
    });
    if constexpr (kRows<Rule>) block.row_sums()[row] = squares.total();
    if constexpr (Rule::kParamSum) sum += of_param.total();
  }
  if constexpr (Rule::kParamSum) block.tensor.param_sums[index] = sum;
}

template <class Rule, class T>
void finish_block_lines(const Context<Rule, T>& context, const Lines& lines) {
  const ReducingTensor& tensor = *context.tensor;
  const Matrices& m = context.matrices();
  if (!(lines.columns ? kColumns<Rule> : kRows<Rule>)) return;
  const int64_t blocks = lines.columns ? tensor.row_blocks : tensor.column_blocks;
  const int64_t n = lines.columns ? m.columns : m.rows, elements = lines.columns ? m.rows : m.columns;
  const T* sums = reinterpret_cast<const T*>(lines.columns ? tensor.column_sums : tensor.row_sums);
  const int64_t stride = lines.columns ? tensor.padded_columns() : n;
  sums += lines.matrix * blocks * stride + lines.first;
  alignas(64) T means[kLineBlock], first_states[kLineBlock];
  if (const double* of_whole = lines.columns ? tensor.whole_columns : tensor.whole_rows; of_whole != nullptr) {
    of_whole += lines.matrix * n + lines.first;
    const double count = static_cast<double>(lines.columns ? tensor.whole->rows : tensor.whole->columns);
    for (int64_t i = 0; i < lines.count; ++i) means[i] = static_cast<T>(of_whole[i] / count);
  } else if (blocks == 1) {
    // Fewer than 2^24: twice rounded, as below, the quotient of two fp32 numbers is the same.
    for (int64_t i = 0; i < lines.count; ++i) means[i] = sums[i] / static_cast<T>(elements);
  } else {
    double totals[kLineBlock] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < lines.count; ++i) totals[i] += static_cast<double>(sums[b * stride + i]);
    }
    for (int64_t i = 0; i < lines.count; ++i) means[i] = static_cast<T>(totals[i] / static_cast<double>(elements));
  }
  const int64_t at = lines.matrix * n + lines.first;
  T* const factors = reinterpret_cast<T*>(lines.columns ? tensor.column_factors : tensor.row_factors) + at;
  const int* state_indices =
      lines.columns ? line_state_indices<Rule, Span::kColumn>() : line_state_indices<Rule, Span::kRow>();
  finish_lines<Rule, T>(context, state_indices, at, lines.count, means, true, first_states, factors, m.batch * n);
  if (Rule::kRowMean && !lines.columns) {
    double& total = tensor.row_totals[lines.matrix * tensor.line_blocks() + lines.first / kLineBlock];
    if constexpr (sizeof(T) == sizeof(float)) {
      SumInOrder sum;
      sum.add(first_states, lines.count);
      total = sum.total();
    } else {
      total = 0.0;
      for (int64_t i = 0; i < lines.count; ++i) total += first_states[i];
    }
  }
}

// Calls visit(row, factors) for each row of a tile, where factors(i, size, out) gives those of its i-th element.
template <class Rule, class T, class Visit>
FUSEDSTEP_FN void for_rows(const Context<Rule, T>& context, const Block<Rule, T>& block, Visit&& visit) {
  const T of_matrix = factor_of_matrix(context, block);
  for (int64_t row = 0; row < block.tile.rows; ++row) {
    T of_row[Rule::kFactors];
    for (int k = 0; kRows<Rule> && k < Rule::kFactors; ++k) of_row[k] = of_matrix * block.row_factors(k)[row];
    visit(row, [&](int64_t i, auto size, Pack<T>* own) FUSEDSTEP_INLINE {
      for (int k = 0; k < Rule::kFactors; ++k) {
        const Pack<T> zero{};
        if constexpr (kRows<Rule> && kColumns<Rule>)
          own[k] = of_row[k] * load_at(plain(block.column_factors(k)), i, size);
        else if constexpr (kRows<Rule>)
          own[k] = zero + of_row[k];
        else
          own[k] = load_at(plain(block.column_factors(k)), i, size);
      }
    });
  }
}

template <class Rule, class T, class Grad>
void sum_block_directions(const Context<Rule, T>& context, const Tile& tile, int64_t index, const Grad& grad) {
  if constexpr (Rule::kUpdateSum) {
    const Block<Rule, T> block(context, tile);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (is_narrow(block.m))
        return visit_shape(
            block.m, [&](auto shape) { sum_narrow_directions<Rule, decltype(shape)>(context, block, index, grad); });
    }
    const auto s = context.scalars;
    const GradChange<T> change = context.change();
    double sum = 0.0;
    for_rows<Rule, T>(context, block, [&](int64_t row, auto&& factors) FUSEDSTEP_INLINE {
      const int64_t at = block.at + row * block.m.columns;
      Lanes<T> lanes;
      for_packs<T>(tile.columns, [&](int64_t i, int w, auto size) FUSEDSTEP_INLINE {
        Pack<T> own[Rule::kFactors];
        factors(i, size, own);
        const Pack<T> g = change(load_at(grad, at + i, size));
        const Pack<T> direction = kept<T>(Rule::direction(g, own, s), size);
        lanes.packs[w] += direction * direction;
      });
      sum += lanes.total();
    });
    block.tensor.update_sums[index] = sum;
  }
}

template <class Rule, class T, class Param, class Grad, class State>
void update_block(const Context<Rule, T>& context, const Tile& tile, const Param& param, const Grad& grad,
                  const State& state) {
  const Block<Rule, T> block(context, tile);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (is_narrow(block.m))
      return visit_shape(block.m,
                         [&](auto shape) { update_narrow<Rule, decltype(shape)>(context, block, param, grad, state); });
  }
  for_rows<Rule, T>(context, block, [&](int64_t row, auto&& factors) FUSEDSTEP_INLINE {
    update_elements<Rule, T>(context, param, grad, state, block.at + row * block.m.columns, tile.columns, factors);
  });
}

// Runs of small matrices, or of elements that are a line each.

template <class T>
struct alignas(64) Buffer {
  T numbers[kRun];
};

template <class Rule, class T>
struct RunBuffers {
  Buffer<T> squares, means, first_states, matrix_factors, row_factors[Rule::kFactors], column_factors[Rule::kFactors],
      factors[Rule::kFactors];
};

// Calls visit(rows, columns); for matrices of which both have statistics, with constants for the sizes that kernels of
// convolutions have.
template <class Rule, class T, class Visit>
FUSEDSTEP_FN void visit_size(int64_t rows, int64_t columns, Visit&& visit) {
  using std::integral_constant;
  if constexpr (sizeof(T) == sizeof(float) && kRows<Rule> && kColumns<Rule>) {
    if (rows == columns) {
      if (rows == 1) return visit(integral_constant<int64_t, 1>{}, integral_constant<int64_t, 1>{});
      if (rows == 3) return visit(integral_constant<int64_t, 3>{}, integral_constant<int64_t, 3>{});
      if (rows == 5) return visit(integral_constant<int64_t, 5>{}, integral_constant<int64_t, 5>{});
    }
    if (columns == 1) return visit(rows, integral_constant<int64_t, 1>{});
    if (columns == 3) return visit(rows, integral_constant<int64_t, 3>{});
    if (columns == 4) return visit(rows, integral_constant<int64_t, 4>{});
  }
  visit(rows, columns);
}

template <class T>
FUSEDSTEP_FN void divide(T* numbers, int64_t n, int64_t divisor) {
  for (int64_t i = 0; i < n; ++i) numbers[i] /= static_cast<T>(divisor);
}

// The factors of all elements of n matrices, from their squares. Rows and Columns: numbers, or constants.
template <class Rule, class T, class Rows, class Columns>
void finish_matrices(const Context<Rule, T>& context, RunBuffers<Rule, T>& b, int64_t matrix, int64_t n, bool store,
                     Rows rows, Columns columns) {
  const auto zero = [](T* numbers, int64_t count) FUSEDSTEP_INLINE {
    for (int64_t i = 0; i < count; ++i) numbers[i] = 0;
  };
  T* const means = b.means.numbers;
  if constexpr (kRows<Rule>) {
    const T* square = b.squares.numbers;
    for (int64_t i = 0; i < n * rows; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < columns; ++j) sum += *square++;
      means[i] = sum;
    }
    divide(means, n * rows, columns);
    finish_lines<Rule, T>(context, line_state_indices<Rule, Span::kRow>(), matrix * rows, n * rows, means, store,
                          b.first_states.numbers, b.row_factors[0].numbers, kRun);
    if constexpr (Rule::kRowMean) {
      T* const of_matrices = b.matrix_factors.numbers;
      for (int64_t m = 0; m < n; ++m) {
        T sum = 0;
        for (int64_t i = 0; i < rows; ++i) sum += b.first_states.numbers[m * rows + i];
        of_matrices[m] = sum;
      }
      divide(of_matrices, n, rows);
      for_packs<T>(n, [&](int64_t i, int, auto part) FUSEDSTEP_INLINE {
        store_at(plain(of_matrices), i, Rule::matrix(load_at(plain(of_matrices), i, part), context.scalars), part);
      });
      for (int k = 0; k < Rule::kFactors; ++k) {
        T* const of_rows = b.row_factors[k].numbers;
        for (int64_t m = 0; m < n; ++m) {
          for (int64_t i = 0; i < rows; ++i) of_rows[m * rows + i] *= of_matrices[m];
        }
      }
    }
  }
  if constexpr (kColumns<Rule>) {
    const T* square = b.squares.numbers;
    zero(means, n * columns);
    for (int64_t m = 0; m < n; ++m) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) means[m * columns + j] += *square++;
      }
    }
    divide(means, n * columns, rows);
    finish_lines<Rule, T>(context, line_state_indices<Rule, Span::kColumn>(), matrix * columns, n * columns, means,
                          store, b.first_states.numbers, b.column_factors[0].numbers, kRun);
  }
  for (int k = 0; k < Rule::kFactors; ++k) {
    T* factor = b.factors[k].numbers;
    for (int64_t m = 0; m < n; ++m) {
      for (int64_t i = 0; i < rows; ++i) {
        const T of_row = kRows<Rule> ? b.row_factors[k].numbers[m * rows + i] : T(1);
        for (int64_t j = 0; j < columns; ++j)
          *factor++ = kColumns<Rule> ? of_row * b.column_factors[k].numbers[m * columns + j] : of_row;
      }
    }
  }
}

template <class Rule, class T, bool kUpdates, class Param, class Grad, class State>
void take_runs(const Context<Rule, T>& context, const Tile& tile, int64_t index, const Param& param, const Grad& grad,
               const State& state) {
  const Matrices& m = context.matrices();
  const int64_t size = m.factored ? m.rows * m.columns : 1, at_once = kRun / size;
  const auto s = context.scalars;
  const GradChange<T> change = context.change();
  RunBuffers<Rule, T> b;
  double sum = 0.0;
  for (int64_t first = tile.first; first < tile.first + tile.count; first += at_once) {
    const int64_t left = tile.first + tile.count - first, count = left < at_once ? left : at_once;
    const int64_t at = first * size, n = count * size;
    for_packs<T>(n, [&](int64_t i, int, auto part) FUSEDSTEP_INLINE {
      store_at(plain(b.squares.numbers), i, Rule::square(change(load_at(grad, at + i, part)), s), part);
    });
    if (m.factored) {
      visit_size<Rule, T>(m.rows, m.columns, [&](auto rows, auto columns) {
        finish_matrices<Rule, T>(context, b, first, count, kUpdates, rows, columns);
      });
    } else if constexpr (kTakesFlat<Rule>) {
      finish_lines<Rule, T>(context, line_state_indices<Rule, Span::kFlat>(), at, n, b.squares.numbers, kUpdates,
                            b.first_states.numbers, b.factors[0].numbers, kRun);
    }
    if constexpr (kUpdates) {
      update_run<Rule, T>(context, param, grad, state, at, n, b.factors[0].numbers, kRun);
    } else if constexpr (Rule::kUpdateSum) {
      Lanes<T> lanes;
      for_packs<T>(n, [&](int64_t i, int w, auto part) FUSEDSTEP_INLINE {
        Pack<T> own[Rule::kFactors];
        for (int k = 0; k < Rule::kFactors; ++k) own[k] = load_at(plain(b.factors[k].numbers), i, part);
        const Pack<T> g = change(load_at(grad, at + i, part));
        const Pack<T> direction = kept<T>(Rule::direction(g, own, s), part);
        lanes.packs[w] += direction * direction;
      });
      sum += lanes.total();
    }
  }
  if constexpr (!kUpdates) {
    const int64_t n = tile.count * size;
    if constexpr (Rule::kParamSum) context.tensor->param_sums[index] = sum_of_squares<T>(param, tile.first * size, n);
    if constexpr (Rule::kUpdateSum) context.tensor->update_sums[index] = sum;
  }
}

template <class Rule, class T>
void run_tile(const Context<Rule, T>& context, const Tile& tile, int64_t index, Phase phase) {
  visit_operands<Rule, T>(context, [&](const auto& param, const auto& grad, const auto& state) {
    if (phase == Phase::kSums) {
      if (context.tensor->blocks)
        sum_block<Rule, T>(context, tile, index, param, grad);
      else
        take_runs<Rule, T, false>(context, tile, index, param, grad, state);
    } else if (phase == Phase::kDirections) {
      if (context.tensor->blocks) sum_block_directions<Rule, T>(context, tile, index, grad);
    } else {
      if (context.tensor->blocks)
        update_block<Rule, T>(context, tile, param, grad, state);
      else
        take_runs<Rule, T, true>(context, tile, index, param, grad, state);
    }
  });
}

template <class Rule>
void run_rule(const CacheBatch& cache_batch, Phase phase, int64_t first, int64_t last) {
  Context<Rule, float> single{cache_batch};
  Context<Rule, double> fp64{cache_batch};
  const auto take = [&](int64_t i, auto& context) {
    if (phase == Phase::kLines) {
      context.enter(cache_batch.tensors[static_cast<size_t>(cache_batch.lines[static_cast<size_t>(i)].tensor)], phase);
      finish_block_lines(context, cache_batch.lines[static_cast<size_t>(i)]);
    } else if (phase == Phase::kTensors) {
      constexpr int kTensor = kStateIndex<Rule, Span::kTensor>;
      if constexpr (kTensor >= 0) {
        context.tensor = &cache_batch.tensors[static_cast<size_t>(i)];
        const auto rms = context.rms_of_param();
        using T = decltype(context.change().sign);
        context.state(kTensor).store_part(0, 1, Pack<T>{} + static_cast<T>(rms));
      }
    } else {
      const Tile& tile = cache_batch.tiles[static_cast<size_t>(i)];
      const ReducingTensor& tensor = cache_batch.tensors[static_cast<size_t>(tile.tensor)];
      context.enter(tensor, phase);
      run_tile(context, tile, i - tensor.first_tile, phase);
    }
  };
  for (int64_t i = first; i < last; ++i) {
    const size_t at = static_cast<size_t>(i);
    const int64_t tensor = phase == Phase::kLines     ? cache_batch.lines[at].tensor
                           : phase == Phase::kTensors ? i
                                                      : cache_batch.tiles[at].tensor;
    if (cache_batch.tensors[static_cast<size_t>(tensor)].work->record->param_dtype == Dtype::kF64)
      take(i, fp64);
    else
      take(i, single);
  }
}

}  // namespace

void run_phase(const CacheBatch& cache_batch, Phase phase, int64_t first, int64_t last) {
  visit_reducing_rule(cache_batch.call->rule,
                      [&](auto rule) { run_rule<decltype(rule)>(cache_batch, phase, first, last); });
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
