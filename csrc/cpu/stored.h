// Tensors as the CPU engines read and write them: a pack of numbers, or a part of one, at a time.
#pragma once

#include "pack.h"

// For lambdas that must be a part of the loop that calls them.
#define FUSEDSTEP_INLINE __attribute__((always_inline))

#define FUSEDSTEP_OUT_OF_LINE __attribute__((noinline))

// The states of one element must live in registers, not in an array in memory.
#define FUSEDSTEP_UNROLL _Pragma("GCC unroll 16")

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

// Numbers stored as S, one pack or a part of one at a time.
template <class T, class S>
struct Stored {
  S* data;

  FUSEDSTEP_FN Pack<T> load(int64_t i) const { return load_pack<T, S>(data + i); }
  FUSEDSTEP_FN void store(int64_t i, Pack<T> pack) const { store_pack<T, S>(data + i, pack); }
  FUSEDSTEP_FN Pack<T> load_part(int64_t i, int64_t n) const { return fusedstep::load_part<T, S>(data + i, n); }
  FUSEDSTEP_FN void store_part(int64_t i, int64_t n, Pack<T> pack) const {
    fusedstep::store_part<T, S>(data + i, n, pack);
  }
};

FUSEDSTEP_FN uint32_t largest_of(WordPack most) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32((__m512i)most);
#elif defined(__AVX2__)
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128((__m256i)most), _mm256_extracti128_si256((__m256i)most, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1))));
#else
  uint32_t max_abs = 0;
  for (int i = 0; i < kLanes<float>; ++i) max_abs = most[i] > max_abs ? most[i] : max_abs;
  return max_abs;
#endif
}

// Numbers whose format is known only now: the switch goes the same way for all of a tensor.
template <class T>
struct AnyStored {
  void* data;
  Dtype dtype;

  template <class Visit>
  FUSEDSTEP_FN auto visit(Visit&& visit) const {
    return visit_number(dtype, [&](auto number) FUSEDSTEP_INLINE {
      using S = decltype(number);
      return visit(Stored<T, S>{static_cast<S*>(data)});
    });
  }
  FUSEDSTEP_FN Pack<T> load(int64_t i) const {
    return visit([&](auto stored) { return stored.load(i); });
  }
  FUSEDSTEP_FN void store(int64_t i, Pack<T> pack) const {
    visit([&](auto stored) { stored.store(i, pack); });
  }
  FUSEDSTEP_FN Pack<T> load_part(int64_t i, int64_t n) const {
    return visit([&](auto stored) { return stored.load_part(i, n); });
  }
  FUSEDSTEP_FN void store_part(int64_t i, int64_t n, Pack<T> pack) const {
    visit([&](auto stored) { stored.store_part(i, n, pack); });
  }
};

// What turns the stored gradient into the rule's: divided by scale, multiplied by the coefficient of clipping, and
// negated to maximize.
template <class T>
struct GradChange {
  bool any, zero, write;  // the stored one is set to zero after it was read, or to what it was changed to
  T scale, factor, sign;  // factor: the coefficient with the sign, which is 1 or -1

  FUSEDSTEP_FN Pack<T> operator()(Pack<T> grad) const { return any ? (grad / scale) * factor : grad; }
};

template <class T, class Call>
FUSEDSTEP_FN GradChange<T> grad_change(const Call& call) {
  const T sign = call.maximize ? T(-1) : T(1);
  const bool any = call.maximize || call.grad_scale != 1.0 || call.coefficient != 1.0;
  return {
      any, call.zero_grads, call.write_grads, static_cast<T>(call.grad_scale), sign * static_cast<T>(call.coefficient),
      sign};
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
