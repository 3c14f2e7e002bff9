// The loop over elements, compiled once per instruction set (FUSEDSTEP_ISA). It knows dtypes and tails, but no
// optimizer by name and no threads.
// clang-format off
#include "stored.h"  // first: the rules that engine.h brings in then find packs' square root
#include "engine.h"
#include "followers.h"
#include "formats.h"
#include "tiles.h"
// clang-format on

#include <algorithm>
#include <array>

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {
namespace {

template <class Rule, class T, class Param, class Grad, class State>
void update_loop(const Param& param, const Grad& grad, const State* states, int64_t begin, int64_t end,
                 const GradChange<T>& change, const typename Rule::template Scalars<T>& scalars) {
  const auto s = scalars;
  int64_t i = begin;
  for (; i + kLanes<T> <= end; i += kLanes<T>) {
    Pack<T> p = param.load(i), g = grad.load(i), pack[kMaxStates] = {};
    g = change(g);
    if (change.zero) grad.store(i, Pack<T>{});
    if (change.write) grad.store(i, g * change.sign);
    FUSEDSTEP_UNROLL
    for (int k = 0; k < kNumNamed<Rule>; ++k)
      if (has_state<Rule>(k)) pack[k] = states[k].load(i);
    update_with<Rule>(p, g, pack, s);
    param.store(i, p);
    FUSEDSTEP_UNROLL
    for (int k = 0; k < kNumNamed<Rule>; ++k)
      if (has_state<Rule>(k)) states[k].store(i, pack[k]);
  }
  if (const int64_t n = end - i; n > 0) {
    Pack<T> p = param.load_part(i, n), g = grad.load_part(i, n), pack[kMaxStates] = {};
    g = change(g);
    if (change.zero) grad.store_part(i, n, Pack<T>{});
    if (change.write) grad.store_part(i, n, g * change.sign);
    FUSEDSTEP_UNROLL
    for (int k = 0; k < kNumNamed<Rule>; ++k)
      if (has_state<Rule>(k)) pack[k] = states[k].load_part(i, n);
    update_with<Rule>(p, g, pack, s);
    param.store_part(i, n, p);
    FUSEDSTEP_UNROLL
    for (int k = 0; k < kNumNamed<Rule>; ++k)
      if (has_state<Rule>(k)) states[k].store_part(i, n, pack[k]);
  }
}

// With every operand stored as S.
template <class Rule, class S>
void update_uniform(const Record& record, const void* grad, int64_t begin, int64_t end, const GradChange<float>& change,
                    const typename Rule::template Scalars<float>& scalars) {
  using Numbers = Stored<float, S>;
  Numbers states[kMaxStates];
  for (int k = 0; k < kNumNamed<Rule>; ++k) states[k].data = static_cast<S*>(record.states[k]);
  update_loop<Rule, float>(Numbers{static_cast<S*>(record.param)}, Numbers{const_cast<S*>(static_cast<const S*>(grad))},
                           states, begin, end, change, scalars);
}

// Updates two packs, unless the short way to their stored formats is wrong for them.
template <class Rule, bool kExact, class Weight, class Grad, class States>
FUSEDSTEP_FN bool update_wide(const Weight& weight, const Grad& grad, const States& states, int64_t i, float* params,
                              const GradChange<float>& change, const typename Rule::template Scalars<float>& s) {
  using State = typename States::value_type;
  Wide p = load_wide<kExact>(weight, i);
  const Wide stored = load_wide<kExact>(grad, i), g{change(stored.a), change(stored.b)};
  FloatPack a[kMaxStates] = {}, b[kMaxStates] = {};
  FUSEDSTEP_UNROLL
  for (int k = 0; k < kNumNamed<Rule>; ++k) {
    if (!has_state<Rule>(k)) continue;
    const Wide state = load_wide<kExact>(states[static_cast<size_t>(k)], i);
    a[k] = state.a;
    b[k] = state.b;
  }
  update_both<Rule, kExact>(p, g, a, b, s);
  Doubt doubt;
  const auto narrowed = [&]() FUSEDSTEP_INLINE {
    if constexpr (Weight::kNarrowsLong)
      return p;
    else
      return narrow_wide<kExact>(weight, i, p, doubt);
  }();
  typename State::Narrowed narrowed_states[kMaxStates];
  FUSEDSTEP_UNROLL
  for (int k = 0; k < kNumNamed<Rule>; ++k)
    if (has_state<Rule>(k))
      narrowed_states[k] = narrow_wide<kExact>(states[static_cast<size_t>(k)], i, {a[k], b[k]}, doubt);
  if (!kExact && __builtin_expect(doubt.any(), 0)) return false;
  if (change.zero || change.write) store_grads(grad, i, g, change);
  if constexpr (Weight::kNarrowsLong)
    put_wide(params, narrowed);
  else
    weight.store(i, narrowed);
  FUSEDSTEP_UNROLL
  for (int k = 0; k < kNumNamed<Rule>; ++k)
    if (has_state<Rule>(k)) states[static_cast<size_t>(k)].store(i, narrowed_states[k]);
  return true;
}
// In copies of everything: a loop that gave away the addresses of its own would read them again in each turn.
template <class Rule, class Weight, class Grad, class States>
FUSEDSTEP_OUT_OF_LINE void update_wide_exactly(Weight weight, Grad grad, States states, int64_t i, float* params,
                                               GradChange<float> change,
                                               typename Rule::template Scalars<float> scalars) {
  update_wide<Rule, true>(weight, grad, states, i, params, change, scalars);
}

// Updates elements from `begin` on and returns where it has stopped: less than two packs, or than a block, are left, or
// a range that begins within a block that must not be divided.
template <class Rule, class Format>
int64_t update_as(Format, const Record& record, const void* grad_data, int64_t begin, int64_t end, int64_t step,
                  const GradChange<float>& given_change, const typename Rule::template Scalars<float>& scalars) {
  typename Format::Weight weight(record, step);
  const typename Format::Grad grad{static_cast<decltype(Format::Grad::data)>(const_cast<void*>(grad_data))};
  int64_t i = begin;
  if (Format::Weight::kByBlocks && begin % kBlock != 0) return begin;
  if constexpr (kIsQuantized<typename Format::State>) {
    QuantizedStates<Rule, Format::State::kBits, Format::kOrder> quantized(record, begin, given_change, scalars);
    for (; i + kBlock <= end; i += kBlock) quantized.update(weight, grad, i);
  } else {
    using Stored = WideStored<typename Format::State, Format::kOrder>;
    const auto s = scalars;
    const GradChange<float> change = given_change;
    std::array<Stored, kMaxStates> states;
    for (int k = 0; k < kNumNamed<Rule>; ++k)
      states[static_cast<size_t>(k)].data = static_cast<decltype(Stored::data)>(record.states[k]);
    constexpr bool kInBlocks = Format::Weight::kByBlocks || Format::Weight::kNarrowsLong;
    alignas(64) float params[Format::Weight::kNarrowsLong ? kBlock : kWide];
    while (i + kWide <= end) {
      const int64_t at = i, to = kInBlocks ? std::min(end, at + kBlock) : end;
      if constexpr (Format::Weight::kByBlocks) weight.begin_block(at);
      for (; i + kWide <= to; i += kWide) {
        float* const wide = Format::Weight::kNarrowsLong ? params + (i - at) : params;
        if (!update_wide<Rule, false>(weight, grad, states, i, wide, change, s))
          update_wide_exactly<Rule>(weight, grad, states, i, wide, change, s);
      }
      if constexpr (Format::Weight::kNarrowsLong) narrow_block(weight, at, i - at, params);
    }
  }
  return i;
}

// fp64 numbers stored as something else: n of them from element `at` on, in a buffer, and back.
FUSEDSTEP_OUT_OF_LINE double* widened(const AnyStored<double>& numbers, int64_t at, int64_t n, double* buffer) {
  if (numbers.dtype == Dtype::kF64) return static_cast<double*>(numbers.data) + at;
  numbers.visit([&](auto stored) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = load<double>(stored.data[at + i]);
  });
  return buffer;
}
FUSEDSTEP_OUT_OF_LINE void narrow_again(const AnyStored<double>& numbers, int64_t at, int64_t n, const double* buffer) {
  if (numbers.dtype == Dtype::kF64) return;
  numbers.visit([&](auto stored) {
    using S = std::remove_pointer_t<decltype(stored.data)>;
    for (int64_t i = 0; i < n; ++i) stored.data[at + i] = narrow<S>(buffer[i]);
  });
}

// With a parameter in fp64; whatever else is not is widened for a few elements at a time.
template <class Rule>
void update_fp64(const Record& record, const void* grad, int64_t begin, int64_t end, const GradChange<double>& change,
                 const typename Rule::template Scalars<double>& scalars) {
  constexpr int64_t kAtOnce = 128;
  double buffers[kNumNamed<Rule> + 1][kAtOnce];
  const AnyStored<double> grads{const_cast<void*>(grad), record.grad_dtype};
  const auto state = [&](int k) { return AnyStored<double>{record.states[k], record.state_dtypes[k]}; };
  const bool in_place = grads.dtype == Dtype::kF64 && states_are<Rule>(record, Dtype::kF64);
  for (int64_t at = begin, n; at < end; at += n) {
    n = in_place || end - at < kAtOnce ? end - at : kAtOnce;
    Stored<double, double> states[kMaxStates];
    for (int k = 0; k < kNumNamed<Rule>; ++k)
      if (has_state<Rule>(k)) states[k].data = widened(state(k), at, n, buffers[k]);
    const Stored<double, double> param{static_cast<double*>(record.param) + at};
    const Stored<double, double> wide_grad{widened(grads, at, n, buffers[kNumNamed<Rule>])};
    update_loop<Rule, double>(param, wide_grad, states, 0, n, change, scalars);
    for (int k = 0; k < kNumNamed<Rule>; ++k)
      if (has_state<Rule>(k)) narrow_again(state(k), at, n, states[k].data);
    if (change.zero || change.write) narrow_again(grads, at, n, wide_grad.data);
  }
}

// prepare() costs more than a small tensor's update, and most tensors of a group are at the same step.
template <class Rule, class T>
class Prepared {
 public:
  explicit Prepared(const Call& call) : change(grad_change<T>(call)), call_(call) {}

  const GradChange<T> change;
  int64_t step = 0;
  typename Rule::template Scalars<T> scalars{};

  const Prepared& at(const Record& record) {
    if (*record.step == counter_) return *this;
    counter_ = *record.step;
    step = count_of(counter_) + 1;
    scalars = Rule::template prepare<T>(call_.hyper, step);
    return *this;
  }

 private:
  const Call& call_;
  float counter_ = -1;  // that these are for
};

template <class Rule, class T>
void update_range(const Work& work, int64_t begin, int64_t end, const Prepared<Rule, T>& prepared) {
  const Record& record = *work.record;
  const auto& scalars = prepared.scalars;
  const GradChange<T>& change = prepared.change;
  if constexpr (sizeof(T) == sizeof(double)) {
    update_fp64<Rule>(record, work.grad, begin, end, change, scalars);
  } else {
    const bool uniform =
        is_plain(record) && record.grad_dtype == record.param_dtype && states_are<Rule>(record, record.param_dtype);
    if (!uniform || record.param_dtype == Dtype::kBF16) {
      visit_format<Rule>(record, [&](auto format) {
        begin = update_as<Rule>(format, record, work.grad, begin, end, prepared.step, change, scalars);
      });
      if (begin == end) return;
    }
    if (uniform) {
      if (record.param_dtype == Dtype::kF32)
        return update_uniform<Rule, float>(record, work.grad, begin, end, change, scalars);
      if (record.param_dtype == Dtype::kBF16)
        return update_uniform<Rule, BF16>(record, work.grad, begin, end, change, scalars);
      if constexpr (kConvertsF16) return update_uniform<Rule, F16>(record, work.grad, begin, end, change, scalars);
    }
    const bool writes_grad = change.zero || change.write;
    const auto tiles = [&](bool widens_states, const auto& update) {
      using Update = std::remove_reference_t<decltype(update)>;
      const UpdateTile call = [](const Record& tile, float* grad, int64_t n, const void* context) {
        (*static_cast<Update*>(context))(tile, grad, n);
      };
      update_tiles(record, work.grad, begin, end, kPresentBits<Rule>, prepared.step, writes_grad, widens_states, call,
                   &update);
    };
    if constexpr (kNumPresent<Rule> > 0) {
      if (record.precision.state_bits != 0) {
        return visit_bits(record.precision.state_bits, [&](auto state) {
          QuantizedStates<Rule, decltype(state)::kBits, Order::kInOrder> quantized(record, begin, change, scalars);
          tiles(false, [&](const Record& tile, float* grad, int64_t n) {
            PlainWeight<float, Order::kInOrder> weight(tile, prepared.step);
            const WideStored<float, Order::kInOrder> grads{grad};
            int64_t i = 0;
            for (; i + kBlock <= n; i += kBlock) quantized.update(weight, grads, i);
            if (i < n) quantized.update_part(weight.data + i, grad + i, n - i);
          });
        });
      }
    }
    tiles(!states_are<Rule>(record, Dtype::kF32), [&](const Record& tile, float* grad, int64_t n) {
      update_uniform<Rule, float>(tile, grad, 0, n, change, scalars);
    });
  }
}

// Asks for the first numbers of a tensor. Small ones lie all over the memory, and a processor looks no further ahead
// than to the next one.
template <class Rule>
FUSEDSTEP_FN void prefetch(const Work& work) {
  constexpr int64_t kLine = 64, kMost = 4 * kLine;
  const Record& record = *work.record;
  const int64_t bytes = std::min(record.numel * int64_t{sizeof(float)}, kMost);
  const auto ask_for = [bytes](const void* data) FUSEDSTEP_INLINE {
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(data) + i, 1);
  };
  __builtin_prefetch(record.step, 1);
  ask_for(record.param);
  ask_for(work.grad);
  FUSEDSTEP_UNROLL
  for (int k = 0; k < kNumNamed<Rule>; ++k)
    if (has_state<Rule>(k)) ask_for(record.states[k]);
}

template <class Rule>
void run_rule(const Call& call, int64_t first, int64_t last) {
  Prepared<Rule, float> single(call);
  Prepared<Rule, double> fp64(call);
  constexpr int64_t kAhead = 3;
  int64_t low = 0, high = call.work_size;  // the last tensor that begins at or before `first`
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (call.work[middle].begin <= first ? low : high) = middle;
  }
  for (int64_t i = low; i < call.work_size && call.work[i].begin < last; ++i) {
    const Work& work = call.work[i];
    if (i + kAhead < call.work_size) prefetch<Rule>(call.work[i + kAhead]);
    const int64_t begin = first > work.begin ? first - work.begin : 0;
    const int64_t end = last - work.begin < work.record->numel ? last - work.begin : work.record->numel;
    if (begin >= end) continue;
    const int64_t at_once = work.record->has_followers() ? kFollowed : end - begin;
    for (int64_t at = begin; at < end; at += at_once) {
      const int64_t to = end - at < at_once ? end : at + at_once;
      if (work.record->param_dtype == Dtype::kF64) {
        update_range<Rule, double>(work, at, to, fp64.at(*work.record));
        if (work.record->has_followers()) follow<double>(*work.record, at, to, call.average_weight);
      } else {
        update_range<Rule, float>(work, at, to, single.at(*work.record));
        if (work.record->has_followers()) follow<float>(*work.record, at, to, static_cast<float>(call.average_weight));
      }
    }
  }
}

}  // namespace

void run(const Call& call, int64_t first, int64_t last) {
  visit_rule(call.rule, [&](auto rule) { run_rule<decltype(rule)>(call, first, last); });
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
