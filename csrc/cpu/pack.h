// Packs of numbers that fill a vector register, and how each stored format is loaded into and stored from them.
// Must come before rules.h and reducing_rules.h: the rules then work on packs as they do on single numbers.
#pragma once

#include "../arithmetic.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fusedstep::cpu {

#if defined(__AVX512F__)
constexpr int kPackBytes = 64;
#elif defined(__AVX__)
constexpr int kPackBytes = 32;
#else
constexpr int kPackBytes = 16;
#endif

}  // namespace fusedstep::cpu

namespace fusedstep {
inline namespace FUSEDSTEP_ISA {

typedef float FloatPack __attribute__((vector_size(cpu::kPackBytes)));
typedef double DoublePack __attribute__((vector_size(cpu::kPackBytes)));
typedef uint32_t WordPack __attribute__((vector_size(cpu::kPackBytes)));
typedef uint16_t HalfWordPack __attribute__((vector_size(cpu::kPackBytes / 2)));

// The arithmetic type T, its pack and how many numbers that holds.
template <class T>
struct PackOf;
template <>
struct PackOf<float> {
  using Pack = FloatPack;
  static constexpr int64_t kLanes = cpu::kPackBytes / 4;
};
template <>
struct PackOf<double> {
  using Pack = DoublePack;
  static constexpr int64_t kLanes = cpu::kPackBytes / 8;
};
template <class T>
using Pack = typename PackOf<T>::Pack;
template <class T>
constexpr int64_t kLanes = PackOf<T>::kLanes;

// Only the forms with a mask: with the plain ones g++ 12 warns about its own headers.
FUSEDSTEP_FN FloatPack square_root(FloatPack x) {
#if defined(__AVX512F__)
  return (FloatPack)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX__)
  return (FloatPack)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (FloatPack)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = square_root(x[i]);
  return x;
#endif
}

FUSEDSTEP_FN DoublePack square_root(DoublePack x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = square_root(x[i]);
  return x;
}

template <class W>
FUSEDSTEP_FN W whole_number(FloatPack x) {
  typedef int32_t IntPack __attribute__((vector_size(cpu::kPackBytes)));
  return (W) __builtin_convertvector(x, IntPack);
}

template <class T, class S>
FUSEDSTEP_FN Pack<T> load_pack(const S* stored) {
  Pack<T> pack;
  if constexpr (sizeof(T) == sizeof(S)) {
    __builtin_memcpy(&pack, stored, sizeof(pack));
  } else {
    for (int i = 0; i < kLanes<T>; ++i) pack[i] = load<T>(stored[i]);
  }
  return pack;
}

#if defined(__AVX512DQ__)
// In two loads: with one for each cache line, AMD's processors are up to 13% slower on tensors beyond their caches.
template <>
FUSEDSTEP_FN FloatPack load_pack<float, float>(const float* stored) {
  const __m256 low = _mm256_loadu_ps(stored), high = _mm256_loadu_ps(stored + 8);
  return (FloatPack)_mm512_maskz_insertf32x8(0xffff, _mm512_castps256_ps512(low), high, 1);
}
#endif

template <class T, class S>
FUSEDSTEP_FN void store_pack(S* stored, Pack<T> pack) {
  if constexpr (sizeof(T) == sizeof(S)) {
    __builtin_memcpy(stored, &pack, sizeof(pack));
  } else {
    for (int i = 0; i < kLanes<T>; ++i) stored[i] = narrow<S>(pack[i]);
  }
}

// Between 16 and 32 bits. With AVX2 the compiler's own choice takes the lanes apart one by one.
FUSEDSTEP_FN WordPack widen_words(HalfWordPack halves) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (WordPack)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  return __builtin_convertvector(halves, WordPack);
#endif
}
FUSEDSTEP_FN HalfWordPack upper_halves(WordPack words) {
#if defined(__AVX512BW__)
  const __m512i odd = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25, 23,
                                       21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return (HalfWordPack)_mm512_castsi512_si256(_mm512_maskz_permutexvar_epi16(0xffffffff, odd, (__m512i)words));
#elif defined(__AVX2__)
  const __m256i halves = _mm256_srli_epi32((__m256i)words, 16);
  const __m256i packed = _mm256_packus_epi32(halves, halves);
  return (HalfWordPack)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(words >> 16, HalfWordPack);
#endif
}

template <>
FUSEDSTEP_FN FloatPack load_pack<float, BF16>(const BF16* stored) {
  HalfWordPack bits;
  __builtin_memcpy(&bits, stored, sizeof(bits));
#if defined(__AVX512BW__)
  const __m512i lanes = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                         3, 0, 2, 0, 1, 0, 0, 0);
  return (FloatPack)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, lanes, _mm512_castsi256_si512((__m256i)bits));
#else
  return (FloatPack)(widen_words(bits) << 16);
#endif
}

// x in bf16, as the upper half of each word. Exact: for NaN too.
template <bool kExact>
FUSEDSTEP_FN WordPack round_to_bf16(FloatPack x) {
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)x, most = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_mask_add_epi32(most, odd, most, _mm512_set1_epi32(1));
  if (!kExact) return (WordPack)rounded;
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  return (WordPack)_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
#else
  const WordPack bits = (WordPack)x, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  if (!kExact) return rounded;
  const WordPack quiet_nan = WordPack{} + 0x7fc00000u;
  return x != x ? quiet_nan : rounded;
#endif
}

template <>
FUSEDSTEP_FN void store_pack<float, BF16>(BF16* stored, FloatPack pack) {
  const HalfWordPack narrowed = upper_halves(round_to_bf16<true>(pack));
  __builtin_memcpy(stored, &narrowed, sizeof(narrowed));
}

// fp16: where the processor converts, to the same bits as numeric.h (a NaN stays one, with another payload).
#if defined(__F16C__)
constexpr bool kConvertsF16 = true;
#else
constexpr bool kConvertsF16 = false;
#endif
FUSEDSTEP_FN FloatPack widen_f16(HalfWordPack halves) {
#if defined(__AVX512F__)
  return (FloatPack)_mm512_maskz_cvtph_ps(0xffff, (__m256i)halves);
#elif defined(__F16C__)
  return (FloatPack)_mm256_cvtph_ps((__m128i)halves);
#else
  FloatPack wide{};
  for (int i = 0; i < kLanes<float>; ++i) wide[i] = widen(F16{halves[i]});
  return wide;
#endif
}
FUSEDSTEP_FN HalfWordPack round_to_f16(FloatPack pack) {
  [[maybe_unused]] constexpr int kNearestEven = 8;  // _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC
#if defined(__AVX512F__)
  return (HalfWordPack)_mm512_maskz_cvtps_ph(0xffff, (__m512)pack, kNearestEven);
#elif defined(__F16C__)
  return (HalfWordPack)_mm256_cvtps_ph((__m256)pack, kNearestEven);
#else
  HalfWordPack halves{};
  for (int i = 0; i < kLanes<float>; ++i) halves[i] = narrow<F16>(pack[i]).bits;
  return halves;
#endif
}

template <>
FUSEDSTEP_FN FloatPack load_pack<float, F16>(const F16* stored) {
  HalfWordPack halves;
  __builtin_memcpy(&halves, stored, sizeof(halves));
  return widen_f16(halves);
}
template <>
FUSEDSTEP_FN void store_pack<float, F16>(F16* stored, FloatPack pack) {
  const HalfWordPack halves = round_to_f16(pack);
  __builtin_memcpy(stored, &halves, sizeof(halves));
}

// The last n numbers of a tensor, fewer than a pack: into a whole pack with zeros behind them, and back. With many
// small tensors this is most of the work, so it is worth a masked instruction where there is one.
template <int64_t lanes, class S>
FUSEDSTEP_FN void load_part_of(S* part, const S* stored, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  [[maybe_unused]] const uint32_t mask = (uint32_t{1} << n) - 1;
  if constexpr (sizeof(S) == 4 && lanes == 16)
    return _mm512_store_si512(part, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), stored));
  if constexpr (sizeof(S) == 2 && lanes == 16)
    return _mm256_store_si256(reinterpret_cast<__m256i*>(part),
                              _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), stored));
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 2 && lanes == 8) {  // in pieces, the last one first: a loop would be read back too early
    __m128i pieces = _mm_setzero_si128();
    if (n & 1) pieces = _mm_cvtsi32_si128(bit_cast<uint16_t>(stored[n - 1]));
    if (n & 2) pieces = _mm_or_si128(_mm_slli_si128(pieces, 4), _mm_loadu_si32(stored + (n & 4)));
    if (n & 4)
      pieces = _mm_or_si128(_mm_slli_si128(pieces, 8), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(stored)));
    return _mm_store_si128(reinterpret_cast<__m128i*>(part), pieces);
  }
#endif
  for (int64_t k = 0; k < lanes; ++k) part[k] = k < n ? stored[k] : S{};
}

template <int64_t lanes, class S>
FUSEDSTEP_FN void store_part_of(S* stored, const S* part, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  [[maybe_unused]] const uint32_t mask = (uint32_t{1} << n) - 1;
  if constexpr (sizeof(S) == 4 && lanes == 16)
    return _mm512_mask_storeu_epi32(stored, static_cast<__mmask16>(mask), _mm512_load_si512(part));
  if constexpr (sizeof(S) == 2 && lanes == 16)
    return _mm256_mask_storeu_epi16(stored, static_cast<__mmask16>(mask),
                                    _mm256_load_si256(reinterpret_cast<const __m256i*>(part)));
#endif
  for (int64_t k = 0; k < n; ++k) stored[k] = part[k];
}

template <class T, class S>
FUSEDSTEP_FN Pack<T> load_part(const S* stored, int64_t n) {
  alignas(64) S part[kLanes<T>];
  load_part_of<kLanes<T>>(part, stored, n);
  return load_pack<T, S>(part);
}
template <class T, class S>
FUSEDSTEP_FN void store_part(S* stored, int64_t n, Pack<T> pack) {
  alignas(64) S part[kLanes<T>];
  store_pack<T, S>(part, pack);
  store_part_of<kLanes<T>>(stored, part, n);
}

// fp32 numbers need no memory in between.
#if defined(__AVX512F__)
template <>
FUSEDSTEP_FN FloatPack load_part<float, float>(const float* stored, int64_t n) {
  return (FloatPack)_mm512_maskz_loadu_ps(static_cast<__mmask16>((uint32_t{1} << n) - 1), stored);
}
template <>
FUSEDSTEP_FN void store_part<float, float>(float* stored, int64_t n, FloatPack pack) {
  _mm512_mask_storeu_ps(stored, static_cast<__mmask16>((uint32_t{1} << n) - 1), (__m512)pack);
}
#elif defined(__AVX2__)
FUSEDSTEP_FN __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
FUSEDSTEP_FN FloatPack load_part<float, float>(const float* stored, int64_t n) {
  return (FloatPack)_mm256_maskload_ps(stored, first_lanes(n));
}
template <>
FUSEDSTEP_FN void store_part<float, float>(float* stored, int64_t n, FloatPack pack) {
  _mm256_maskstore_ps(stored, first_lanes(n), (__m256)pack);
}
#endif

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep
