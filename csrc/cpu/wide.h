// Two packs of numbers at a time, which is as many as a register holds in 16 bits, and how these are joined and taken
// apart without a trip through memory.
#pragma once

#include <utility>

#include "stored.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

// Which numbers the two packs hold. Numbers of 16 bits are taken apart quickest as the lower and the upper halves of
// 32-bit words; where some are fp32, putting those into that order would cost more.
enum class Order { kInOrder, kEvenOdd };

struct Wide {
  FloatPack a, b;  // the first half and the second, or the even ones and the odd ones
};
// Bits of two packs of numbers on their way from or into memory.
struct WideWords {
  WordPack a, b;
};
constexpr int64_t kWide = 2 * kLanes<float>;

// On their way through memory, each pack in one access.
FUSEDSTEP_FN void put_wide(float* to, const Wide& x) {
  store_pack<float, float>(to, x.a);
  store_pack<float, float>(to + kLanes<float>, x.b);
}
FUSEDSTEP_FN Wide get_wide(const float* from) {
  FloatPack a, b;
  __builtin_memcpy(&a, from, sizeof(a));
  __builtin_memcpy(&b, from + kLanes<float>, sizeof(b));
  return {a, b};
}

typedef int32_t IntPack __attribute__((vector_size(kPackBytes)));

FUSEDSTEP_FN WordPack load_words(const void* from) {
  return (WordPack)load_pack<float, float>(static_cast<const float*>(from));
}
FUSEDSTEP_FN void store_words(void* to, WordPack words) {
  __builtin_memcpy(to, &words, sizeof(words));
}

// Asks for the cache lines of n numbers.
template <class S>
FUSEDSTEP_FN void prefetch_numbers(const S* from, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(S);
  FUSEDSTEP_UNROLL
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(from + i, 1);
}

// The lower half of each word from one, the upper from the other.
FUSEDSTEP_FN WordPack merge(WordPack lower, WordPack upper) {
#if defined(__AVX512BW__)
  return (WordPack)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)lower, (__m512i)upper);
#elif defined(__AVX2__)
  return (WordPack)_mm256_blend_epi16((__m256i)lower, (__m256i)upper, 0xaa);
#elif defined(__SSE4_1__)
  return (WordPack)_mm_blend_epi16((__m128i)lower, (__m128i)upper, 0xaa);
#else
  return (lower & 0xffffu) | (upper & 0xffff0000u);
#endif
}

// 16-bit numbers from the halves (shift = 16: the upper ones) of two packs of words.
template <Order kOrder, int kShift>
FUSEDSTEP_FN WordPack to_halves(WordPack a, WordPack b) {
  if constexpr (kOrder == Order::kEvenOdd) return kShift == 16 ? merge(a >> 16, b) : merge(a, b << 16);
#if defined(__AVX512BW__)
  const __m512i first = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                         22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i lanes = kShift == 16 ? _mm512_add_epi16(first, _mm512_set1_epi16(1)) : first;
  return (WordPack)_mm512_maskz_permutex2var_epi16(0xffffffff, (__m512i)a, lanes, (__m512i)b);
#elif defined(__SSE4_1__)
  a = kShift == 16 ? a >> 16 : a & 0xffffu;
  b = kShift == 16 ? b >> 16 : b & 0xffffu;
#if defined(__AVX2__)
  return (WordPack)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)a, (__m256i)b), 0xd8);
#else
  return (WordPack)_mm_packus_epi32((__m128i)a, (__m128i)b);
#endif
#else
  HalfWordPack halves[2] = {__builtin_convertvector(a >> kShift, HalfWordPack),
                            __builtin_convertvector(b >> kShift, HalfWordPack)};
  WordPack words;
  __builtin_memcpy(&words, halves, sizeof(words));
  return words;
#endif
}

// Each 16-bit number as the upper half of a word.
template <Order kOrder>
FUSEDSTEP_FN WideWords load_upper_halves(const void* from) {
  if constexpr (kOrder == Order::kEvenOdd) {
    const WordPack words = load_words(from);
    return {words << 16, words & 0xffff0000u};
  } else {
    const BF16* const halves = static_cast<const BF16*>(from);
    return {(WordPack)load_pack<float, BF16>(halves), (WordPack)load_pack<float, BF16>(halves + kLanes<float>)};
  }
}

FUSEDSTEP_FN bool any_bit(WordPack words) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)words, (__m512i)words) != 0;
#elif defined(__AVX__)
  return !_mm256_testz_si256((__m256i)words, (__m256i)words);
#elif defined(__SSE4_1__)
  return !_mm_testz_si128((__m128i)words, (__m128i)words);
#else
  uint32_t all = 0;
  for (int i = 0; i < kLanes<float>; ++i) all |= words[i];
  return all != 0;
#endif
}

// Whether anything has come up for which the short way to a stored format is wrong.
class Doubt {
 public:
  FUSEDSTEP_FN void nan_in(const Wide& x) {
#if defined(__AVX512F__)
    found_ |= _mm512_cmp_ps_mask((__m512)x.a, (__m512)x.b, _CMP_UNORD_Q);
#elif defined(__AVX__)
    found_ |= (WordPack)_mm256_cmp_ps((__m256)x.a, (__m256)x.b, _CMP_UNORD_Q);
#elif defined(__SSE2__)
    found_ |= (WordPack)_mm_cmpunord_ps((__m128)x.a, (__m128)x.b);
#else
    found_ |= (WordPack)(x.a != x.a) | (WordPack)(x.b != x.b);
#endif
  }
  FUSEDSTEP_FN bool any() const {
#if defined(__AVX512F__)
    return found_ != 0;
#else
    return any_bit(found_);
#endif
  }

 private:
#if defined(__AVX512F__)
  __mmask16 found_ = 0;
#else
  WordPack found_{};
#endif
};

// Plain numbers stored as S, two packs at a time. `narrow` gives what `store` then writes; in its short form, without
// kExact, it leaves in `doubt` whether that is right.
template <class S, Order kOrder>
struct WideStored;

template <Order kOrder>
struct WideStored<float, kOrder> {
  using Narrowed = Wide;
  float* data;

  template <bool kExact>
  FUSEDSTEP_FN Wide load(int64_t i) const {
    const FloatPack a = load_pack<float, float>(data + i), b = load_pack<float, float>(data + i + kLanes<float>);
    if constexpr (kOrder == Order::kInOrder) return {a, b};
    return {shuffled<2, 0>(a, b, Lanes{}), shuffled<2, 1>(a, b, Lanes{})};
  }
  template <bool kExact>
  FUSEDSTEP_FN Wide narrow(int64_t, const Wide& x, Doubt&) const {
    return x;
  }
  FUSEDSTEP_FN void store(int64_t i, const Wide& x) const {
    constexpr bool kInOrder = kOrder == Order::kInOrder;
    store_pack<float, float>(data + i, kInOrder ? x.a : interleaved<0>(x, Lanes{}));
    store_pack<float, float>(data + i + kLanes<float>, kInOrder ? x.b : interleaved<kLanes<float> / 2>(x, Lanes{}));
  }

 private:
  using Lanes = std::make_index_sequence<kLanes<float>>;

  template <size_t kStride, size_t kFirst, size_t... i>
  FUSEDSTEP_FN static FloatPack shuffled(FloatPack a, FloatPack b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (kFirst + i * kStride)...);
  }
  template <size_t kFirst, size_t... i>
  FUSEDSTEP_FN static FloatPack interleaved(const Wide& x, std::index_sequence<i...>) {
    return __builtin_shufflevector(x.a, x.b, (kFirst + i / 2 + i % 2 * kLanes<float>)...);
  }
};

template <Order kOrder>
struct WideStored<BF16, kOrder> {
  using Narrowed = WordPack;
  BF16* data;

  template <bool kExact>
  FUSEDSTEP_FN Wide load(int64_t i) const {
    const WideWords words = load_upper_halves<kOrder>(data + i);
    return {(FloatPack)words.a, (FloatPack)words.b};
  }
  template <bool kExact>
  FUSEDSTEP_FN WordPack narrow(int64_t, const Wide& x, Doubt& doubt) const {
    if (!kExact) doubt.nan_in(x);
    return to_halves<kOrder, 16>(round_to_bf16<kExact>(x.a), round_to_bf16<kExact>(x.b));
  }
  FUSEDSTEP_FN static Wide widen(WordPack halves) {
    static_assert(kOrder == Order::kEvenOdd, "only there is it short");
    return {(FloatPack)(halves << 16), (FloatPack)(halves & 0xffff0000u)};
  }
  FUSEDSTEP_FN void prefetch(int64_t i, int64_t n) const { prefetch_numbers(data + i, n); }
  FUSEDSTEP_FN void store(int64_t i, WordPack halves) const { store_words(data + i, halves); }
};

// The processor's conversions are exact.
template <Order kOrder>
struct WideStored<F16, kOrder> {
  static_assert(kOrder == Order::kInOrder, "the processor converts numbers in their order");
  struct Narrowed {
    HalfWordPack a, b;
  };
  F16* data;

  template <bool kExact>
  FUSEDSTEP_FN Wide load(int64_t i) const {
    return {load_pack<float, F16>(data + i), load_pack<float, F16>(data + i + kLanes<float>)};
  }
  template <bool kExact>
  FUSEDSTEP_FN Narrowed narrow(int64_t, const Wide& x, Doubt&) const {
    return {round_to_f16(x.a), round_to_f16(x.b)};
  }
  FUSEDSTEP_FN static Wide widen(const Narrowed& x) { return {widen_f16(x.a), widen_f16(x.b)}; }
  FUSEDSTEP_FN void prefetch(int64_t i, int64_t n) const { prefetch_numbers(data + i, n); }
  FUSEDSTEP_FN void store(int64_t i, const Narrowed& x) const { __builtin_memcpy(data + i, &x, sizeof(x)); }
};

// The long ways are as many as there are formats, not formats of each rule.
template <class Numbers>
FUSEDSTEP_OUT_OF_LINE Wide load_exactly(const Numbers& numbers, int64_t i) {
  return numbers.template load<true>(i);
}
template <class Numbers>
FUSEDSTEP_OUT_OF_LINE auto narrow_exactly(const Numbers& numbers, int64_t i, const Wide& x) {
  Doubt none;
  return numbers.template narrow<true>(i, x, none);
}
template <class Rule, class Scalars>
FUSEDSTEP_OUT_OF_LINE void update_out_of_line(Wide& param, const Wide& grad, FloatPack* a, FloatPack* b,
                                              const Scalars& s) {
  update_with<Rule>(param.a, grad.a, a, s);
  update_with<Rule>(param.b, grad.b, b, s);
}

template <bool kExact, class Numbers>
FUSEDSTEP_FN Wide load_wide(const Numbers& numbers, int64_t i) {
  if constexpr (kExact) return load_exactly(numbers, i);
  return numbers.template load<false>(i);
}
template <bool kExact, class Numbers>
FUSEDSTEP_FN auto narrow_wide(const Numbers& numbers, int64_t i, const Wide& x, Doubt& doubt) {
  if constexpr (kExact)
    return narrow_exactly(numbers, i, x);
  else
    return numbers.template narrow<false>(i, x, doubt);
}
// Rule::update on two packs; a and b: of its states.
template <class Rule, bool kExact, class Scalars>
FUSEDSTEP_FN void update_both(Wide& param, const Wide& grad, FloatPack* a, FloatPack* b, const Scalars& s) {
  if constexpr (kExact) return update_out_of_line<Rule>(param, grad, a, b, s);
  update_with<Rule>(param.a, grad.a, a, s);
  update_with<Rule>(param.b, grad.b, b, s);
}

// Gradients as `change` says they become; `changed`: what it made of the stored ones.
template <class Grad>
FUSEDSTEP_FN void store_grads(const Grad& grad, int64_t i, const Wide& changed, const GradChange<float>& change) {
  const Wide stored = change.zero ? Wide{} : Wide{changed.a * change.sign, changed.b * change.sign};
  Doubt none;
  grad.store(i, grad.template narrow<true>(i, stored, none));
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
