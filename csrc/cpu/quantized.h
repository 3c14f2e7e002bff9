// Quantized states, a block at a time in loops one after the other: decode, update, narrow the weights, encode. In one
// loop, whatever waits for a division or a square root would fill the processor's queues, and keep the rest from
// running.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "quantizer.h"
#include "weights.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

template <class Scalars, class = void>
constexpr bool kAddsDecay = false;
template <class Scalars>
constexpr bool kAddsDecay<Scalars, std::void_t<decltype(Scalars::weight_decay)>> = true;

// The states of one rule in codes of kBits bits, and a block of fp32 numbers on their way into them. kOrder: of
// whatever is loaded and stored with them.
template <class Rule, int kBits, Order kOrder>
class QuantizedStates {
 public:
  using Scalars = typename Rule::template Scalars<float>;

  // begin: the first element to update, at the boundary of a block.
  QuantizedStates(const Record& record, int64_t begin, const GradChange<float>& change, const Scalars& scalars)
      : record_(record), change_(change), scalars_(scalars), block_(begin / kBlock) {}

  // The next block, whose elements begin at `at` in weight and gradient.
  template <class Weight, class Grad>
  FUSEDSTEP_FN void update(Weight& weight, const Grad& grad, int64_t at) {
    if constexpr (Weight::kByBlocks) weight.begin_block(at);
    prefetch_after(weight, at);
    dequantize_block();
    Most most = updated_block(weight, grad, at);  // a const one g++ 12 would keep in memory
    visit_states(block_, [&](int k, auto numbers) FUSEDSTEP_INLINE {
      if constexpr (kIsCodes<decltype(numbers)>) close(k, largest_of(most.of[k]));
    });
    change_grads(grad, at);
    if constexpr (Weight::kNarrowDoubts) narrow_block(weight, at, kBlock, params_);
    prefetch_after(grad, at);
    quantize_block();
    ++block_;
  }
  // The last n elements, fewer than a block: in copies that are a whole one.
  void update_part(float* param, float* grad, int64_t n) {
    alignas(64) float params[kBlock] = {}, grads[kBlock] = {};
    alignas(64) char states[kStateSlots][kBlock * sizeof(float)] = {};
    const size_t count = static_cast<size_t>(n), bytes = count * sizeof(float);
    std::memcpy(params, param, bytes);
    std::memcpy(grads, grad, bytes);
    Record copy = record_;
    copy.param = params;
    visit_states(block_, [&](int k, auto numbers) {
      copy.states[k] = std::memcpy(states[k], address_of(numbers), bytes_of(numbers, n));
      copy.precision.scales[k] += block_;
    });
    QuantizedStates part(copy, 0, change_, scalars_);
    const PlainWeight<float, kOrder> weight(copy, 0);
    const WideStored<float, kOrder> wide_grads{grads};
    part.dequantize_block();
    part.template update_block<false>(weight, wide_grads, 0);
    part.change_grads(wide_grads, 0);
    visit_states(0, [&](int k, auto numbers) {
      if constexpr (kIsCodes<decltype(numbers)>) {
        float* const fresh = part.fresh_[k];
        std::fill(fresh + n, fresh + kBlock, 0.0f);  // what is behind the last number does not count
        part.close(k, largest_magnitude(fresh));
      }
    });
    part.quantize_block();
    visit_states(block_, [&](int k, auto to) { std::memcpy(address_of(to), states[k], bytes_of(to, n)); });
    std::memcpy(param, params, bytes);
    if (change_.zero || change_.write) std::memcpy(grad, grads, bytes);
  }

 private:
  static constexpr int kStateSlots = kNumNamed<Rule> > 0 ? kNumNamed<Rule> : 1;

  // Where a state's numbers lie: codes, or fp32 numbers where codes cannot hold them.
  template <class Numbers>
  static constexpr bool kIsCodes = !std::is_same_v<Numbers, float*>;
  FUSEDSTEP_FN static void* address_of(float* numbers) { return numbers; }
  FUSEDSTEP_FN static size_t bytes_of(float*, int64_t n) { return static_cast<size_t>(n) * sizeof(float); }
  template <class Q>
  FUSEDSTEP_FN static void* address_of(Codes<Q> codes) {
    return codes.bytes;
  }
  template <class Q>
  FUSEDSTEP_FN static size_t bytes_of(Codes<Q>, int64_t n) {
    return static_cast<size_t>(Codes<Q>::size(n));
  }
  template <class Q>
  static Q quantizer_of(Codes<Q>);
  template <class Numbers>
  FUSEDSTEP_FN static Numbers numbers_at(void* address) {
    if constexpr (kIsCodes<Numbers>)
      return Numbers{static_cast<uint8_t*>(address)};
    else
      return static_cast<float*>(address);
  }

  // Calls visit(k, where the numbers of block b lie) for each state, so that their type is known.
  template <class Visit>
  FUSEDSTEP_FN static void visit_states(const Record& record, int64_t b, const Visit& visit) {
    static_assert(std::size(Rule::kCodes) == kNumNamed<Rule>, "every state has a code");
    visit_states(record, b, visit, std::make_integer_sequence<int, kNumNamed<Rule>>{});
  }
  template <class Visit, int... k>
  FUSEDSTEP_FN static void visit_states(const Record& record, int64_t b, const Visit& visit,
                                        std::integer_sequence<int, k...>) {
    (visit_state<k>(record, b, visit), ...);
  }
  template <int k, class Visit>
  FUSEDSTEP_FN static void visit_state(const Record& record, int64_t b, const Visit& visit) {
    if constexpr (has_state<Rule>(k)) {
      using Q = Quantizer<kBits, Rule::kCodes[k] == Code::kSigned>;
      using Numbers = std::conditional_t<Rule::kCodes[k] == Code::kNone, float*, Codes<Q>>;
      visit(k, numbers_at<Numbers>(record.states[k]) + b * kBlock);
    }
  }
  template <class Visit>
  FUSEDSTEP_FN void visit_states(int64_t b, const Visit& visit) const {
    visit_states(record_, b, visit);
  }

  // Asks for numbers of the block after the next one. Those in 16 bits are read in a part of the time alone, in which the
  // processor's own prefetching does not come far enough; fp32 ones are twice as many lines, and it does.
  template <class Numbers>
  FUSEDSTEP_FN void prefetch_after(const Numbers& numbers, int64_t at) const {
    constexpr int64_t kAhead = 2 * kBlock;
    if constexpr (!std::is_base_of_v<WideStored<float, kOrder>, Numbers>)
      if (at + kAhead + kBlock <= record_.numel) numbers.prefetch(at + kAhead, kBlock);
  }

  // Whether weight decay, as far as it is added to the gradient, does anything.
  FUSEDSTEP_FN static bool adds_decay(const Scalars& s) {
    if constexpr (kAddsDecay<Scalars>) return s.weight_decay != 0;
    return false;
  }

  FUSEDSTEP_FN void dequantize_block() {
    visit_states(block_, [&](int k, auto numbers) FUSEDSTEP_INLINE {
      if constexpr (kIsCodes<decltype(numbers)>) {
        const float scale = record_.precision.scales[k][block_];
        for (int64_t i = 0; i < kBlock; i += kWide) put_wide(fresh_[k] + i, dequantize<kOrder>(numbers + i, scale));
      }
    });
  }

  struct Most {
    WordPack of[kStateSlots] = {};
  };
  template <class Weight, class Grad>
  FUSEDSTEP_FN Most updated_block(const Weight& weight, const Grad& grad, int64_t at) {
    if constexpr (Weight::kLoadDoubts)
      if (__builtin_expect(weight.doubts_load(at, kBlock), 0)) return update_block_exactly(weight, grad, at);
    return update_block<false>(weight, grad, at);
  }
  template <class Weight, class Grad>
  FUSEDSTEP_OUT_OF_LINE Most update_block_exactly(Weight weight, Grad grad, int64_t at) {
    return update_block<true>(weight, grad, at);
  }
  // Updates fresh_, and states without codes where they lie; weights there too, or in params_ those that narrow_block
  // has yet to narrow.
  template <bool kExact, class Weight, class Grad>
  FUSEDSTEP_FN Most update_block(const Weight& weight, const Grad& grad, int64_t at) {
    // In most steps the gradient is taken as it is. A loop that knows it is up to a tenth quicker than one that asks.
    if constexpr (!kExact) {
      if (!change_.any && !adds_decay(scalars_)) {
        Scalars s = scalars_;
        if constexpr (kAddsDecay<Scalars>) s.weight_decay = 0;
        return update_numbers<false>(weight, grad, at, s, GradChange<float>{});
      }
    }
    return update_numbers<kExact>(weight, grad, at, scalars_, change_);
  }
  // s, change: in variables that stores into tensors do not change.
  template <bool kExact, class Weight, class Grad>
  FUSEDSTEP_FN Most update_numbers(const Weight& weight, const Grad grad, int64_t at, const Scalars s,
                                   const GradChange<float> change) {
    float* numbers[kStateSlots];
    visit_states(block_, [&](int k, auto stored) FUSEDSTEP_INLINE {
      if constexpr (kIsCodes<decltype(stored)>)
        numbers[k] = fresh_[k];
      else
        numbers[k] = stored;
    });
    Most most;
    for (int64_t i = 0; i < kBlock; i += kWide) {
      Wide p = load_wide<kExact>(weight, at + i);
      const Wide stored = load_wide<false>(grad, at + i), g{change(stored.a), change(stored.b)};
      FloatPack a[kMaxStates] = {}, b[kMaxStates] = {};
      visit_states(Record{}, 0, [&](int k, auto type) FUSEDSTEP_INLINE {
        Wide state;
        if constexpr (kIsCodes<decltype(type)>)
          state = get_wide(numbers[k] + i);
        else
          state = load_wide<false>(WideStored<float, kOrder>{numbers[k]}, i);
        a[k] = state.a;
        b[k] = state.b;
      });
      update_both<Rule, kExact>(p, g, a, b, s);
      visit_states(Record{}, 0, [&](int k, auto type) FUSEDSTEP_INLINE {
        if constexpr (kIsCodes<decltype(type)>) {
          constexpr uint32_t mask = decltype(quantizer_of(type))::kSigned ? 0x7fffffffu : 0xffffffffu;
          most.of[k] = larger(most.of[k], larger((WordPack)a[k] & mask, (WordPack)b[k] & mask));
          put_wide(numbers[k] + i, {a[k], b[k]});
        } else {
          WideStored<float, kOrder>{numbers[k]}.store(i, {a[k], b[k]});
        }
      });
      if constexpr (Weight::kNarrowDoubts) {
        put_wide(params_ + i, p);
      } else {
        Doubt none;
        weight.store(at + i, narrow_wide<false>(weight, at + i, p, none));
      }
    }
    return most;
  }

  template <class Grad>
  FUSEDSTEP_OUT_OF_LINE void change_grads(const Grad& grad, int64_t at) const {
    if (!change_.zero && !change_.write) return;
    for (int64_t i = at; i < at + kBlock; i += kWide) {
      const Wide stored = load_wide<false>(grad, i);
      store_grads(grad, i, {change_(stored.a), change_(stored.b)}, change_);
    }
  }

  FUSEDSTEP_FN static uint32_t largest_magnitude(const float* numbers) {
    WordPack most{};
    for (int64_t i = 0; i < kBlock; i += kLanes<float>)
      most = larger(most, (WordPack)load_pack<float, float>(numbers + i) & 0x7fffffffu);
    return largest_of(most);
  }

  // max_abs: the bits of the block's largest number, taken as if numbers without a sign had none.
  FUSEDSTEP_FN void close(int k, uint32_t max_abs) {
    if (__builtin_expect(max_abs - 0x00800000u >= 0x7f800000u - 0x00800000u, 0)) max_abs = close_odd(k, fresh_[k]);
    record_.precision.scales[k][block_] = Block::scale(max_abs);
    inverses_[k] = Block(max_abs).inverse;
  }
  // A block without a scale is encoded as zeros. A number may be negative only because somebody has set it.
  FUSEDSTEP_OUT_OF_LINE uint32_t close_odd(int k, float* numbers) const {
    if (Rule::kCodes[k] == Code::kNonNegative)
      for (int64_t i = 0; i < kBlock; ++i) numbers[i] = bit_cast<float>(bit_cast<uint32_t>(numbers[i]) & 0x7fffffffu);
    const uint32_t max_abs = largest_magnitude(numbers);
    if (Block(max_abs).keep == 0) std::fill(numbers, numbers + kBlock, 0.0f);
    return max_abs;
  }

  FUSEDSTEP_FN void quantize_block() const {
    visit_states(block_, [&](int k, auto numbers) FUSEDSTEP_INLINE {
      if constexpr (kIsCodes<decltype(numbers)>) {
        const float inverse = inverses_[k];
        for (int64_t i = 0; i < kBlock; i += kWide) quantize<kOrder>(numbers + i, get_wide(fresh_[k] + i), inverse);
      }
    });
  }

  const Record& record_;
  const GradChange<float> change_;
  const Scalars& scalars_;
  int64_t block_;  // the next one to update
  alignas(64) float fresh_[kStateSlots][kBlock];
  alignas(64) float params_[kBlock];
  float inverses_[kStateSlots] = {};
};

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
