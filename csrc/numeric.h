// Number formats: what is stored (fp32, bf16, fp16, fp64) against what is computed in (float, or double for fp64).
// Conversions use integer operations only, so that every compiler and device gives the same bits and can vectorise
// them. No optimizer and no engine belongs here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDSTEP_FN __host__ __device__ __forceinline__
#else
#define FUSEDSTEP_FN inline __attribute__((always_inline))
#endif

// The CPU engine is compiled once per instruction set. Each copy lives in a namespace of its own: otherwise the linker
// would keep one of several equally named inline functions, perhaps the one with instructions this machine lacks.
#ifndef FUSEDSTEP_ISA
#define FUSEDSTEP_ISA base
#endif

namespace fusedstep {

// The last five are no numbers by themselves, but codes (codecs.h).
enum class Dtype : uint8_t {
  kF32 = 0,
  kBF16 = 1,
  kF16 = 2,
  kF64 = 3,
  kI8 = 4,
  kU8 = 5,
  kI16 = 6,
  kI4 = 7,  // two in a byte, the first one in its lower half
  kU4 = 8,
};

constexpr int bits_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64:
      return 64;
    case Dtype::kF32:
      return 32;
    case Dtype::kBF16:
    case Dtype::kF16:
    case Dtype::kI16:
      return 16;
    case Dtype::kI8:
    case Dtype::kU8:
      return 8;
    case Dtype::kI4:
    case Dtype::kU4:
      return 4;
  }
  __builtin_unreachable();
}
// Bytes that n numbers take.
constexpr int64_t size_of(Dtype dtype, int64_t n = 1) {
  return (n * bits_of(dtype) + 7) / 8;
}

inline namespace FUSEDSTEP_ISA {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Calls visit with a number as it is stored in that dtype, which is none of a code. What has to know all dtypes does so
// here.
template <class Visit>
FUSEDSTEP_FN decltype(auto) visit_number(Dtype dtype, Visit&& visit) {
  switch (dtype) {
    case Dtype::kF32:
      return visit(float{});
    case Dtype::kBF16:
      return visit(BF16{});
    case Dtype::kF16:
      return visit(F16{});
    case Dtype::kF64:
      return visit(double{});
    case Dtype::kI8:
    case Dtype::kU8:
    case Dtype::kI16:
    case Dtype::kI4:
    case Dtype::kU4:
      break;
  }
  __builtin_unreachable();
}

template <class To, class From>
FUSEDSTEP_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

FUSEDSTEP_FN float widen(float x) {
  return x;
}
FUSEDSTEP_FN double widen(double x) {
  return x;
}
FUSEDSTEP_FN float widen(BF16 x) {
  return bit_cast<float>(uint32_t{x.bits} << 16);
}
FUSEDSTEP_FN float widen(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;                            // exponent bias 15 -> 127
  const uint32_t special = (magnitude << 13) | 0x7f800000u;                           // infinity and NaN
  const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;  // subnormal: units of 2^-24
  const uint32_t wide = magnitude < 0x400u ? bit_cast<uint32_t>(tiny) : magnitude < 0x7c00u ? normal : special;
  return bit_cast<float>(wide | sign);
}

// A whole number below 2^31, which is not negative.
template <class W>
FUSEDSTEP_FN W whole_number(float x) {
  return static_cast<W>(static_cast<int32_t>(x));
}

// narrow<S>(x): x rounded to nearest even in the stored format S.
template <class S>
FUSEDSTEP_FN S narrow(float x);

template <>
FUSEDSTEP_FN float narrow<float>(float x) {
  return x;
}
template <>
FUSEDSTEP_FN double narrow<double>(float x) {
  return x;
}
template <>
FUSEDSTEP_FN BF16 narrow<BF16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BF16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}
template <>
FUSEDSTEP_FN F16 narrow<F16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Below 2^-14 the spacing is 2^-24, that of a float in [0.5, 1): adding 0.5 rounds to it.
  const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : magnitude < 0x47800000u ? normal : 0x7c00u;
  const uint32_t narrowed = magnitude > 0x7f800000u ? 0x7e00u : finite;
  return F16{static_cast<uint16_t>(narrowed | sign)};
}

template <class S>
FUSEDSTEP_FN S narrow(double x) {
  return narrow<S>(static_cast<float>(x));
}
template <>
FUSEDSTEP_FN double narrow<double>(double x) {
  return x;
}

// load: stored -> arithmetic type T (float or double).
template <class T, class S>
FUSEDSTEP_FN T load(S stored) {
  return static_cast<T>(widen(stored));
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep
