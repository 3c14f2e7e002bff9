// fp32 numbers that are divided and whose roots are taken without a branch. By themselves, division and square_root()
// look at each number and jump to slow code for very small and very large ones; that keeps the compiler from taking
// several numbers side by side, and costs as much as the arithmetic. Here it is only noted whether one of them would
// have had to jump, for whoever computes them to look once, and to compute them all again as plain float if need be.
#pragma once

#include "parts.cuh"

namespace fusedstep::cuda {

// Of the bits of all that was divided or had its root taken, and of all divisors: how far above the smallest that are
// known to come out right. What is smaller wraps round to far above.
struct Doubts {
  static constexpr uint32_t kSmallest = 0x0d800000u, kSmallestDivisor = 0x1f800000u;  // 2^-100, 2^-64
  static constexpr uint32_t kRange = 160u << 23, kRangeOfDivisors = 88u << 23;        // to 2^60, to 2^24
  uint32_t numbers = 0, divisors = 0;

  __device__ __forceinline__ void note(uint32_t bits) { numbers = larger(numbers, bits - kSmallest); }
  __device__ __forceinline__ void note_divisor(uint32_t bits) { divisors = larger(divisors, bits - kSmallestDivisor); }
  __device__ __forceinline__ bool none() const { return numbers < kRange && divisors < kRangeOfDivisors; }

 private:
  __device__ __forceinline__ static uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
};

struct Quick {
  float value = 0.0f;
  Doubts* doubts = nullptr;  // null: a constant; known when compiled

  Quick() = default;
  __device__ __forceinline__ Quick(float x) : value(x) {}
  __device__ __forceinline__ Quick(float x, Doubts* noted) : value(x), doubts(noted) {}
  __device__ __forceinline__ Doubts* doubts_with(const Quick& other) const {
    return doubts != nullptr ? doubts : other.doubts;
  }
};

__device__ __forceinline__ Quick operator+(Quick a, Quick b) {
  return {a.value + b.value, a.doubts_with(b)};
}
__device__ __forceinline__ Quick operator+(Quick a, float b) {
  return {a.value + b, a.doubts};
}
__device__ __forceinline__ Quick operator+(float a, Quick b) {
  return {a + b.value, b.doubts};
}
__device__ __forceinline__ Quick operator-(Quick a, Quick b) {
  return {a.value - b.value, a.doubts_with(b)};
}
__device__ __forceinline__ Quick operator-(Quick a, float b) {
  return {a.value - b, a.doubts};
}
__device__ __forceinline__ Quick operator-(float a, Quick b) {
  return {a - b.value, b.doubts};
}
__device__ __forceinline__ Quick operator*(Quick a, Quick b) {
  return {a.value * b.value, a.doubts_with(b)};
}
__device__ __forceinline__ Quick operator*(Quick a, float b) {
  return {a.value * b, a.doubts};
}
__device__ __forceinline__ Quick operator*(float a, Quick b) {
  return {a * b.value, b.doubts};
}

// Within the ranges no step of these two overflows or underflows, and their results are IEEE's: they are what nvcc
// makes of a division and a root where it need not jump.
__device__ __forceinline__ Quick operator/(Quick a, Quick b) {
  Doubts* const doubts = a.doubts_with(b);
  doubts->note(bit_cast<uint32_t>(a.value) & 0x7fffffffu);
  doubts->note_divisor(bit_cast<uint32_t>(b.value));
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b.value));
  reciprocal = __fmaf_rn(reciprocal, __fmaf_rn(-b.value, reciprocal, 1.0f), reciprocal);
  const float estimate = a.value * reciprocal;
  return {__fmaf_rn(reciprocal, __fmaf_rn(-b.value, estimate, a.value), estimate), doubts};
#else
  return {a.value / b.value, doubts};
#endif
}
__device__ __forceinline__ Quick square_root(Quick x) {
  x.doubts->note(bit_cast<uint32_t>(x.value));
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x.value));
  const float root = x.value * inverse, half = inverse * 0.5f;
  return {__fmaf_rn(__fmaf_rn(-root, root, x.value), half, root), x.doubts};
#else
  return {fusedstep::square_root(x.value), x.doubts};
#endif
}

__device__ __forceinline__ bool operator>(Quick a, Quick b) {
  return a.value > b.value;
}
__device__ __forceinline__ bool operator<(Quick a, Quick b) {
  return a.value < b.value;
}
__device__ __forceinline__ bool operator!=(Quick a, Quick b) {
  return a.value != b.value;
}

}  // namespace fusedstep::cuda
