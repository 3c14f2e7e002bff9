// 8-bit states: a block of them is decoded and updated in one pass; encoding needs the block's largest magnitude first,
// and so is done in the pass of a later block, whose divisions and square roots hide it.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "stored.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

// Bytes as a pack of numbers, those without a sign plus 1; and the lowest bytes of a pack of words.
template <class Code>
FUSEDSTEP_FN FloatPack widen_bytes(const Code* from) {
  typedef int32_t IntPack __attribute__((vector_size(kPackBytes)));
  IntPack words;
  constexpr bool is_signed = std::is_signed_v<Code>;
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  words = (IntPack)(is_signed ? _mm512_maskz_cvtepi8_epi32(0xffff, bytes) : _mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  words = (IntPack)(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#elif defined(__SSE4_1__)
  int32_t four;
  __builtin_memcpy(&four, from, sizeof(four));
  const __m128i bytes = _mm_cvtsi32_si128(four);
  words = (IntPack)(is_signed ? _mm_cvtepi8_epi32(bytes) : _mm_cvtepu8_epi32(bytes));
#else
  for (int i = 0; i < kLanes<float>; ++i) words[i] = from[i];
#endif
  return __builtin_convertvector(words + (is_signed ? 0 : 1), FloatPack);
}
FUSEDSTEP_FN void store_lowest_bytes(void* to, WordPack words) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)words));
#elif defined(__AVX2__)
  const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                          0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i fours = _mm256_shuffle_epi8((__m256i)words, lowest);
  const __m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  _mm_storel_epi64(static_cast<__m128i*>(to), eight);
#elif defined(__SSE4_1__)
  const __m128i lowest = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const int32_t four = _mm_cvtsi128_si32(_mm_shuffle_epi8((__m128i)words, lowest));
  __builtin_memcpy(to, &four, sizeof(four));
#else
  for (int i = 0; i < kLanes<float>; ++i) static_cast<uint8_t*>(to)[i] = static_cast<uint8_t>(words[i]);
#endif
}

template <class Code>
FUSEDSTEP_FN FloatPack decode_pack(const Code* from, float scale) {
  const FloatPack code = widen_bytes(from);
  return std::is_signed_v<Code> ? decode_signed<WordPack>(code, scale) : decode_unsigned<WordPack>(code, scale);
}
template <class Code>
FUSEDSTEP_FN void encode_pack(Code* to, FloatPack wide, const Block& block) {
  store_lowest_bytes(
      to, std::is_signed_v<Code> ? encode_signed<WordPack>(wide, block) : encode_unsigned<WordPack>(wide, block));
}

FUSEDSTEP_FN WordPack larger_magnitude(WordPack most, FloatPack wide) {
  const WordPack magnitude = (WordPack)wide & 0x7fffffffu;
  return magnitude > most ? magnitude : most;
}
FUSEDSTEP_FN uint32_t largest_of(WordPack most) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32((__m512i)most);
#else
  uint32_t largest = 0;
  for (int i = 0; i < kLanes<float>; ++i) largest = std::max(largest, most[i]);
  return largest;
#endif
}

// The states of one rule in 8 bits, and the blocks of fp32 numbers on their way into them.
template <class Rule>
class CodedStates {
 public:
  using Scalars = typename Rule::template Scalars<float>;

  // begin: the first element to update, at the boundary of a block.
  CodedStates(const Record& record, int64_t begin, const GradChange<float>& change, const Scalars& scalars)
      : record_(record), change_(change), scalars_(scalars), block_(begin / kBlock) {}

  // The next n elements: whole blocks, but for the last.
  void update(float* param, float* grad, int64_t n) {
    for (; n >= kBlock; n -= kBlock, param += kBlock, grad += kBlock) {
      if (waiting_ < kDelay) {
        pass<false>(param, grad);
        ++waiting_;
      } else {
        pass<true>(param, grad);
      }
    }
    if (n > 0) update_part(param, grad, n);
  }
  // Encodes what waits for it.
  void finish() {
    for (; waiting_ > 0; --waiting_) encode(block_ - waiting_);
  }

 private:
  static constexpr int kPlaces = kNamed<Rule> > 0 ? kNamed<Rule> : 1;
  // Blocks between update and encoding: with one, the first packs of a block would wait for the last of the one before.
  static constexpr int kDelay = 2, kGenerations = kDelay + 1;

  struct Fresh {
    alignas(64) float numbers[kPlaces][kBlock];
    Block blocks[kPlaces];
  };

  // Whether a state's numbers are codes; what 8 bits cannot hold is in fp32.
  template <class Number>
  static constexpr bool kCoded = !std::is_same_v<Number, float>;

  // Calls visit(k, the numbers of block b) for each state, so that their type is known.
  template <class Visit>
  FUSEDSTEP_FN void visit_states(int64_t b, const Visit& visit) const {
    static_assert(kNamed<Rule> <= 3, "add a line");
    static_assert(std::size(Rule::kCodes) == kNamed<Rule>, "every state has a code");
    visit_state<0>(b, visit);
    visit_state<1>(b, visit);
    visit_state<2>(b, visit);
  }
  template <int k, class Visit>
  FUSEDSTEP_FN void visit_state(int64_t b, const Visit& visit) const {
    if constexpr (k < kNamed<Rule>) {
      if constexpr (has_state<Rule>(k)) {
        using Byte = std::conditional_t<Rule::kCodes[k] == Code::kSigned, int8_t, uint8_t>;
        using Number = std::conditional_t<Rule::kCodes[k] == Code::kNone, float, Byte>;
        visit(k, static_cast<Number*>(record_.states[k]) + b * kBlock);
      }
    }
  }

  // Updates the next block; with kEncodes, encodes the one that has waited longest.
  template <bool kEncodes>
  FUSEDSTEP_FN void pass(float* param, float* grad) {
    const auto s = scalars_;
    const GradChange<float> change = change_;
    const Stored<float, float> params{param}, grads{grad};
    Fresh& now = fresh_[block_ % kGenerations];
    const Fresh& old = fresh_[(block_ + 1) % kGenerations];
    void* places[kPlaces];  // in variables, which stores into tensors do not change
    float scales[kPlaces];
    Block blocks[kPlaces];
    WordPack most[kPlaces] = {};
    visit_states(block_, [&](int k, auto* numbers) FUSEDSTEP_INLINE {
      places[k] = numbers;
      if constexpr (kCoded<std::remove_pointer_t<decltype(numbers)>>) {
        scales[k] = record_.precision.scales[k][block_];
        if (kEncodes) blocks[k] = old.blocks[k];
      }
    });
    for (int64_t i = 0; i < kBlock; i += kLanes<float>) {
      FloatPack p = params.load(i), g = change(grads.load(i)), pack[kMaxStates] = {};
      if (change.zero) grads.store(i, FloatPack{});
      if (change.write) grads.store(i, g * change.sign);
      visit_states(0, [&](int k, auto* type) FUSEDSTEP_INLINE {
        const auto* const numbers = static_cast<decltype(type)>(places[k]);
        if constexpr (kCoded<std::remove_pointer_t<decltype(type)>>)
          pack[k] = decode_pack(numbers + i, scales[k]);
        else
          pack[k] = load_pack<float, float>(numbers + i);
      });
      update_with<Rule>(p, g, pack, s);
      params.store(i, p);
      visit_states(0, [&](int k, auto* type) FUSEDSTEP_INLINE {
        auto* const numbers = static_cast<decltype(type)>(places[k]);
        if constexpr (kCoded<std::remove_pointer_t<decltype(type)>>) {
          most[k] = larger_magnitude(most[k], pack[k]);
          store_pack<float, float>(now.numbers[k] + i, pack[k]);
          if (kEncodes) {
            FloatPack wide;  // in one load, which load_pack's are not
            __builtin_memcpy(&wide, old.numbers[k] + i, sizeof(wide));
            encode_pack(numbers - kDelay * kBlock + i, wide, blocks[k]);
          }
        } else {
          store_pack<float, float>(numbers + i, pack[k]);
        }
      });
    }
    visit_states(block_, [&](int k, auto* numbers) FUSEDSTEP_INLINE {
      if constexpr (kCoded<std::remove_pointer_t<decltype(numbers)>>) close(k, most[k]);
    });
    ++block_;
  }

  FUSEDSTEP_FN void close(int k, WordPack most) {
    const uint32_t largest = largest_of(most);
    record_.precision.scales[k][block_] = Block::scale(largest);
    fresh_[block_ % kGenerations].blocks[k] = Block(largest);
  }

  void encode(int64_t b) const {
    const Fresh& old = fresh_[b % kGenerations];
    visit_states(b, [&](int k, auto* numbers) FUSEDSTEP_INLINE {
      if constexpr (kCoded<std::remove_pointer_t<decltype(numbers)>>) {
        for (int64_t i = 0; i < kBlock; i += kLanes<float>)
          encode_pack(numbers + i, load_pack<float, float>(old.numbers[k] + i), old.blocks[k]);
      }
    });
  }

  // The last n numbers, fewer than a block: in copies that are a whole one.
  void update_part(float* param, float* grad, int64_t n) {
    alignas(64) float params[kBlock] = {}, grads[kBlock] = {};
    alignas(64) char states[kPlaces][kBlock * sizeof(float)] = {};
    const size_t count = static_cast<size_t>(n), bytes = count * sizeof(float);
    std::memcpy(params, param, bytes);
    std::memcpy(grads, grad, bytes);
    Record copy = record_;
    visit_states(block_, [&](int k, auto* numbers) {
      copy.states[k] = std::memcpy(states[k], numbers, count * sizeof(*numbers));
      copy.precision.scales[k] += block_;
    });
    CodedStates part(copy, 0, change_, scalars_);
    part.template pass<false>(params, grads);
    part.block_ = 0;
    visit_states(0, [&](int k, auto* numbers) {
      if constexpr (kCoded<std::remove_pointer_t<decltype(numbers)>>) {
        float* const fresh = part.fresh_[0].numbers[k];
        std::fill(fresh + n, fresh + kBlock, 0.0f);  // what is behind the last number does not count
        WordPack most{};
        for (int64_t i = 0; i < kBlock; i += kLanes<float>)
          most = larger_magnitude(most, load_pack<float, float>(fresh + i));
        part.close(k, most);
      }
    });
    part.encode(0);
    visit_states(block_, [&](int k, auto* to) { std::memcpy(to, states[k], count * sizeof(*to)); });
    std::memcpy(param, params, bytes);
    if (change_.zero || change_.write) std::memcpy(grad, grads, bytes);
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
