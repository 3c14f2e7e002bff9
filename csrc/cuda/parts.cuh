// What every kernel uses: pointers, numbers of any dtype, gradients, teams of threads.
#pragma once

#include <type_traits>

#include "engine.h"

namespace fusedstep::cuda {

// Pointers that come from a table are generic to the compiler; knowing better gives it the global memory instructions.
template <class S>
__device__ __forceinline__ S* global(S* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// What turns the stored gradient into the rule's: divided by scale, multiplied by the coefficient of clipping, and
// negated to maximize.
template <class T>
struct GradChange {
  bool any, zero, write;  // the stored one is set to zero after it was read, or to what it was changed to
  bool divides;           // by scale, or that is 1
  T scale, factor, sign;  // factor: the coefficient with the sign, which is 1 or -1

  __device__ __forceinline__ T operator()(T grad) const {
    return any ? (divides ? grad / scale : grad) * factor : grad;
  }
};

template <class T>
__device__ __forceinline__ GradChange<T> grad_change(const Step& step) {
  const bool divides = step.grad_scale != nullptr, multiplies = step.coefficient != nullptr;
  const T sign = step.maximize ? T(-1) : T(1);
  return {step.maximize || divides || multiplies,
          step.zero_grads,
          step.write_grads,
          divides,
          divides ? static_cast<T>(*global(step.grad_scale)) : T(1),
          multiplies ? sign * static_cast<T>(*global(step.coefficient)) : sign,
          sign};
}

// Between what a thread (and whoever it has met at a barrier) has written and a counter that tells other blocks of it;
// and between such a counter and what is then read.
__device__ __forceinline__ void fence() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
  __threadfence();
#endif
}

// Where this thread stands among those that share a chunk: a block, or a warp.
struct Team {
  int index, size;

  __device__ __forceinline__ void wait() const {
    if (size == kWarp)
      __syncwarp();
    else
      __syncthreads();
  }
};

// The largest of a warp's numbers, known to all of its lanes.
__device__ __forceinline__ uint32_t warp_maximum(uint32_t mine) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, mine);
#else
#pragma unroll
  for (unsigned lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, lanes);
    mine = other > mine ? other : mine;
  }
  return mine;
#endif
}

struct alignas(16) Vector {
  uint32_t words[4];
};

template <class T>
__device__ __forceinline__ T load_any(const void* data, Dtype dtype, int64_t i) {
  return visit_number(dtype,
                      [&](auto stored) { return load<T>(global(static_cast<const decltype(stored)*>(data))[i]); });
}

template <class T>
__device__ __forceinline__ void store_any(void* data, Dtype dtype, int64_t i, T value) {
  visit_number(dtype, [&](auto stored) {
    using S = decltype(stored);
    global(static_cast<S*>(data))[i] = narrow<S>(value);
  });
}

// kN numbers stored as S, by 16-byte accesses.
template <int kN, class S>
struct Pack {
  static constexpr int kVectors = kN * static_cast<int>(sizeof(S)) / 16;
  static_assert(kVectors * 16 == kN * static_cast<int>(sizeof(S)), "a pack is made of whole vectors");
  union {
    Vector vectors[kVectors];
    S numbers[kN];
  };

  __device__ __forceinline__ void load(const S* from) {
    const Vector* source = global(reinterpret_cast<const Vector*>(from));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) vectors[v] = source[v];
  }
  __device__ __forceinline__ void store(S* to) const {
    Vector* target = global(reinterpret_cast<Vector*>(to));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) target[v] = vectors[v];
  }
};

// The numbers of a pack as fp32 arithmetic has them: of bf16 one instruction each.
template <int kN, class S>
__device__ __forceinline__ void unpack(const Pack<kN, S>& pack, float* numbers) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    if constexpr (std::is_same_v<S, BF16>) {
      const uint32_t both = pack.vectors[i / 8].words[i % 8 / 2];
      numbers[i] = bit_cast<float>(i % 2 != 0 ? both & 0xffff0000u : both << 16);
    } else {
      numbers[i] = load<float>(pack.numbers[i]);
    }
  }
}

}  // namespace fusedstep::cuda
