// Weights that are more than numbers in their dtype (codecs.h: WeightFormat), read and written two packs at a time like
// WideStored. A loop calls begin_block, if kByBlocks, before it stores to elements of the block of 256 that begins
// there. kLoadDoubts, kNarrowDoubts: whether the short form may be wrong. kNarrowsLong: in so many instructions that a
// loop of its own, whose numbers wait for no division, is quicker.
#pragma once

#include <utility>

#include "../codecs.h"
#include "wide.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

// 16 random bits for each element of a whole block, in order: codecs.h's Philox, for all counters at once. Each word of
// a counter has the lower half of a 64-bit lane, whose upper half does not matter: products ignore it.
class RandomBlock {
 public:
  alignas(64) uint16_t bits[kBlock];

  // For the elements of a record from i on, where a block of it begins.
  FUSEDSTEP_FN void fill(const Precision& p, uint32_t step, int64_t i) {
    const int64_t element = p.element_map.element(i);
    if (element % kBlock == 0 && p.element_map.together(i) >= kBlock)
      fill_block(p.seed, p.index, step, element / kBlock);
    else
      fill_runs(p, step, i);
  }

 private:
  void fill_runs(const Precision& p, uint32_t step, int64_t i) {
    for (int64_t j = 0; j < kBlock;) {
      int64_t element = p.element_map.element(i + j);
      const int64_t left = p.element_map.together(i + j), end = left < kBlock - j ? j + left : kBlock;
      while (j < end) {
        const Philox random(p.seed, p.index, step, static_cast<uint64_t>(element) / kPhiloxElements);
        for (int64_t k = element % kPhiloxElements; k < kPhiloxElements && j < end; ++k, ++j, ++element)
          bits[j] = static_cast<uint16_t>(random.bits(static_cast<int>(k)));
      }
    }
  }

  // In the first two rounds half of the words are the same for all counters. The last one leaves each word where it is
  // stored.
  FUSEDSTEP_FN void fill_block(uint64_t seed, uint32_t index, uint32_t step, int64_t block) {
    const uint64_t first = static_cast<uint64_t>(block) * kCounters;  // a multiple of 32: its lower word does not wrap
    const auto key = [seed](int half, int round) FUSEDSTEP_INLINE {
      return static_cast<uint32_t>(seed >> 32 * half) + static_cast<uint32_t>(round) * kPhiloxKeySteps[half];
    };
    const uint64_t first_product = (first & 0xffffffffu) * kPhiloxMultipliers[0];
    const uint64_t index_product = uint64_t{index} * kPhiloxMultipliers[1];
    const uint32_t c0_of_all =
        static_cast<uint32_t>(index_product >> 32) ^ static_cast<uint32_t>(first >> 32) ^ key(0, 0);
    const uint64_t second_product = uint64_t{c0_of_all} * kPhiloxMultipliers[0];
    const LongPack change_c2 = every(step ^ key(1, 0)), change_c0 = every(index_product ^ key(0, 1)),
                   change_c2_again = every((second_product >> 32) ^ key(1, 1)),
                   change_c2_last = every(second_product ^ key(1, 2));
    LongPack products;
    for (int i = 0; i < kLanes64; ++i) products[i] = first_product + uint64_t{place_of(i)} * kPhiloxMultipliers[0];
    for (int n = 0; n < kPacks; n += kAtOnce) {
      LongPack c0[kAtOnce], c1[kAtOnce], c2[kAtOnce], c3[kAtOnce];
      FUSEDSTEP_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        c3[i] = products + uint64_t{static_cast<uint32_t>((n + i) * kLanes64)} * kPhiloxMultipliers[0];
        c2[i] = (c3[i] >> 32) ^ change_c2;
        c1[i] = product(c2[i], kPhiloxMultipliers[1]);
        c0[i] = (c1[i] >> 32) ^ change_c0;
        c2[i] = c3[i] ^ change_c2_again;
      }
      FUSEDSTEP_UNROLL
      for (int round = 2; round < kPhiloxRounds - 1; ++round) {
        const uint64_t k0 = key(0, round), k1 = key(1, round);
        FUSEDSTEP_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const LongPack p0 = product(c0[i], kPhiloxMultipliers[0]), p1 = product(c2[i], kPhiloxMultipliers[1]);
          c0[i] = (p1 >> 32) ^ c1[i] ^ k0;
          c2[i] = round == 2 ? (p0 >> 32) ^ change_c2_last : (p0 >> 32) ^ c3[i] ^ k1;
          c1[i] = p1;
          c3[i] = p0;
        }
      }
      const uint64_t k0 = key(0, kPhiloxRounds - 1), k1 = key(1, kPhiloxRounds - 1);
      FUSEDSTEP_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const LongPack p0 = product(c0[i], kPhiloxMultipliers[0]), p1 = product(c2[i], kPhiloxMultipliers[1]);
        const LongPack low = swapped(p1, AllHalves{}) ^ ((c1[i] & 0xffffffffu) ^ k0);
        const LongPack high = swapped(p0, AllHalves{}) ^ ((c3[i] & 0xffffffffu) ^ k1);
        const LongPack words[2] = {alternating<0>(low, high, AllLanes{}), alternating<1>(low, high, AllLanes{})};
        static_assert(kPacks * sizeof(words) == sizeof(bits), "a counter has 16 bits for each of its elements");
        __builtin_memcpy(reinterpret_cast<char*>(bits) + static_cast<size_t>(n + i) * sizeof(words), words,
                         sizeof(words));
      }
    }
  }

  static constexpr int kAtOnce = 4;  // a round waits for the one before, but not for other counters
  static constexpr int kCounters = kBlock / kPhiloxElements;
  static constexpr int kLanes64 = kPackBytes / 8, kPacks = kCounters / kLanes64;
  typedef uint64_t LongPack __attribute__((vector_size(kPackBytes)));
  using AllLanes = std::make_index_sequence<kLanes64>;
  using AllHalves = std::make_index_sequence<2 * kLanes64>;

  // Which counter of a pack a lane has: `alternating` then puts them in order.
  static constexpr uint32_t place_of(int lane) {
    return static_cast<uint32_t>(lane % 2 * (kLanes64 / 2) + lane / 2);
  }
  FUSEDSTEP_FN static LongPack every(uint64_t word) { return LongPack{} + word; }

  // Of each two lanes the first (kFrom 0) or the second, one number of each pack in turn.
  template <size_t kFrom, size_t... i>
  FUSEDSTEP_FN static LongPack alternating(LongPack a, LongPack b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (kFrom + i / 2 * 2 + i % 2 * kLanes64)...);
  }
  // The halves of each lane change places.
  template <size_t... i>
  FUSEDSTEP_FN static LongPack swapped(LongPack x, std::index_sequence<i...>) {
    return (LongPack)__builtin_shufflevector((WordPack)x, (WordPack)x, (i ^ 1)...);
  }

  // Multiplies the lower halves.
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

template <class S, Order kOrder>
struct PlainWeight : WideStored<S, kOrder> {
  static constexpr bool kLoadDoubts = false, kNarrowDoubts = std::is_same_v<S, BF16>, kNarrowsLong = false;
  static constexpr bool kByBlocks = false;
  PlainWeight(const Record& record, int64_t) : WideStored<S, kOrder>{static_cast<S*>(record.param)} {}
};

template <class S, Order kOrder>
struct MasterWeight {
  static constexpr bool kLoadDoubts = false, kNarrowDoubts = std::is_same_v<S, BF16>, kNarrowsLong = false;
  static constexpr bool kByBlocks = false;
  WideStored<S, kOrder> rounded;
  WideStored<float, kOrder> master;

  MasterWeight(const Record& record, int64_t)
      : rounded{static_cast<S*>(record.param)}, master{static_cast<float*>(record.precision.aux)} {}

  struct Narrowed {
    Wide master;
    typename WideStored<S, kOrder>::Narrowed rounded;
  };
  template <bool kExact>
  FUSEDSTEP_FN Wide load(int64_t i) const {
    return master.template load<kExact>(i);
  }
  template <bool kExact>
  FUSEDSTEP_FN Narrowed narrow(int64_t i, const Wide& x, Doubt& doubt) const {
    return {x, rounded.template narrow<kExact>(i, x, doubt)};
  }
  FUSEDSTEP_FN void store(int64_t i, const Narrowed& x) const {
    master.store(i, x.master);
    rounded.store(i, x.rounded);
  }
};

template <Order kOrder>
struct SplitWeight {
  static constexpr bool kLoadDoubts = true, kNarrowDoubts = true, kNarrowsLong = false;
  static constexpr bool kByBlocks = false;
  BF16* upper;
  int16_t* lower;

  SplitWeight(const Record& record, int64_t)
      : upper(static_cast<BF16*>(record.param)), lower(static_cast<int16_t*>(record.precision.aux)) {}

  // Whether n numbers from i on, a multiple of kWide, have a zero with a negative rest, of which the short form makes
  // a NaN.
  FUSEDSTEP_FN bool doubts_load(int64_t i, int64_t n) const {
    typedef uint16_t Halves __attribute__((vector_size(kPackBytes)));
    WordPack found{};
    for (const int64_t end = i + n; i < end; i += kWide) {
      const Halves high = (Halves)load_words(upper + i), low = (Halves)load_words(lower + i);
      found |= (WordPack)((Halves)(high + high == 0) & low);
    }
    return any_bit(found & 0x80008000u);
  }
  template <bool kExact>
  FUSEDSTEP_FN Wide load(int64_t i) const {
    const WideWords high = load_upper_halves<kOrder>(upper + i), low = load_upper_halves<kOrder>(lower + i);
    if (kExact) return {join<FloatPack>(high.a, low.a), join<FloatPack>(high.b, low.b)};
    return {(FloatPack)(high.a + (WordPack)((IntPack)low.a >> 16)),
            (FloatPack)(high.b + (WordPack)((IntPack)low.b >> 16))};
  }
  template <bool kExact>
  FUSEDSTEP_FN WideWords narrow(int64_t, const Wide& x, Doubt& doubt) const {
    if (kExact) {
      const Split<WordPack, FloatPack> a(x.a), b(x.b);
      return {to_halves<kOrder, 16>(a.upper, b.upper), to_halves<kOrder, 16>(a.lower, b.lower)};
    }
    doubt.nan_in(x);
    const WordPack a = (WordPack)x.a, b = (WordPack)x.b;
    return {to_halves<kOrder, 16>(a + 0x8000u, b + 0x8000u), to_halves<kOrder, 0>(a, b)};
  }
  FUSEDSTEP_FN void prefetch(int64_t i, int64_t n) const {
    prefetch_numbers(upper + i, n);
    prefetch_numbers(lower + i, n);
  }
  FUSEDSTEP_FN void store(int64_t i, const WideWords& words) const {
    store_words(upper + i, words.a);
    store_words(lower + i, words.b);
  }
};

// What rounding has lost is kept in the same format, and added before the next update.
template <class S, Order kOrder>
struct KahanWeight {
  static constexpr bool kLoadDoubts = false, kNarrowDoubts = true, kNarrowsLong = true;
  static constexpr bool kByBlocks = false;
  WideStored<S, kOrder> rounded, compensation;

  KahanWeight(const Record& record, int64_t)
      : rounded{static_cast<S*>(record.param)}, compensation{static_cast<S*>(record.precision.aux)} {}

  struct Narrowed {
    typename WideStored<S, kOrder>::Narrowed rounded, compensation;
  };
  template <bool kExact>
  FUSEDSTEP_FN Wide load(int64_t i) const {
    const Wide x = rounded.template load<kExact>(i), rest = compensation.template load<kExact>(i);
    return {x.a + rest.a, x.b + rest.b};
  }
  template <bool kExact>
  FUSEDSTEP_FN Narrowed narrow(int64_t i, const Wide& x, Doubt& doubt) const {
    Doubt finite;  // what is left of a finite number is finite, and so is that in the stored format
    const auto narrowed = rounded.template narrow<kExact>(i, x, finite);
    const Wide back = rounded.widen(narrowed);
    Wide rest{x.a - back.a, x.b - back.b};
    if (kExact)
      rest = {is_finite(back.a) ? rest.a : FloatPack{}, is_finite(back.b) ? rest.b : FloatPack{}};
    else
      doubt.nan_in({rest.a - rest.a, rest.b - rest.b});
    return {narrowed, compensation.template narrow<kExact>(i, rest, finite)};
  }
  FUSEDSTEP_FN void store(int64_t i, const Narrowed& x) const {
    rounded.store(i, x.rounded);
    compensation.store(i, x.compensation);
  }

 private:
  FUSEDSTEP_FN static auto is_finite(FloatPack x) { return ((WordPack)x & 0x7f800000u) != 0x7f800000u; }
};

template <class S, Order kOrder>
struct StochasticWeight : WideStored<S, kOrder> {
  static constexpr bool kByBlocks = true;
  static constexpr bool kLoadDoubts = false, kNarrowDoubts = std::is_same_v<S, BF16>, kNarrowsLong = false;
  const Precision& precision;
  const uint32_t step;
  RandomBlock random;

  StochasticWeight(const Record& record, int64_t step)
      : WideStored<S, kOrder>{static_cast<S*>(record.param)},
        precision(record.precision),
        step(static_cast<uint32_t>(step)) {}

  FUSEDSTEP_FN void begin_block(int64_t i) { random.fill(precision, step, i); }

  template <bool kExact>
  FUSEDSTEP_FN WordPack narrow(int64_t i, const Wide& x, Doubt& doubt) const {
    const uint16_t* const from = random.bits + i % kBlock;
    if constexpr (std::is_same_v<S, F16>) {
      HalfWordPack halves[2];
      __builtin_memcpy(halves, from, sizeof(halves));
      return to_halves<kOrder, 0>(stochastic_f16<WordPack>(x.a, widen_words(halves[0])),
                                  stochastic_f16<WordPack>(x.b, widen_words(halves[1])));
    } else {
      static_assert(kOrder == Order::kEvenOdd, "random numbers are taken apart like weights");
      const WordPack words = load_words(from), a = words & 0xffffu, b = words >> 16;
      if (!kExact) doubt.nan_in(x);
      return kExact ? to_halves<kOrder, 16>(stochastic_upper_half<WordPack>(x.a, a),
                                            stochastic_upper_half<WordPack>(x.b, b))
                    : to_halves<kOrder, 16>((WordPack)x.a + a, (WordPack)x.b + b);
    }
  }
  FUSEDSTEP_FN void store(int64_t i, WordPack halves) const { store_words(this->data + i, halves); }
};

// n numbers of a weight, from element `at` on, from pairs of packs that put_wide has stored.
template <class Weight>
FUSEDSTEP_OUT_OF_LINE void narrow_block_exactly(const Weight& weight, int64_t at, int64_t n, const float* wide) {
  Doubt none;
  for (int64_t i = 0; i < n; i += kWide)
    weight.store(at + i, weight.template narrow<true>(at + i, get_wide(wide + i), none));
}
template <class Weight>
FUSEDSTEP_FN void narrow_block(const Weight& weight, int64_t at, int64_t n, const float* wide) {
  Doubt doubt;
  for (int64_t i = 0; i < n; i += kWide)
    weight.store(at + i, weight.template narrow<false>(at + i, get_wide(wide + i), doubt));
  if (__builtin_expect(doubt.any(), 0)) narrow_block_exactly(weight, at, n, wide);
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
