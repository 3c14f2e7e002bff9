// How numbers are stored, one struct for each way: the arrays that a thread reads and writes raw, and how fp32 numbers
// are joined from them and split into them. No rule and no loop belongs here.
#pragma once

#include <type_traits>

#include "parts.cuh"

namespace fusedstep::cuda {

struct alignas(8) HalfVector {
  uint32_t words[2];
};

// kN numbers of type S as they are in memory.
template <class S, int kN>
struct Array {
  static_assert(sizeof(S) <= 4, "a word holds a number");
  using Number = S;
  using Access = std::conditional_t<sizeof(S) * kN % 16 == 0, Vector, HalfVector>;
  static constexpr int kBytes = sizeof(S) * kN, kAccesses = kBytes / sizeof(Access), kWords = kBytes / 4;
  static constexpr int kPerWord = 4 / sizeof(S), kBits = 8 * sizeof(S);
  static_assert(kBytes % sizeof(Access) == 0, "made of whole accesses");

  uint32_t words[kWords];

  __device__ __forceinline__ void load(const S* data) {
    const Access* const from = global(reinterpret_cast<const Access*>(data));
    Access accesses[kAccesses];
#pragma unroll
    for (int k = 0; k < kAccesses; ++k) accesses[k] = from[k];
    __builtin_memcpy(words, accesses, sizeof(words));
  }
  __device__ __forceinline__ void store(S* data) const {
    Access* const to = global(reinterpret_cast<Access*>(data));
    Access accesses[kAccesses];
    __builtin_memcpy(accesses, words, sizeof(words));
#pragma unroll
    for (int k = 0; k < kAccesses; ++k) to[k] = accesses[k];
  }
  // The first n of them, at any address; the others are zeros.
  __device__ __forceinline__ void load_some(const S* data, int n) {
    clear();
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (i < n) words[i / kPerWord] |= to_word(global(data)[i]) << (i % kPerWord * kBits);
    }
  }
  __device__ __forceinline__ void store_some(S* data, int n) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (i < n) global(data)[i] = from_word(words[i / kPerWord] >> (i % kPerWord * kBits));
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] = 0;
  }
  // What is in it need not be kept.
  __device__ __forceinline__ void forget() {
#if defined(__CUDA_ARCH__)
#pragma unroll
    for (int k = 0; k < kWords; ++k) asm("" : "=r"(words[k]));
#endif
  }

 private:
  using Bits = std::conditional_t<sizeof(S) == 1, uint8_t, std::conditional_t<sizeof(S) == 2, uint16_t, uint32_t>>;
  __device__ __forceinline__ static uint32_t to_word(S number) { return bit_cast<Bits>(number); }
  __device__ __forceinline__ static S from_word(uint32_t word) { return bit_cast<S>(static_cast<Bits>(word)); }
};

// Two numbers in 16 bits each, rounded to nearest even. The GPU's conversion gives another NaN than narrow() does.
template <class S>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  if constexpr (std::is_same_v<S, BF16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return narrow<S>(low).bits | uint32_t{narrow<S>(high).bits} << 16;
#endif
}
template <class S>
__device__ __forceinline__ float widen_half(uint32_t pair, int i) {
  if constexpr (std::is_same_v<S, BF16>) {
    return bit_cast<float>(i == 0 ? pair << 16 : pair & 0xffff0000u);
  } else {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(static_cast<uint16_t>(i == 0 ? pair : pair >> 16)));
    return wide;
#else
    return widen(F16{static_cast<uint16_t>(i == 0 ? pair : pair >> 16)});
#endif
  }
}

// An array of numbers that stand for themselves.
template <class S, int kN>
struct Numbers : Array<S, kN> {
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(S) == 4)
      return bit_cast<float>(this->words[i]);
    else
      return widen_half<S>(this->words[i / 2], i % 2);
  }
  __device__ __forceinline__ void put(const float* from) {
    if constexpr (sizeof(S) == 4) {
#pragma unroll
      for (int i = 0; i < kN; ++i) this->words[i] = bit_cast<uint32_t>(from[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) this->words[i] = narrow_pair<S>(from[2 * i], from[2 * i + 1]);
    }
  }
};

// Weights. for_arrays() visits each array and its tensor, with false those that are only written; join() gives fp32
// numbers, and split() takes new ones, of step `step` and from element i on, and leaves in their place what averages
// and copies follow. No address stays in a register.

template <class S, int kN>
struct PlainWeight {
  Numbers<S, kN> stored;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, Visitor&& visitor) {
    visitor(stored, static_cast<S*>(record.param));
  }
  __device__ __forceinline__ void join(float* to) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = stored[i];
  }
  __device__ __forceinline__ void split(float* from, const Record&, int64_t, uint32_t) {
    stored.put(from);
    join(from);
  }
};

template <int kN>
struct MasterWeight {
  Numbers<BF16, kN> stored;
  Numbers<float, kN> master;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, Visitor&& visitor) {
    visitor(stored, static_cast<BF16*>(record.param), false);
    visitor(master, static_cast<float*>(record.precision.companion));
  }
  __device__ __forceinline__ void join(float* to) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = master[i];
  }
  __device__ __forceinline__ void split(float* from, const Record&, int64_t, uint32_t) {
    stored.put(from);
    master.put(from);
  }
};

// The halves of fp32 numbers (Split and join in codecs.h), two at a time.
template <int kN>
struct SplitWeight {
  Array<BF16, kN> upper;
  Array<int16_t, kN> lower;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, Visitor&& visitor) {
    visitor(upper, static_cast<BF16*>(record.param));
    visitor(lower, static_cast<int16_t*>(record.precision.companion));
  }
  __device__ __forceinline__ void join(float* to) const {
    uint32_t zeros = 0;  // has a bit set if an upper half is zero, and maybe if one is not
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) zeros |= ((upper.words[k] & 0x7fff7fffu) - 0x00010001u) & 0x80008000u;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const uint32_t high = upper.words[i / 2], low = lower.words[i / 2];
      to[i] = bit_cast<float>(i % 2 == 0 ? (high << 16) + static_cast<int16_t>(low)
                                         : (high & 0xffff0000u) + (static_cast<int32_t>(low) >> 16));
    }
    if (zeros == 0) return;
    // No number is split into zero and a negative rest: what is borrowed is no more than there is.
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const uint32_t both = both_halves(i), borrow = (both & 0x8000u) << 1, magnitude = both & 0x7fffffffu;
      to[i] = bit_cast<float>(both - (magnitude < borrow ? magnitude : borrow));
    }
  }
  __device__ __forceinline__ void split(float* from, const Record&, int64_t, uint32_t) {
#pragma unroll
    for (int i = 0; i < kN; i += 2) {
      const uint32_t low = bits_of(from[i]), high = bits_of(from[i + 1]);
      upper.words[i / 2] = __byte_perm(low + 0x8000u, high + 0x8000u, 0x7632);
      lower.words[i / 2] = __byte_perm(low, high, 0x5410);
    }
  }

 private:
  __device__ __forceinline__ uint32_t both_halves(int i) const {
    return __byte_perm(lower.words[i / 2], upper.words[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
  }
  __device__ __forceinline__ static uint32_t bits_of(float x) {
    return x != x ? 0x7fc00000u : bit_cast<uint32_t>(x);  // one NaN for all
  }
};

template <int kN>
struct KahanWeight {
  Numbers<BF16, kN> stored, rest;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, Visitor&& visitor) {
    visitor(stored, static_cast<BF16*>(record.param));
    visitor(rest, static_cast<BF16*>(record.precision.companion));
  }
  __device__ __forceinline__ void join(float* to) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = stored[i] + rest[i];
  }
  __device__ __forceinline__ void split(float* from, const Record&, int64_t, uint32_t) {
    stored.put(from);
    float left[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float wide = stored[i];
      const bool finite = (bit_cast<uint32_t>(wide) & 0x7f800000u) != 0x7f800000u;
      left[i] = finite ? from[i] - wide : 0.0f;
      from[i] = wide;
    }
    rest.put(left);
  }
};

template <int kN>
struct StochasticWeight : PlainWeight<BF16, kN> {
  __device__ __forceinline__ void split(float* from, const Record& record, int64_t i, uint32_t step) {
    static_assert(kN == kPhiloxElements, "a thread's numbers share a counter");
    const Philox random(record.precision.seed, record.precision.index, step,
                        static_cast<uint64_t>(record.precision.place.element(i)) / kPhiloxElements);
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      const uint32_t low = stochastic_upper_half<uint32_t>(from[j], random.bits(j));
      const uint32_t high = stochastic_upper_half<uint32_t>(from[j + 1], random.bits(j + 1));
      this->stored.words[j / 2] = __byte_perm(low, high, 0x7632);
    }
    this->join(from);
  }
};

// States, by the same functions.

template <class S, int kN>
struct PlainState {
  Numbers<S, kN> stored;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, int k, Visitor&& visitor) {
    visitor(stored, static_cast<S*>(record.states[k]));
  }
  __device__ __forceinline__ uint64_t address_of_scales(const Record&, int) const { return 0; }
  __device__ __forceinline__ void load_scale(const Record&, int, uint32_t) {}
  __device__ __forceinline__ void join(float* to) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = stored[i];
  }
  __device__ __forceinline__ void split(const float* from, const Record&, int, int64_t, int) { stored.put(from); }
};

// Blocks that share a scale. No memory holds 2^40 numbers.
__device__ __forceinline__ uint32_t block_of(int64_t i) {
  return static_cast<uint32_t>(static_cast<uint64_t>(i) / kBlock);
}
__device__ __forceinline__ uint32_t place_in_block(int64_t i) {
  return static_cast<uint32_t>(i) % kBlock;
}

// Codes of 8 bits: a warp holds a block. A byte becomes a float as the lowest of 2^23 + byte, which takes no
// conversion.
template <class S, int kN>
struct CodedState {
  static constexpr bool kSigned = std::is_signed_v<S>;
  static_assert(kN * kWarp == kBlock, "a warp holds a block");
  Array<S, kN> codes;
  float scale;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, int k, Visitor&& visitor) {
    visitor(codes, static_cast<S*>(record.states[k]));
  }
  __device__ __forceinline__ uint64_t address_of_scales(const Record& record, int k) const {
    return reinterpret_cast<uint64_t>(record.precision.scales[k]);
  }
  __device__ __forceinline__ void load_scale(const Record& record, int k, uint32_t block) {
    scale = global(record.precision.scales[k])[block];
  }
  __device__ __forceinline__ void join(float* to) const {
    if constexpr (!kSigned) {
      // The codes, plus 1.
#pragma unroll
      for (int i = 0; i < kN; ++i)
        to[i] = decode_unsigned<uint32_t>(above(codes.words[i / 4], i % 4) - 8388607.0f, scale);
      return;
    }
    uint32_t zeros = 0;  // has a bit set if a code is zero, and maybe if none is
#pragma unroll
    for (int k = 0; k < kN / 4; ++k) zeros |= (codes.words[k] - 0x01010101u) & ~codes.words[k];
#pragma unroll
    for (int i = 0; i < kN; ++i)
      to[i] = decode_nonzero<uint32_t>(above(codes.words[i / 4] ^ 0x80808080u, i % 4) - 8388736.0f, scale);
    if ((zeros & 0x80808080u) == 0) return;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if ((codes.words[i / 4] >> (i % 4 * 8) & 0xffu) == 0) to[i] = 0.0f * scale;
    }
  }
  __device__ __forceinline__ void split(const float* from, const Record& record, int k, int64_t at, int n) {
    float size = 0.0f;  // the largest, or NaN if one is
    if (n >= kN) {
#pragma unroll
      for (int i = 0; i < kN; ++i) size = larger_size(size, from[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kN; ++i) size = larger_size(size, i < n ? from[i] : 0.0f);
    }
    const uint32_t largest = warp_maximum(bit_cast<uint32_t>(size));
    const Block block(largest);
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      uint32_t c[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float relative = size_of(from[i + j]) * block.inverse;
        c[j] = kSigned ? encode_relative_signed<uint32_t>(relative, bit_cast<uint32_t>(from[i + j]))
                       : encode_relative_unsigned<uint32_t>(relative);
      }
      const uint32_t four = __byte_perm(__byte_perm(c[0], c[1], 0x0040), __byte_perm(c[2], c[3], 0x0040), 0x5410);
      codes.words[i / 4] = block.keep != 0 ? four : 0u;
    }
    if (place_in_block(at) == 0 && n > 0) global(record.precision.scales[k])[block_of(at)] = Block::scale(largest);
  }

 private:
  // 2^23 + byte i. The number comes first, for an instruction has room for one constant, and the places are others.
  __device__ __forceinline__ static float above(uint32_t word, int i) {
    return bit_cast<float>(__byte_perm(0x4b000000u, word, 0x3004u + i));
  }
  __device__ __forceinline__ static float size_of(float x) {
#if defined(__CUDA_ARCH__)
    return fabsf(x);
#else
    return bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu);
#endif
  }
  // A NaN in either is one in the result, without a sign.
  __device__ __forceinline__ static float larger_size(float size, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("{ .reg .f32 other; abs.f32 other, %1; max.NaN.f32 %0, %0, other; }" : "+f"(size) : "f"(x));
    return size;
#else
    const uint32_t a = bit_cast<uint32_t>(size), b = bit_cast<uint32_t>(x) & 0x7fffffffu;
    return bit_cast<float>(a > b ? a : b);
#endif
  }
};

// What a format's names stand for.
template <WeightFormat kWeight, int kN>
struct WeightOf;
template <int kN>
struct WeightOf<WeightFormat::kF32, kN> {
  using Type = PlainWeight<float, kN>;
};
template <int kN>
struct WeightOf<WeightFormat::kBF16, kN> {
  using Type = PlainWeight<BF16, kN>;
};
template <int kN>
struct WeightOf<WeightFormat::kF16, kN> {
  using Type = PlainWeight<F16, kN>;
};
template <int kN>
struct WeightOf<WeightFormat::kMaster, kN> {
  using Type = MasterWeight<kN>;
};
template <int kN>
struct WeightOf<WeightFormat::kSplit, kN> {
  using Type = SplitWeight<kN>;
};
template <int kN>
struct WeightOf<WeightFormat::kKahan, kN> {
  using Type = KahanWeight<kN>;
};
template <int kN>
struct WeightOf<WeightFormat::kStochastic, kN> {
  using Type = StochasticWeight<kN>;
};

template <Dtype kDtype>
struct NumberOf;
template <>
struct NumberOf<Dtype::kF32> {
  using Type = float;
};
template <>
struct NumberOf<Dtype::kBF16> {
  using Type = BF16;
};
template <>
struct NumberOf<Dtype::kF16> {
  using Type = F16;
};

template <Dtype kDtype, int kN>
struct StateOf {
  using Type = PlainState<typename NumberOf<kDtype>::Type, kN>;
};
template <int kN>
struct StateOf<Dtype::kI8, kN> {
  using Type = CodedState<int8_t, kN>;
};
template <int kN>
struct StateOf<Dtype::kU8, kN> {
  using Type = CodedState<uint8_t, kN>;
};

}  // namespace fusedstep::cuda
