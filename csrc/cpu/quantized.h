// Quantized states: a block of them is decoded and updated in one pass; encoding needs the block's largest magnitude
// first, and so is done in the pass of a later block, whose divisions and square roots hide it.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "quantizer.h"
#include "weights.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

// The states of one rule in codes of kBits bits, and the blocks of fp32 numbers on their way into them. kOrder: of
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
    if (waiting_ < kDelay) {
      pass<false>(weight, grad, at);
      ++waiting_;
    } else {
      pass<true>(weight, grad, at);
    }
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
    part.template pass<false, false>(weight, WideStored<float, kOrder>{grads}, 0);
    visit_states(0, [&](int k, auto numbers) {
      if constexpr (kIsCodes<decltype(numbers)>) {
        float* const fresh = part.fresh_[0].numbers[k];
        std::fill(fresh + n, fresh + kBlock, 0.0f);  // what is behind the last number does not count
        part.close(k, largest_magnitude(fresh));
      }
    });
    part.quantize_block(0);
    visit_states(block_, [&](int k, auto to) { std::memcpy(address_of(to), states[k], bytes_of(to, n)); });
    std::memcpy(param, params, bytes);
    if (change_.zero || change_.write) std::memcpy(grad, grads, bytes);
  }
  // Encodes what waits for it.
  void finish() {
    for (; waiting_ > 0; --waiting_) quantize_block(block_ - waiting_);
  }

 private:
  static constexpr int kStateSlots = kNumNamed<Rule> > 0 ? kNumNamed<Rule> : 1;
  // Blocks between update and encoding: with one, the first packs of a block would wait for the last of the one before.
  static constexpr int kDelay = 2, kGenerations = kDelay + 1;

  struct Fresh {
    alignas(64) float numbers[kStateSlots][kBlock];
    float inverses[kStateSlots] = {};
  };

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

  // What a pass over a block needs, in variables that stores into tensors do not change.
  struct Pass {
    void* states[kStateSlots];  // the block's numbers
    float* fresh[kStateSlots];
    float scales[kStateSlots];
    const float* old[kStateSlots];  // numbers that are to be encoded
    float inverses[kStateSlots];
    Scalars scalars;
    GradChange<float> change;
  };

  struct Most {
    WordPack of[kStateSlots] = {};
  };

  // Updates the next block; with kQuantizes, encodes the one that has waited longest. Without kCloses, the block stays
  // the next one.
  template <bool kQuantizes, bool kCloses = true, class Weight, class Grad>
  FUSEDSTEP_FN void pass(const Weight& weight, const Grad grad, int64_t at) {
    Fresh& now = fresh_[block_ % kGenerations];
    const Fresh& old = fresh_[(block_ + 1) % kGenerations];
    Pass pass;
    pass.scalars = scalars_;
    pass.change = change_;
    Most most;
    visit_states(block_, [&](int k, auto numbers) FUSEDSTEP_INLINE {
      pass.states[k] = address_of(numbers);
      if constexpr (kIsCodes<decltype(numbers)>) {
        pass.scales[k] = record_.precision.scales[k][block_];
        pass.fresh[k] = now.numbers[k];
        pass.old[k] = old.numbers[k];
        pass.inverses[k] = old.inverses[k];
      }
    });
    for (int64_t i = 0; i < kBlock; i += kWide) {
      if (!step<false>(weight, grad, at + i, i, pass, most)) most = step_exactly(weight, grad, at + i, i, pass, most);
      if (!kQuantizes) continue;
      visit_states(Record{}, 0, [&](int k, auto type) FUSEDSTEP_INLINE {
        if constexpr (kIsCodes<decltype(type)>)
          quantize<kOrder>(numbers_at<decltype(type)>(pass.states[k]) + (i - kDelay * kBlock),
                           load_fresh(pass.old[k] + i), pass.inverses[k]);
      });
    }
    if (!kCloses) return;
    visit_states(block_, [&](int k, auto numbers) FUSEDSTEP_INLINE {
      if constexpr (kIsCodes<decltype(numbers)>) close(k, largest_of(most.of[k]));
    });
    ++block_;
  }

  // Updates two packs, unless the short way is wrong for them.
  template <bool kExact, class Weight, class Grad>
  FUSEDSTEP_FN static bool step(const Weight& weight, const Grad& grad, int64_t at, int64_t i, const Pass& pass,
                                Most& most) {
    Wide p = load_wide<kExact>(weight, at);
    const Wide stored = load_wide<kExact>(grad, at), g{pass.change(stored.a), pass.change(stored.b)};
    FloatPack a[kMaxStates] = {}, b[kMaxStates] = {};
    visit_states(Record{}, 0, [&](int k, auto type) FUSEDSTEP_INLINE {
      const auto numbers = numbers_at<decltype(type)>(pass.states[k]) + i;
      Wide state;
      if constexpr (kIsCodes<decltype(type)>)
        state = dequantize<kOrder>(numbers, pass.scales[k]);
      else
        state = load_wide<false>(WideStored<float, kOrder>{numbers}, 0);
      a[k] = state.a;
      b[k] = state.b;
    });
    update_both<Rule, kExact>(p, g, a, b, pass.scalars);
    Doubt doubt;
    const auto narrowed = narrow_wide<kExact>(weight, at, p, doubt);
    if (!kExact && __builtin_expect(doubt.any(), 0)) return false;
    if (pass.change.zero || pass.change.write) store_grads(grad, at, g, pass.change);
    weight.store(at, narrowed);
    visit_states(Record{}, 0, [&](int k, auto type) FUSEDSTEP_INLINE {
      if constexpr (kIsCodes<decltype(type)>) {
        constexpr uint32_t mask = decltype(quantizer_of(type))::kSigned ? 0x7fffffffu : 0xffffffffu;
        most.of[k] = larger(most.of[k], larger((WordPack)a[k] & mask, (WordPack)b[k] & mask));
        store_pack<float, float>(pass.fresh[k] + i, a[k]);
        store_pack<float, float>(pass.fresh[k] + i + kLanes<float>, b[k]);
      } else {
        WideStored<float, kOrder>{static_cast<float*>(pass.states[k])}.store(i, {a[k], b[k]});
      }
    });
    return true;
  }
  template <class Weight, class Grad>
  FUSEDSTEP_OUT_OF_LINE static Most step_exactly(Weight weight, Grad grad, int64_t at, int64_t i, Pass pass,
                                                 Most most) {
    step<true>(weight, grad, at, i, pass, most);
    return most;
  }

  // In one load each, which load_pack's are not.
  FUSEDSTEP_FN static Wide load_fresh(const float* numbers) {
    Wide wide;
    __builtin_memcpy(&wide, numbers, sizeof(wide));
    return wide;
  }

  FUSEDSTEP_FN static uint32_t largest_magnitude(const float* numbers) {
    WordPack most{};
    for (int64_t i = 0; i < kBlock; i += kLanes<float>)
      most = larger(most, (WordPack)load_pack<float, float>(numbers + i) & 0x7fffffffu);
    return largest_of(most);
  }

  // largest: the bits of the block's largest number, taken as if numbers without a sign had none.
  FUSEDSTEP_FN void close(int k, uint32_t max_abs) {
    Fresh& fresh = fresh_[block_ % kGenerations];
    if (__builtin_expect(max_abs - 0x00800000u >= 0x7f800000u - 0x00800000u, 0))
      max_abs = close_odd(k, fresh.numbers[k]);
    record_.precision.scales[k][block_] = Block::scale(max_abs);
    fresh.inverses[k] = Block(max_abs).inverse;
  }
  // A block without a scale is encoded as zeros. A number may be negative only because somebody has set it.
  FUSEDSTEP_OUT_OF_LINE uint32_t close_odd(int k, float* numbers) const {
    if (Rule::kCodes[k] == Code::kNonNegative)
      for (int64_t i = 0; i < kBlock; ++i) numbers[i] = bit_cast<float>(bit_cast<uint32_t>(numbers[i]) & 0x7fffffffu);
    const uint32_t max_abs = largest_magnitude(numbers);
    if (Block(max_abs).keep == 0) std::fill(numbers, numbers + kBlock, 0.0f);
    return max_abs;
  }

  void quantize_block(int64_t b) const {
    const Fresh& old = fresh_[b % kGenerations];
    visit_states(b, [&](int k, auto numbers) FUSEDSTEP_INLINE {
      if constexpr (kIsCodes<decltype(numbers)>) {
        for (int64_t i = 0; i < kBlock; i += kWide)
          quantize<kOrder>(numbers + i, load_fresh(old.numbers[k] + i), old.inverses[k]);
      }
    });
  }

  const Record& record_;
  const GradChange<float> change_;
  const Scalars& scalars_;
  int64_t block_;    // the next one to update
  int waiting_ = 0;  // blocks to encode
  Fresh fresh_[kGenerations];
};

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
