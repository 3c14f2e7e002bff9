// A tensor in the course of a phase of reducing.cpp: its operands, its elements' update, its lines, its blocks.
#pragma once

// clang-format off
#include "lanes.h"  // first, as in reducing.cpp
#include "followers.h"
#include "reducing.h"
// clang-format on

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

// Memory of the arithmetic type.
template <class T>
FUSEDSTEP_FN Stored<T, T> plain(T* numbers) {
  return {numbers};
}

// A tensor in the course of a phase, with its scalars.
template <class Rule, class T>
struct Context {
  const CacheBatch& cache_batch;
  const ReducingTensor* tensor = nullptr;
  int64_t step = -1;
  typename Rule::template Scalars<T> scalars{};
  typename Rule::template Finish<T> finish{};

  const Record& record() const { return *tensor->work->record; }
  const Matrices& matrices() const { return tensor->work->record->matrices; }
  GradChange<T> change() const { return grad_change<T>(*cache_batch.call); }
  AnyStored<T> state(int k) const { return {record().states[k], record().state_dtypes[k]}; }

  void enter(const ReducingTensor& next, Phase phase) {
    if (tensor == &next) return;
    tensor = &next;
    const int64_t number = count_of(*record().step) + 1;
    if (number != step) scalars = Rule::template prepare<T>(cache_batch.call->hyper, step = number);
    if (phase == Phase::kUpdate)
      finish = Rule::template finish<T>(scalars, rms_of_param(), rms(next.update_sums, next.whole_update));
  }
  double rms_of_param() const { return rms(tensor->param_sums, tensor->whole_param); }
  double rms(const double* sums, const double* of_whole) const {
    if (of_whole != nullptr) return square_root(*of_whole / static_cast<double>(tensor->whole->numel));
    double sum = 0.0;
    for (int64_t i = 0; i < tensor->tiles; ++i) sum += sums[i];
    return square_root(sum / static_cast<double>(record().numel));
  }
};

// The formats of a tensor's operands, as types where they are the usual ones.
template <class Rule, class T, class Visit>
FUSEDSTEP_FN void visit_operands(const Context<Rule, T>& context, Visit&& visit) {
  constexpr int kElement = kStateIndex<Rule, Span::kElement>;
  constexpr Dtype kArithmetic = sizeof(T) == sizeof(double) ? Dtype::kF64 : Dtype::kF32;
  const Record& record = context.record();
  void* const grad = const_cast<void*>(context.tensor->work->grad);
  void* const state = kElement < 0 ? nullptr : record.states[kElement < 0 ? 0 : kElement];
  const bool usual = record.grad_dtype == record.param_dtype &&
                     (kElement < 0 || record.state_dtypes[kElement < 0 ? 0 : kElement] == kArithmetic);
  const auto with = [&](auto* number) FUSEDSTEP_INLINE {
    using S = std::remove_pointer_t<decltype(number)>;
    visit(Stored<T, S>{static_cast<S*>(record.param)}, Stored<T, S>{static_cast<S*>(grad)},
          Stored<T, T>{static_cast<T*>(state)});
  };
  if (usual && record.param_dtype == kArithmetic) return with(static_cast<T*>(nullptr));
  if constexpr (sizeof(T) == sizeof(float)) {
    if (usual && record.param_dtype == Dtype::kBF16) return with(static_cast<BF16*>(nullptr));
  }
  visit(AnyStored<T>{record.param, record.param_dtype}, AnyStored<T>{grad, record.grad_dtype},
        AnyStored<T>{state, kElement < 0 ? kArithmetic : record.state_dtypes[kElement < 0 ? 0 : kElement]});
}

// Updates parameters and elements' states at [at, at + n). factors(i, size, out): those of the i-th element after `at`.
template <class Rule, class T, class Param, class Grad, class State, class Factors>
FUSEDSTEP_FN void update_elements(const Context<Rule, T>& context, const Param& param, const Grad& grad,
                                  const State& state, int64_t at, int64_t n, Factors&& factors) {
  constexpr bool kHasState = kStateIndex<Rule, Span::kElement> >= 0;
  const auto s = context.scalars;
  const auto f = context.finish;
  const GradChange<T> change = context.change();
  const bool stores_grad = change.zero || change.write;
  const Param params = param;  // stores may change whatever is not a variable of this function
  const Grad grads = grad;
  const State states = state;
  for_each_pack<T>(n, [&](int64_t i, auto size) FUSEDSTEP_INLINE {
    Pack<T> p = load_at(params, at + i, size), x{}, own[Rule::kFactors];
    const Pack<T> g = change(load_at(grads, at + i, size));
    if (stores_grad) store_at(grads, at + i, change.zero ? Pack<T>{} : g * change.sign, size);
    if constexpr (kHasState) x = load_at(states, at + i, size);
    factors(i, size, own);
    Rule::update(p, g, own, x, s, f);
    store_at(params, at + i, p, size);
    if constexpr (kHasState) store_at(states, at + i, x, size);
  });
  if (context.record().has_followers())
    follow<T>(context.record(), at, at + n, static_cast<T>(context.cache_batch.call->average_weight));
}

// The same with factors in memory: the k-th ones begin at factors + k * stride.
template <class Rule, class T, class Param, class Grad, class State>
FUSEDSTEP_OUT_OF_LINE void update_run(const Context<Rule, T>& context, const Param& param, const Grad& grad,
                                      const State& state, int64_t at, int64_t n, const T* factors, int64_t stride) {
  update_elements<Rule, T>(context, param, grad, state, at, n,
                           [&](int64_t i, auto size, Pack<T>* own) FUSEDSTEP_INLINE {
                             for (int k = 0; k < Rule::kFactors; ++k)
                               own[k] = load_at(plain(const_cast<T*>(factors) + k * stride), i, size);
                           });
}

// New states and factors of n lines, from the mean of each; the states begin at `at` in their tensors. Whether they are
// stored is told by `store`; the first of them is left in `first_states` too.
template <class Rule, class T>
void finish_lines(const Context<Rule, T>& context, const int* state_indices, int64_t at, int64_t n, const T* means,
                  bool store, T* first_states, T* factors, int64_t stride) {
  const auto s = context.scalars;
  AnyStored<T> states[kLineStates<Rule>];
  for (int k = 0; k < kLineStates<Rule>; ++k) states[k] = context.state(state_indices[k]);
  for_each_pack<T>(n, [&](int64_t i, auto size) FUSEDSTEP_INLINE {
    Pack<T> pack[kLineStates<Rule>], own[Rule::kFactors];
    for (int k = 0; k < kLineStates<Rule>; ++k) pack[k] = load_at(states[k], at + i, size);
    Rule::line(load_at(Stored<T, T>{const_cast<T*>(means)}, i, size), pack, own, s);
    for (int k = 0; store && k < kLineStates<Rule>; ++k) store_at(states[k], at + i, pack[k], size);
    store_at(plain(first_states), i, pack[0], size);
    for (int k = 0; k < Rule::kFactors; ++k) store_at(plain(factors + k * stride), i, own[k], size);
  });
}

template <class Rule, Span span>
const int* line_state_indices() {
  static constexpr int kStateIndices[] = {kStateIndex<Rule, span, 0>, kStateIndex<Rule, span, 1>};
  static_assert(kLineStates<Rule> <= 2, "add a place for a rule whose lines have more states");
  return kStateIndices;
}

// A block of a large matrix.
template <class Rule, class T>
struct Block {
  const ReducingTensor& tensor;
  const Matrices& m;
  const Tile& tile;
  int64_t at;  // the tile's first element

  Block(const Context<Rule, T>& context, const Tile& t)
      : tensor(*context.tensor),
        m(context.matrices()),
        tile(t),
        at((t.matrix * m.rows + t.row) * m.columns + t.column) {}

  T* row_sums() const {
    const int64_t block = tile.matrix * tensor.column_blocks + tile.column / tensor.block_columns;
    return reinterpret_cast<T*>(tensor.row_sums) + block * m.rows + tile.row;
  }
  T* column_sums(int64_t row) const {  // of the row block that begins at this row of the tile
    const int64_t block = tile.matrix * tensor.row_blocks + (tile.row + row) / kRowBlock;
    return reinterpret_cast<T*>(tensor.column_sums) + block * tensor.padded_columns() + tile.column;
  }
  T* row_factors(int k) const {
    return reinterpret_cast<T*>(tensor.row_factors) + (k * m.batch + tile.matrix) * m.rows + tile.row;
  }
  T* column_factors(int k) const {
    return reinterpret_cast<T*>(tensor.column_factors) + (k * m.batch + tile.matrix) * m.columns + tile.column;
  }
};

// What the factors of the rows of a tile are multiplied with.
template <class Rule, class T>
T factor_of_matrix(const Context<Rule, T>& context, const Block<Rule, T>& block) {
  if constexpr (Rule::kRowMean) {
    if (const double* const totals = block.tensor.whole_matrices; totals != nullptr) {
      const double mean = totals[block.tile.matrix] / static_cast<double>(block.tensor.whole->rows);
      return Rule::matrix(static_cast<T>(mean), context.scalars);
    }
    const int64_t blocks = block.tensor.line_blocks();
    double total = 0.0;
    for (int64_t i = 0; i < blocks; ++i) total += block.tensor.row_totals[block.tile.matrix * blocks + i];
    return Rule::matrix(static_cast<T>(total / static_cast<double>(block.m.rows)), context.scalars);
  }
  return 1;
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
