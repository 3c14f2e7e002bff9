// How states are stored, by the same functions as weights: one struct for each way. No rule and no loop belongs here.
#pragma once

#include "arrays.cuh"

namespace fusedstep::cuda {

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
__device__ __forceinline__ uint32_t offset_in_block(int64_t i) {
  return static_cast<uint32_t>(i) % kBlock;
}

// kN codes as they are in memory.
template <class Q, int kN>
struct CodeArray : Array<uint8_t, Codes<Q>::size(kN)> {
  using Bytes = Array<uint8_t, Codes<Q>::size(kN)>;

  __device__ __forceinline__ void load(Codes<Q> codes) { Bytes::load(codes.bytes); }
  __device__ __forceinline__ void store(Codes<Q> codes) const { Bytes::store(codes.bytes); }
  __device__ __forceinline__ void load_some(Codes<Q> codes, int n) {
    Bytes::load_some(codes.bytes, static_cast<int>(Codes<Q>::size(n)));
  }
  // What is left of the last byte becomes zero, also with a rule that makes other states of zeros.
  __device__ __forceinline__ void store_some(Codes<Q> codes, int n) const {
    if constexpr (Q::kBits == 8) return Bytes::store_some(codes.bytes, n);
    CodeArray some = *this;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (i >= n) some.words[i * Q::kBits / 32] &= ~(((1u << Q::kBits) - 1) << (i * Q::kBits % 32));
    }
    some.Bytes::store_some(codes.bytes, static_cast<int>(Codes<Q>::size(n)));
  }
};

// Codes: a warp holds a block. A code becomes a float as the lowest bits of 2^23 + code, which takes no conversion.
template <class Q, int kN>
struct QuantizedState {
  static constexpr int kPerWord = 32 / Q::kBits;
  static constexpr uint32_t kOnes = 0xffffffffu / ((1u << Q::kBits) - 1);  // a 1 in each code of a word
  static constexpr uint32_t kSigns = kOnes << (Q::kBits - 1);
  static constexpr float kMiddle = 8388608.0f + (1 << (Q::kBits - 1));
  static_assert(kN * kWarp == kBlock, "a warp holds a block");
  CodeArray<Q, kN> codes;
  float scale;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, int k, Visitor&& visitor) {
    visitor(codes, Codes<Q>{static_cast<uint8_t*>(record.states[k])});
  }
  __device__ __forceinline__ uint64_t address_of_scales(const Record& record, int k) const {
    return reinterpret_cast<uint64_t>(record.precision.scales[k]);
  }
  __device__ __forceinline__ void load_scale(const Record& record, int k, uint32_t block) {
    scale = global(record.precision.scales[k])[block];
  }
  __device__ __forceinline__ void join(float* to) const {
    if constexpr (!Q::kSigned) {
      // The codes, plus 1.
#pragma unroll
      for (int i = 0; i < kN; ++i)
        to[i] = Q::template dequantize_nonzero<uint32_t>(above(codes.words[i / kPerWord], i % kPerWord) - 8388607.0f,
                                                         scale);
      return;
    }
    uint32_t zeros = 0;  // has a bit set if a code is zero, and maybe if none is
#pragma unroll
    for (int k = 0; k < kN / kPerWord; ++k) zeros |= (codes.words[k] - kOnes) & ~codes.words[k];
#pragma unroll
    for (int i = 0; i < kN; ++i)
      to[i] = Q::template dequantize_nonzero<uint32_t>(
          above(codes.words[i / kPerWord] ^ kSigns, i % kPerWord) - kMiddle, scale);
    if ((zeros & kSigns) == 0) return;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if ((codes.words[i / kPerWord] >> (i % kPerWord * Q::kBits) & ((1u << Q::kBits) - 1)) == 0) to[i] = 0.0f * scale;
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
    const uint32_t max_abs = warp_maximum(bit_cast<uint32_t>(size));
    const Block block(max_abs);
#pragma unroll
    for (int i = 0; i < kN; i += kPerWord) {
      uint32_t c[kPerWord];
#pragma unroll
      for (int j = 0; j < kPerWord; ++j)
        c[j] = Q::template quantize_relative<uint32_t>(size_of(from[i + j]) * block.inverse,
                                                       bit_cast<uint32_t>(from[i + j]));
      codes.words[i / kPerWord] = block.keep != 0 ? word_of(c) : 0u;
    }
    if (offset_in_block(at) == 0 && n > 0) global(record.precision.scales[k])[block_of(at)] = Block::scale(max_abs);
  }

 private:
  // 2^23 + code i. Of bytes the number comes first, for an instruction has room for one constant, and the places are
  // others.
  __device__ __forceinline__ static float above(uint32_t word, int i) {
    if constexpr (Q::kBits == 8) return bit_cast<float>(__byte_perm(0x4b000000u, word, 0x3004u + i));
    return bit_cast<float>((word >> (i * Q::kBits) & ((1u << Q::kBits) - 1)) | 0x4b000000u);
  }
  // The lowest bits of each.
  __device__ __forceinline__ static uint32_t word_of(const uint32_t (&c)[kPerWord]) {
    if constexpr (Q::kBits == 8)
      return __byte_perm(__byte_perm(c[0], c[1], 0x0040), __byte_perm(c[2], c[3], 0x0040), 0x5410);
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) word |= (c[j] & ((1u << Q::kBits) - 1)) << (j * Q::kBits);
    return word;
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

// What the dtype of a state stands for.
template <Dtype kDtype, int kN, bool kQuantized = is_quantized(kDtype)>
struct StateOf {
  using Type = PlainState<typename NumberOf<kDtype>::Type, kN>;
};
template <Dtype kDtype, int kN>
struct StateOf<kDtype, kN, true> {
  using Type = QuantizedState<Quantizer<bits_of(kDtype), is_signed_code(kDtype)>, kN>;
};

}  // namespace fusedstep::cuda
