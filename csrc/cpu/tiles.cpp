// Widening and narrowing of tiles, compiled once per instruction set (FUSEDSTEP_ISA). It knows storage formats, but no
// rule. The loops over elements are plain ones that the compiler turns into vector code.
// clang-format off
#include "stored.h"  // first, as in engine.cpp
#include "tiles.h"
// clang-format on

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {
namespace {

constexpr int64_t kTile = kBlock;

struct alignas(64) Buffer {
  float numbers[kTile];
};

template <class Visit>
void visit_stored(void* data, Dtype dtype, const Visit& visit) {
  AnyStored<float>{data, dtype}.visit(visit);
}

void widen_plain(const void* data, Dtype dtype, int64_t at, int64_t n, float* to) {
  visit_stored(const_cast<void*>(data), dtype, [&](auto stored) {
    const Stored<float, float> wide{to};
    int64_t i = 0;
    for (; i + kLanes<float> <= n; i += kLanes<float>) wide.store(i, stored.load(at + i));
    if (i < n) wide.store_part(i, n - i, stored.load_part(at + i, n - i));
  });
}

void narrow_plain(void* data, Dtype dtype, int64_t at, int64_t n, const float* from) {
  visit_stored(data, dtype, [&](auto stored) {
    const Stored<float, float> wide{const_cast<float*>(from)};
    int64_t i = 0;
    for (; i + kLanes<float> <= n; i += kLanes<float>) stored.store(at + i, wide.load(i));
    if (i < n) stored.store_part(at + i, n - i, wide.load_part(i, n - i));
  });
}

// 16 random bits for each element of a whole tile, in order: codecs.h's Philox, for all counters at once. Each word of
// a counter has the lower half of a 64-bit lane, whose upper half does not matter: products ignore it.
struct alignas(64) RandomTile {
  static constexpr int kCounters = kTile / kPhiloxElements;
  static constexpr int kLanes64 = kPackBytes / 8, kPacks = kCounters / kLanes64;
  typedef uint64_t LongPack __attribute__((vector_size(kPackBytes)));
  uint16_t bits[kTile];

  RandomTile(uint64_t seed, uint32_t index, uint32_t step, int64_t tile) {
    const uint64_t first = static_cast<uint64_t>(tile) * kCounters;  // a multiple of 32: its lower word does not wrap
    uint64_t pairs[kCounters][2];
    for (int n = 0; n < kPacks; ++n) {
      LongPack c0{}, c1{}, c2{}, c3{};
      for (int i = 0; i < kLanes64; ++i) c0[i] = first + static_cast<uint64_t>(n * kLanes64 + i);
      c1 += first >> 32;
      c2 += index;
      c3 += step;
      uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < kPhiloxRounds; ++round) {
        const LongPack p0 = product(c0, kPhiloxMultipliers[0]), p1 = product(c2, kPhiloxMultipliers[1]);
        c0 = (p1 >> 32) ^ c1 ^ k0;
        c2 = (p0 >> 32) ^ c3 ^ k1;
        c1 = p1;
        c3 = p0;
        k0 += kPhiloxKeySteps[0];
        k1 += kPhiloxKeySteps[1];
      }
      const LongPack low = (c0 & 0xffffffffu) | (c1 << 32), high = (c2 & 0xffffffffu) | (c3 << 32);
      for (int i = 0; i < kLanes64; ++i) {
        pairs[n * kLanes64 + i][0] = low[i];
        pairs[n * kLanes64 + i][1] = high[i];
      }
    }
    static_assert(sizeof(pairs) == sizeof(bits), "a counter has 16 bits for each of its elements");
    std::memcpy(bits, pairs, sizeof(bits));
  }

 private:
  // Of the lower halves.
  FUSEDSTEP_FN static LongPack product(LongPack a, uint32_t b) {
#if defined(__AVX512F__)
    return (LongPack)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (LongPack)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (LongPack)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xffffffffu) * b;
#endif
  }
};

// Calls body(i) for the packs of n numbers, and body(i, rest) for what is left of the last.
template <class Body>
FUSEDSTEP_FN void for_packs(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) body(i, kLanes<float>);
  if (i < n) body(i, n - i);
}

// 16-bit words as the upper halves of 32-bit ones.
template <class S>
FUSEDSTEP_FN WordPack load_upper(const S* from, int64_t n) {
  alignas(64) S part[kLanes<float>];
  if (n < kLanes<float>) load_part_of<kLanes<float>>(part, from, n);
  HalfWordPack halves;
  __builtin_memcpy(&halves, n < kLanes<float> ? part : from, sizeof(halves));
  return widen_words(halves) << 16;
}
template <class S>
FUSEDSTEP_FN void store_upper(S* to, WordPack words, int64_t n) {
  const HalfWordPack halves = upper_halves(words);
  if (n == kLanes<float>) {
    __builtin_memcpy(to, &halves, sizeof(halves));
  } else {
    alignas(64) S part[kLanes<float>];
    __builtin_memcpy(part, &halves, sizeof(halves));
    store_part_of<kLanes<float>>(to, part, n);
  }
}

FUSEDSTEP_FN FloatPack wide_pack(const float* from) {
  return load_pack<float, float>(from);
}

void narrow_at_random(BF16* to, const uint16_t* random, int64_t n, const float* from) {
  for_packs(n, [&](int64_t i, int64_t part) FUSEDSTEP_INLINE {
    HalfWordPack halves{};
    __builtin_memcpy(&halves, random + i, static_cast<size_t>(part) * sizeof(uint16_t));
    store_upper(to + i, stochastic_upper_half<WordPack>(wide_pack(from + i), widen_words(halves)), part);
  });
}

void narrow_at_random(F16* to, const uint16_t* random, int64_t n, const float* from) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow_stochastic<F16>(from[i], random[i]);
}

void widen_split(const BF16* upper, const int16_t* lower, int64_t n, float* to) {
  for_packs(n, [&](int64_t i, int64_t part) FUSEDSTEP_INLINE {
    store_pack<float, float>(to + i, join<FloatPack>(load_upper(upper + i, part), load_upper(lower + i, part)));
  });
}

void narrow_split(BF16* upper, int16_t* lower, int64_t n, const float* from) {
  for_packs(n, [&](int64_t i, int64_t part) FUSEDSTEP_INLINE {
    const Split<WordPack, FloatPack> split(wide_pack(from + i));
    store_upper(upper + i, split.upper, part);
    store_upper(lower + i, split.lower, part);
  });
}

template <class S>
void narrow_compensated(S* to, S* compensation, int64_t n, const float* from) {
  alignas(64) S narrowed[kTile], rest[kTile];
  for_packs(n, [&](int64_t i, int64_t) FUSEDSTEP_INLINE {
    const FloatPack wide = wide_pack(from + i);
    store_pack<float, S>(narrowed + i, wide);
    const FloatPack back = load_pack<float, S>(narrowed + i);
    const WordPack exponent = (WordPack)back & 0x7f800000u;
    store_pack<float, S>(rest + i, exponent != 0x7f800000u ? wide - back : FloatPack{});
  });
  std::memcpy(to, narrowed, static_cast<size_t>(n) * sizeof(S));
  std::memcpy(compensation, rest, static_cast<size_t>(n) * sizeof(S));
}

template <class S>
FUSEDSTEP_FN FloatPack load_rest(const S* from, int64_t n) {
  return Stored<float, S>{const_cast<S*>(from)}.load_part(0, n);
}

template <class S>
void widen_compensated(const S* from, const S* compensation, int64_t n, float* to) {
  for_packs(n, [&](int64_t i, int64_t part) FUSEDSTEP_INLINE {
    const bool whole = part == kLanes<float>;
    const FloatPack sum = whole ? load_pack<float, S>(from + i) + load_pack<float, S>(compensation + i)
                                : load_rest(from + i, part) + load_rest(compensation + i, part);
    store_pack<float, float>(to + i, sum);
  });
}

// A weight, in its form. The fp32 numbers lie in the buffer, or where they are kept.
struct Weight {
  const Record& record;
  Buffer buffer;

  float* load(int64_t at, int64_t n) {
    float* const wide = buffer.numbers;
    void* const companion = record.precision.companion;
    switch (record.precision.form) {
      case Form::kMaster:
        return static_cast<float*>(companion) + at;
      case Form::kSplit: {
        const BF16* const upper = static_cast<const BF16*>(record.param) + at;
        const int16_t* const lower = static_cast<const int16_t*>(companion) + at;
        widen_split(upper, lower, n, wide);
        return wide;
      }
      case Form::kKahan:
        visit_half([&](auto* param) {
          using S = std::remove_pointer_t<decltype(param)>;
          widen_compensated(param + at, static_cast<const S*>(companion) + at, n, wide);
        });
        return wide;
      default:
        if (record.param_dtype == Dtype::kF32) return static_cast<float*>(record.param) + at;
        widen_plain(record.param, record.param_dtype, at, n, wide);
        return wide;
    }
  }

  void store(int64_t at, int64_t n, int64_t step, const float* wide) const {
    void* const companion = record.precision.companion;
    switch (record.precision.form) {
      case Form::kSplit: {
        BF16* const upper = static_cast<BF16*>(record.param) + at;
        int16_t* const lower = static_cast<int16_t*>(companion) + at;
        return narrow_split(upper, lower, n, wide);
      }
      case Form::kKahan:
        return visit_half([&](auto* param) {
          using S = std::remove_pointer_t<decltype(param)>;
          narrow_compensated(param + at, static_cast<S*>(companion) + at, n, wide);
        });
      case Form::kStochastic: {
        const Precision& precision = record.precision;
        const RandomTile random(precision.seed, precision.index, static_cast<uint32_t>(step), at / kTile);
        return visit_half([&](auto* param) { narrow_at_random(param + at, random.bits + at % kTile, n, wide); });
      }
      default:
        if (record.param_dtype != Dtype::kF32) narrow_plain(record.param, record.param_dtype, at, n, wide);
    }
  }

 private:
  template <class Visit>
  void visit_half(const Visit& visit) const {
    if (record.param_dtype == Dtype::kBF16)
      visit(static_cast<BF16*>(record.param));
    else
      visit(static_cast<F16*>(record.param));
  }
};

// Bytes as packs of numbers, and the lowest bytes of a pack of words.
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
void decode_block(const Code* codes, float scale, int64_t n, float* to) {
  alignas(64) Code padded[kTile];
  const Code* from = codes;
  if (n < kTile) {
    std::memset(padded, 0, sizeof(padded));
    from = static_cast<const Code*>(std::memcpy(padded, codes, static_cast<size_t>(n)));
  }
  for (int64_t i = 0; i < kTile; i += kLanes<float>) {
    const FloatPack code = widen_bytes(from + i);
    const FloatPack wide =
        std::is_signed_v<Code> ? decode_signed<WordPack>(code, scale) : decode_unsigned<WordPack>(code, scale);
    store_pack<float, float>(to + i, wide);
  }
  if (n < kTile) std::memset(to + n, 0, static_cast<size_t>(kTile - n) * sizeof(float));
}

// from: a whole tile, zeros behind the first n numbers.
template <class Code>
void encode_block(Code* codes, float* scale, int64_t n, const float* from) {
  WordPack most{};
  for (int64_t i = 0; i < kTile; i += kLanes<float>) {
    const WordPack magnitude = (WordPack)wide_pack(from + i) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  uint32_t largest = 0;
  for (int i = 0; i < kLanes<float>; ++i) largest = std::max(largest, most[i]);
  const Block block(largest);
  alignas(64) Code padded[kTile];
  Code* const to = n < kTile ? padded : codes;
  for (int64_t i = 0; i < kTile; i += kLanes<float>) {
    const FloatPack wide = wide_pack(from + i);
    store_lowest_bytes(
        to + i, std::is_signed_v<Code> ? encode_signed<WordPack>(wide, block) : encode_unsigned<WordPack>(wide, block));
  }
  if (n < kTile) std::memcpy(codes, padded, static_cast<size_t>(n));
  *scale = Block::scale(largest);
}

// A state, in its format.
struct State {
  void* data;
  float* scales;
  Dtype dtype;
  Buffer buffer;

  float* load(int64_t at, int64_t n) {
    if (dtype == Dtype::kF32) return static_cast<float*>(data) + at;
    if (dtype == Dtype::kI8)
      decode_block(static_cast<const int8_t*>(data) + at, scales[at / kBlock], n, buffer.numbers);
    else if (dtype == Dtype::kU8)
      decode_block(static_cast<const uint8_t*>(data) + at, scales[at / kBlock], n, buffer.numbers);
    else
      widen_plain(data, dtype, at, n, buffer.numbers);
    return buffer.numbers;
  }
  void store(int64_t at, int64_t n) const {
    if (dtype == Dtype::kF32) return;
    if (dtype == Dtype::kI8)
      encode_block(static_cast<int8_t*>(data) + at, scales + at / kBlock, n, buffer.numbers);
    else if (dtype == Dtype::kU8)
      encode_block(static_cast<uint8_t*>(data) + at, scales + at / kBlock, n, buffer.numbers);
    else
      narrow_plain(data, dtype, at, n, buffer.numbers);
  }
};

}  // namespace

void update_tiles(const Record& record, const void* grad, int64_t begin, int64_t end, uint32_t states, int64_t step,
                  bool writes_grad, UpdateTile update, const void* context) {
  Weight weight{record, {}};
  State state[kMaxStates];
  for (int k = 0; k < kMaxStates; ++k) {
    state[k].data = record.states[k];
    state[k].scales = record.precision.scales[k];
    state[k].dtype = record.state_dtypes[k];
  }
  Buffer grad_buffer;
  Record tile = record;
  for (int64_t at = begin, n; at < end; at += n) {
    n = std::min(end, (at / kTile + 1) * kTile) - at;
    const float* wide_grad = static_cast<const float*>(grad) + at;
    if (record.grad_dtype != Dtype::kF32) {
      widen_plain(grad, record.grad_dtype, at, n, grad_buffer.numbers);
      wide_grad = grad_buffer.numbers;
    }
    float* const wide = weight.load(at, n);
    tile.param = wide;
    for (int k = 0; k < kMaxStates; ++k)
      if (states >> k & 1) tile.states[k] = state[k].load(at, n);
    update(tile, wide_grad, n, context);
    weight.store(at, n, step, wide);
    for (int k = 0; k < kMaxStates; ++k)
      if (states >> k & 1) state[k].store(at, n);
    if (writes_grad && record.grad_dtype != Dtype::kF32)
      narrow_plain(const_cast<void*>(grad), record.grad_dtype, at, n, grad_buffer.numbers);
  }
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
