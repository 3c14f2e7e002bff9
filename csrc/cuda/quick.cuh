// fp32 numbers that are divided and whose roots are taken without a branch. By themselves, division and square_root()
// look at each number and jump to slow code for very small and very large ones; that keeps the compiler from taking
// several numbers side by side, and costs as much as the arithmetic. Here it is only noted whether one of them would
// have had to jump, for whoever computes them to look once, and to compute them all again as plain float if need be.
#pragma once

#include "parts.cuh"

namespace fusedstep::cuda {

// How far, in bits, the largest of some numbers is above the smallest that is known to come out right. A smaller number
// wraps round to far above. Whether there are any is known when compiled, and costs nothing.
template <uint32_t kSmallest, uint32_t kRange>
struct Farthest {
  uint32_t distance = 0;
  bool any = false;

  __device__ __forceinline__ Farthest with(const Farthest& other) const {
    if (!any) return other;
    if (!other.any) return *this;
    return {distance > other.distance ? distance : other.distance, true};
  }
  __device__ __forceinline__ Farthest with(uint32_t bits) const { return with(Farthest{bits - kSmallest, true}); }
  __device__ __forceinline__ bool is_within() const { return !any || distance < kRange; }
};

// All that was divided or had its root taken on the way to a number, and all divisors. They travel with the number: an
// address of one place for all of them is more than nvcc can see through.
struct Doubts {
  Farthest<0x0d800000u, 160u << 23> numbers;  // 2^-100 to 2^60
  Farthest<0x1f800000u, 88u << 23> divisors;  // 2^-64 to 2^24

  __device__ __forceinline__ Doubts with(const Doubts& other) const {
    return {numbers.with(other.numbers), divisors.with(other.divisors)};
  }
  __device__ __forceinline__ bool none() const { return numbers.is_within() && divisors.is_within(); }
};

struct Quick {
  float value = 0.0f;
  Doubts doubts;

  Quick() = default;
  __device__ __forceinline__ Quick(float x) : value(x) {}
  __device__ __forceinline__ Quick(float x, const Doubts& noted) : value(x), doubts(noted) {}

  // The one that is not taken may not have been taken because it came out wrong.
  friend __device__ __forceinline__ Quick maximum(const Quick& a, const Quick& b) {
    return {fusedstep::maximum(a.value, b.value), a.doubts.with(b.doubts)};
  }
  friend __device__ __forceinline__ Quick minimum(const Quick& a, const Quick& b) {
    return {fusedstep::minimum(a.value, b.value), a.doubts.with(b.doubts)};
  }
};

__device__ __forceinline__ Quick operator+(const Quick& a, const Quick& b) {
  return {a.value + b.value, a.doubts.with(b.doubts)};
}
__device__ __forceinline__ Quick operator-(const Quick& a, const Quick& b) {
  return {a.value - b.value, a.doubts.with(b.doubts)};
}
__device__ __forceinline__ Quick operator*(const Quick& a, const Quick& b) {
  return {a.value * b.value, a.doubts.with(b.doubts)};
}

// Within the ranges no step of these two overflows or underflows, and their results are IEEE's: they are what nvcc
// makes of a division and a root where it need not jump.
__device__ __forceinline__ Quick operator/(const Quick& a, const Quick& b) {
  Doubts doubts = a.doubts.with(b.doubts);
  doubts.numbers = doubts.numbers.with(bit_cast<uint32_t>(a.value) & 0x7fffffffu);
  doubts.divisors = doubts.divisors.with(bit_cast<uint32_t>(b.value));
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
__device__ __forceinline__ Quick square_root(const Quick& x) {
  Doubts doubts = x.doubts;
  doubts.numbers = doubts.numbers.with(bit_cast<uint32_t>(x.value));
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x.value));
  const float root = x.value * inverse, half = inverse * 0.5f;
  return {__fmaf_rn(__fmaf_rn(-root, root, x.value), half, root), doubts};
#else
  return {fusedstep::square_root(x.value), doubts};
#endif
}

__device__ __forceinline__ bool operator>(const Quick& a, const Quick& b) {
  return a.value > b.value;
}
__device__ __forceinline__ bool operator<(const Quick& a, const Quick& b) {
  return a.value < b.value;
}
__device__ __forceinline__ bool operator!=(const Quick& a, const Quick& b) {
  return a.value != b.value;
}

}  // namespace fusedstep::cuda
