// Codes of two packs of numbers (codecs.h: Block, Quantizer), to the same bits as codecs.h in fewer instructions.
// Numbers without a sign must have none, and a block that has no scale must be all zeros.
#pragma once

#include "../codecs.h"
#include "wide.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

// Each byte as a word, in order.
template <bool kSigned>
FUSEDSTEP_FN WordPack load_bytes_as_words(const uint8_t* from) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (WordPack)(kSigned ? _mm512_maskz_cvtepi8_epi32(0xffff, bytes) : _mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (WordPack)(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#elif defined(__SSE4_1__)
  int32_t four;
  __builtin_memcpy(&four, from, sizeof(four));
  const __m128i bytes = _mm_cvtsi32_si128(four);
  return (WordPack)(kSigned ? _mm_cvtepi8_epi32(bytes) : _mm_cvtepu8_epi32(bytes));
#else
  IntPack words;
  for (int i = 0; i < kLanes<float>; ++i) words[i] = kSigned ? static_cast<int8_t>(from[i]) : from[i];
  return (WordPack)words;
#endif
}

// The lowest byte of each word, in order.
FUSEDSTEP_FN void store_lowest_bytes(uint8_t* to, WordPack words) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)words));
#elif defined(__AVX2__)
  const __m256i bytes = (__m256i)(words & 0xffu);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
#elif defined(__SSE4_1__)
  const __m128i bytes = (__m128i)(words & 0xffu), halves = _mm_packus_epi32(bytes, bytes);
  const int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves));
  __builtin_memcpy(to, &four, sizeof(four));
#else
  for (int i = 0; i < kLanes<float>; ++i) to[i] = static_cast<uint8_t>(words[i]);
#endif
}

// Bytes as 16-bit numbers, in order.
template <bool kSigned>
FUSEDSTEP_FN WordPack load_bytes_as_halves(const uint8_t* from) {
#if defined(__AVX512BW__)
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (WordPack)(kSigned ? _mm512_cvtepi8_epi16(bytes) : _mm512_cvtepu8_epi16(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (WordPack)(kSigned ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes));
#elif defined(__SSE4_1__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (WordPack)(kSigned ? _mm_cvtepi8_epi16(bytes) : _mm_cvtepu8_epi16(bytes));
#else
  typedef int16_t Halves __attribute__((vector_size(kPackBytes)));
  Halves halves;
  for (int i = 0; i < kWide; ++i) halves[i] = kSigned ? static_cast<int8_t>(from[i]) : from[i];
  return (WordPack)halves;
#endif
}

// The lower byte of each 16-bit number, in order.
template <bool kSigned>
FUSEDSTEP_FN void store_as_bytes(void* to, WordPack halves) {
#if defined(__AVX512BW__)
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi16_epi8((__m512i)halves));
#elif defined(__AVX2__)
  const __m128i a = _mm256_castsi256_si128((__m256i)halves), b = _mm256_extracti128_si256((__m256i)halves, 1);
  _mm_storeu_si128(static_cast<__m128i*>(to), kSigned ? _mm_packs_epi16(a, b) : _mm_packus_epi16(a, b));
#elif defined(__SSE4_1__)
  const __m128i all = (__m128i)halves;
  _mm_storel_epi64(static_cast<__m128i*>(to), kSigned ? _mm_packs_epi16(all, all) : _mm_packus_epi16(all, all));
#else
  typedef uint16_t Halves __attribute__((vector_size(kPackBytes)));
  const Halves from = (Halves)halves;
  for (int i = 0; i < kWide; ++i) static_cast<uint8_t*>(to)[i] = static_cast<uint8_t>(from[i]);
#endif
}

// x - y of 16-bit numbers, and zero where that is negative.
FUSEDSTEP_FN WordPack subtract_to_zero(WordPack x, WordPack y) {
#if defined(__AVX512BW__)
  return (WordPack)_mm512_subs_epu16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return (WordPack)_mm256_subs_epu16((__m256i)x, (__m256i)y);
#elif defined(__SSE2__)
  return (WordPack)_mm_subs_epu16((__m128i)x, (__m128i)y);
#else
  typedef uint16_t Halves __attribute__((vector_size(kPackBytes)));
  const Halves a = (Halves)x, b = (Halves)y;
  return (WordPack)(a > b ? a - b : Halves{});
#endif
}

// 2^kShift times the numbers that codes of 16 bits are, each exact: the scaling of what is made of them is free.
template <Order kOrder>
struct CodeNumbers;
template <>
struct CodeNumbers<Order::kEvenOdd> {
  static constexpr int kShift = 16;
  FUSEDSTEP_FN static Wide of(WordPack codes) {
    return {__builtin_convertvector((IntPack)(codes << 16), FloatPack),
            __builtin_convertvector((IntPack)(codes & 0xffff0000u), FloatPack)};
  }
};
template <>
struct CodeNumbers<Order::kInOrder> {
  static constexpr int kShift = 0;
  FUSEDSTEP_FN static Wide of(WordPack codes) {
#if defined(__AVX512F__)
    const __m512i all = (__m512i)codes;
    const IntPack a = (IntPack)_mm512_cvtepi16_epi32(_mm512_castsi512_si256(all)),
                  b = (IntPack)_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(all, 1));
#elif defined(__AVX2__)
    const __m256i all = (__m256i)codes;
    const IntPack a = (IntPack)_mm256_cvtepi16_epi32(_mm256_castsi256_si128(all)),
                  b = (IntPack)_mm256_cvtepi16_epi32(_mm256_extracti128_si256(all, 1));
#elif defined(__SSE4_1__)
    const __m128i all = (__m128i)codes;
    const IntPack a = (IntPack)_mm_cvtepi16_epi32(all), b = (IntPack)_mm_cvtepi16_epi32(_mm_srli_si128(all, 8));
#else
    typedef int16_t Halves __attribute__((vector_size(kPackBytes / 2)));
    Halves halves[2];
    __builtin_memcpy(halves, &codes, sizeof(halves));
    const IntPack a = __builtin_convertvector(halves[0], IntPack), b = __builtin_convertvector(halves[1], IntPack);
#endif
    return {__builtin_convertvector(a, FloatPack), __builtin_convertvector(b, FloatPack)};
  }
};

constexpr uint32_t bits_of_power(int exponent) {
  return static_cast<uint32_t>(exponent) << 23;
}

// Codes as numbers of 16 bits, 2^kCodeShift times as large, in order.
template <class Q>
constexpr int kCodeShift = Q::kBits == 4 && Q::kSigned ? 12 : 0;
template <class Q>
FUSEDSTEP_FN WordPack load_codes(Codes<Q> from) {
  if constexpr (Q::kBits == 8) return load_bytes_as_halves<Q::kSigned>(from.bytes);
  const WordPack pairs = load_bytes_as_words<false>(from.bytes);
  return Q::kSigned ? (pairs << 12 | pairs << 24) & 0xf000f000u : (pairs | pairs << 12) & 0x000f000fu;
}
// From the lowest bits of numbers of 16 bits.
template <class Q>
FUSEDSTEP_FN void store_codes(Codes<Q> to, WordPack halves) {
  if constexpr (Q::kBits == 8)
    store_as_bytes<Q::kSigned>(to.bytes, halves);
  else
    store_lowest_bytes(to.bytes, (halves & 0xfu) | (halves >> 12 & 0xf0u));
}

// 2^kShift of CodeNumbers, and of codes, times the codes, of which those without a sign are taken plus 1.
template <Order kOrder, class Q>
FUSEDSTEP_FN Wide code_numbers(Codes<Q> from) {
  if constexpr (kOrder == Order::kInOrder && Q::kBits == 8) {
    const auto numbers = [](const uint8_t* bytes) FUSEDSTEP_INLINE {
      const WordPack codes = load_bytes_as_words<Q::kSigned>(bytes) + (Q::kSigned ? 0u : 1u);
      return __builtin_convertvector((IntPack)codes, FloatPack);
    };
    return {numbers(from.bytes), numbers(from.bytes + kLanes<float>)};
  } else {
    return CodeNumbers<kOrder>::of(load_codes(from) + (Q::kSigned ? 0u : 0x00010001u));
  }
}

// Numbers of codes, those 2^kShift times as large.
template <class Q, int kShift>
FUSEDSTEP_FN FloatPack dequantized(FloatPack code, float scale) {
  if constexpr (Q::kSigned) {
    constexpr float kStep = 1.0f / Q::kSteps / (1u << kShift);
    const WordPack root = (WordPack)(code * kStep), doubled = root + (root & 0x7fffffffu);
    // Zero stays zero: the lower halves of both sides of the subtraction are not touched by it.
    return (FloatPack)subtract_to_zero(doubled, WordPack{} + 2 * Q::kRootBias) * scale;
  } else {
    return (FloatPack)(((WordPack)code - (Q::kStepBias + bits_of_power(kShift))) << 2) * scale;
  }
}

#if defined(__AVX512F__)
// Codes of 4 bits are few enough to be looked up, by the lowest 4 bits of each word.
template <Order kOrder, class Q>
FUSEDSTEP_FN Wide looked_up(Codes<Q> from, float scale) {
  IntPack codes;
  for (int i = 0; i < kLanes<float>; ++i) codes[i] = Q::kSigned ? (i ^ 8) - 8 : i + 1;
  const __m512 numbers = (__m512)dequantized<Q, 0>(__builtin_convertvector(codes, FloatPack), scale);
  const auto of = [numbers](__m512i words)
                      FUSEDSTEP_INLINE { return (FloatPack)_mm512_maskz_permutexvar_ps(0xffff, words, numbers); };
  if constexpr (kOrder == Order::kEvenOdd) {
    const WordPack pairs = load_bytes_as_words<false>(from.bytes);
    return {of((__m512i)pairs), of((__m512i)(pairs >> 4))};
  } else {
    typedef uint64_t LongPack __attribute__((vector_size(kPackBytes)));
    const auto spread = [](const uint8_t* bytes) FUSEDSTEP_INLINE {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
      const LongPack pairs = (LongPack)_mm512_maskz_cvtepu8_epi64(0xff, eight);
      return (__m512i)(pairs | pairs << 28);
    };
    return {of(spread(from.bytes)), of(spread(from.bytes + kLanes<float> / 2))};
  }
}
#endif

template <Order kOrder, class Q>
FUSEDSTEP_FN Wide dequantize(Codes<Q> from, float scale) {
#if defined(__AVX512F__)
  if constexpr (Q::kBits == 4) return looked_up<kOrder>(from, scale);
#endif
  constexpr int kShift = CodeNumbers<kOrder>::kShift + kCodeShift<Q>;
  const Wide codes = code_numbers<kOrder>(from);
  return {dequantized<Q, kShift>(codes.a, scale), dequantized<Q, kShift>(codes.b, scale)};
}

template <Order kOrder, class Q>
FUSEDSTEP_FN void quantize(Codes<Q> to, const Wide& x, float inverse) {
  const auto quantized = [inverse](FloatPack number) FUSEDSTEP_INLINE {
    if constexpr (Q::kSigned) {
      // Shifted right with its sign, a number keeps that in two places, of which the root needs one.
      const IntPack half = (IntPack)(number * inverse) >> 1;
      const FloatPack root = (FloatPack)(((WordPack)half + Q::kRootBias) & 0xbfffffffu);
      return (WordPack)(root * Q::kSteps + 0x1.8p23f);
    } else {
      const WordPack relative = (WordPack)(number * inverse);
      return (WordPack)((FloatPack)((relative >> 2) + Q::kStepBias) + 0x1p23f);
    }
  };
  const WordPack a = quantized(x.a), b = quantized(x.b);
#if defined(__AVX2__) && !defined(__AVX512BW__)
  if constexpr (kOrder == Order::kInOrder && Q::kBits == 8) {
    // The halves of 128 bits change places once, at the end.
    constexpr uint32_t mask = Q::kSigned ? 0xffu : 0xffffu;
    WordPack halves = (WordPack)_mm256_packus_epi32((__m256i)(a & mask), (__m256i)(b & mask));
    if (!Q::kSigned) halves = subtract_to_zero(halves, WordPack{} + 0x00010001u);
    const __m256i bytes = _mm256_packus_epi16((__m256i)halves, (__m256i)halves);
    const __m256i places = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.bytes),
                     _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, places)));
    return;
  }
#endif
  const WordPack codes = to_halves<kOrder, 0>(a, b);
  store_codes(to, Q::kSigned ? codes : subtract_to_zero(codes, WordPack{} + 0x00010001u));
}

FUSEDSTEP_FN WordPack larger(WordPack a, WordPack b) {
  return a > b ? a : b;
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
