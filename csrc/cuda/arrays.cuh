// Arrays of numbers as they are stored: what a thread reads and writes raw, and how that becomes fp32 numbers. No rule,
// no record and no loop belongs here.
#pragma once

#include <type_traits>

#include "parts.cuh"

namespace fusedstep::cuda {

struct alignas(8) HalfVector {
  uint32_t words[2];
};
struct alignas(4) QuarterVector {
  uint32_t words[1];
};

// kN numbers of type S as they are in memory.
template <class S, int kN>
struct Array {
  static_assert(sizeof(S) <= 4, "a word holds a number");
  using Number = S;
  using Access = std::conditional_t<sizeof(S) * kN % 16 == 0, Vector,
                                    std::conditional_t<sizeof(S) * kN % 8 == 0, HalfVector, QuarterVector>>;
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

template <class S>
__device__ __forceinline__ uint64_t address_bits(const S* data) {
  return reinterpret_cast<uint64_t>(data);
}
template <class Q>
__device__ __forceinline__ uint64_t address_bits(Codes<Q> data) {
  return address_bits(data.bytes);
}

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

// The number that a dtype stands for.
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

}  // namespace fusedstep::cuda
