// What every way through a chunk uses: pointers, gradients, teams of threads.
#pragma once

#include "engine.h"

namespace fusedstep::cuda {

constexpr int kWarp = 32;

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
  T scale, factor, sign;  // factor: the coefficient with the sign, which is 1 or -1

  __device__ __forceinline__ T operator()(T grad) const { return any ? (grad / scale) * factor : grad; }
};

// The same as it is known before the kernel runs.
struct GradsBecome {
  const float* scale;
  const double* coefficient;
  bool maximize, zero, write;

  template <class T>
  __device__ __forceinline__ GradChange<T> change() const {
    const T sign = maximize ? T(-1) : T(1);
    const bool any = maximize || scale != nullptr || coefficient != nullptr;
    return {any,
            zero,
            write,
            scale != nullptr ? static_cast<T>(*global(scale)) : T(1),
            coefficient != nullptr ? sign * static_cast<T>(*global(coefficient)) : sign,
            sign};
  }
};

inline GradsBecome grads_become(const Call& call) {
  return {call.grad_scale, call.coefficient, call.maximize, call.zero_grads, call.write_grads};
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

struct alignas(16) Vector {
  uint32_t words[4];
};

}  // namespace fusedstep::cuda
