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

// What turns the stored gradient into the rule's: divided by scale, then multiplied by sign.
template <class T>
struct GradChange {
  bool any, zero;  // zero: the stored one is set to zero after it was read
  T sign, scale;

  __device__ __forceinline__ T operator()(T grad) const { return any ? sign * (grad / scale) : grad; }
};

// Where this thread stands among those that share a chunk.
struct Team {
  int index, size;
};

struct alignas(16) Vector {
  uint32_t words[4];
};

}  // namespace fusedstep::cuda
