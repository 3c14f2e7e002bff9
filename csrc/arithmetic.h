// The operations that rules are made of, beside + - * /: with the same bits wherever they run, as those of
// python/fusedstep/numerics.py. No number format (numeric.h), no rule and no engine belongs here; an engine that
// computes with numbers of its own, vectors for instance, brings their square_root().
#pragma once

#include <cstdint>

#include "numeric.h"

namespace fusedstep {
inline namespace FUSEDSTEP_ISA {

#if defined(__CUDA_ARCH__)
FUSEDSTEP_FN float square_root(float x) {
  return __fsqrt_rn(x);
}
FUSEDSTEP_FN double square_root(double x) {
  return __dsqrt_rn(x);
}
#else
FUSEDSTEP_FN float square_root(float x) {
  return __builtin_sqrtf(x);
}
FUSEDSTEP_FN double square_root(double x) {
  return __builtin_sqrt(x);
}
#endif

// base^exponent by squaring: only IEEE multiplications, hence the same bits wherever it runs.
FUSEDSTEP_FN double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

template <class T>
FUSEDSTEP_FN T maximum(T a, T b) {  // NaN wins, as in torch.maximum
  return ((b > a) | (b != b)) ? b : a;
}

template <class T>
FUSEDSTEP_FN T minimum(T a, T b) {
  return ((b < a) | (b != b)) ? b : a;
}

// From `a` to `b` as torch.lerp goes: exactly there for a weight of 1.
template <class T, class W>
FUSEDSTEP_FN T interpolate(T a, T b, W weight) {
  return weight < W(0.5) ? a + weight * (b - a) : b - (b - a) * (W(1) - weight);
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep
