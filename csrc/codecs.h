// How weights and states are stored in fewer bits than they are computed in, beyond plain rounding (numeric.h). Integer
// operations and single IEEE additions, multiplications and divisions only: python/fusedstep/codecs.py and
// triton_kernels/codecs.py repeat them to the same bits. No optimizer and no engine belongs here.
#pragma once

#include "numeric.h"

namespace fusedstep {

// How a 16-bit weight is stored; the numbers are python/fusedstep/kept/weights.py's.
enum class WeightFormat : uint8_t {
  kPlain = 0,
  kMaster = 1,      // beside an fp32 copy, which is what a step updates
  kSplit = 2,       // bf16: as the upper half of an fp32 number; the lower half is aux
  kKahan = 3,       // beside what rounding has lost, in the same format
  kStochastic = 4,  // rounded up or down at random
};

constexpr int kBlock = 256;  // numbers that share a scale

inline namespace FUSEDSTEP_ISA {

// Philox4x32-10 (Salmon et al., SC 2011). Eight elements share a counter, and so one call's 128 bits.
constexpr uint32_t kPhiloxMultipliers[] = {0xd2511f53u, 0xcd9e8d57u};
constexpr uint32_t kPhiloxKeySteps[] = {0x9e3779b9u, 0xbb67ae85u};
constexpr int kPhiloxRounds = 10, kPhiloxElements = 8;

struct Philox {
  uint32_t words[4];

  // The random words for elements 8 * group to 8 * group + 7 of parameter `index` in its step `step`.
  FUSEDSTEP_FN Philox(uint64_t seed, uint32_t index, uint32_t step, uint64_t group) {
    uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = index, c3 = step;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const uint64_t p0 = uint64_t{c0} * 0xd2511f53u, p1 = uint64_t{c2} * 0xcd9e8d57u;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9e3779b9u;
      k1 += 0xbb67ae85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
  }
  // 16 bits for element i of the group.
  FUSEDSTEP_FN uint32_t bits(int i) const { return words[i / 2] >> (16 * (i % 2)) & 0xffffu; }
};

// x in the stored format S, rounded up with the probability of what rounding down would cut off. `random`: 16 bits.
template <class S>
FUSEDSTEP_FN S narrow_stochastic(float x, uint32_t random);

// In bf16, as the upper half of the result. F and W are float and uint32_t, or vectors of them.
template <class W, class F>
FUSEDSTEP_FN W stochastic_upper_half(F x, W random) {
  const W bits = bit_cast<W>(x), quiet_nan = W{} + 0x7fc00000u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : bits + random;
}
template <>
FUSEDSTEP_FN BF16 narrow_stochastic<BF16>(float x, uint32_t random) {
  return BF16{static_cast<uint16_t>(stochastic_upper_half<uint32_t>(x, random) >> 16)};
}
// In fp16, as the lower half of the result.
template <class W, class F>
FUSEDSTEP_FN W stochastic_f16(F x, W random) {
  const W bits = bit_cast<W>(x), magnitude = bits & 0x7fffffffu, zero{};
  const W normal = (magnitude + (random & 0x1fffu) - 0x38000000u) >> 13;
  // Below 2^-14 numbers are multiples of 2^-24; the sum is in units of 2^-40.
  const F small = bit_cast<F>(magnitude < 0x38800000u ? magnitude : zero);
  const W tiny = (whole_number<W>(small * 0x1p40f) + random) >> 16;
  const W infinite = zero + 0x7c00u, nan = zero + 0x7e00u;
  const W finite = magnitude < 0x38800000u ? tiny : magnitude < 0x47800000u ? normal : infinite;
  return (magnitude > 0x7f800000u ? nan : finite) | (bits >> 16 & 0x8000u);
}
template <>
FUSEDSTEP_FN F16 narrow_stochastic<F16>(float x, uint32_t random) {
  return F16{static_cast<uint16_t>(stochastic_f16<uint32_t>(x, random))};
}

// An fp32 number as bf16, rounded to nearest with ties away from zero, and the lower 16 bits, which together are exact:
// to nearest even, two fp32 numbers would share some pairs.
template <class W, class F>
struct Split {
  W upper, lower;  // in the upper half of each

  FUSEDSTEP_FN explicit Split(F x) {
    const W given = bit_cast<W>(x), quiet_nan = W{} + 0x7fc00000u;
    const W bits = (given & 0x7fffffffu) > 0x7f800000u ? quiet_nan : given;
    upper = bits + 0x8000u;
    lower = bits << 16;
  }
};
// From both, each in the upper half of a word. No number is split into zero and a negative rest: there, somebody has
// set the weight to zero, and to go on counting down from zero's bits would end in a NaN.
template <class F, class W>
FUSEDSTEP_FN F join(W upper, W lower) {
  const W borrow = (lower >> 31) << 16, bits = upper + (lower >> 16) - borrow;
  return bit_cast<F>((upper & 0x7fffffffu) < borrow ? upper : bits);
}
FUSEDSTEP_FN float join(BF16 upper, int16_t lower) {
  return join<float>(uint32_t{upper.bits} << 16, static_cast<uint32_t>(static_cast<uint16_t>(lower)) << 16);
}

// What storing x as `narrowed` has lost, in the same format; nothing where that is infinite or not a number.
template <class S>
FUSEDSTEP_FN S lost(float x, S narrowed) {
  const float wide = widen(narrowed);
  const bool finite = (bit_cast<uint32_t>(wide) & 0x7f800000u) != 0x7f800000u;
  return narrow<S>(finite ? x - wide : 0.0f);
}

// Quantized states. A number is stored as a multiple of its block's scale, the largest magnitude in it, and that
// multiple as one of evenly spaced values of its root: the square root for numbers with a sign, the fourth root for
// those that are never negative, whose dynamic range is the square of the gradient's. The root is taken as x86's famous
// trick does, by halving the exponent and the fraction together: an integer shift, exactly invertible. Without a sign
// no code stands for zero (in a block that has a scale): a second moment that vanishes while the first does not would
// make the step explode.
//
// A block whose largest magnitude is below the smallest normal number is all zeros; one with an infinity or a NaN
// becomes all NaN, for its scale is.
struct Block {
  float inverse = 0.0f;
  uint32_t keep = 0;  // mask of the magnitudes to encode

  Block() = default;
  // largest: the bits of the block's largest magnitude.
  FUSEDSTEP_FN explicit Block(uint32_t max_abs) {
    const bool coded = max_abs >= 0x00800000u && max_abs < 0x7f800000u;
    inverse = coded ? 1.0f / bit_cast<float>(max_abs) : 0.0f;
    keep = coded ? 0x7fffffffu : 0u;
  }
  FUSEDSTEP_FN static float scale(uint32_t max_abs) {
    return bit_cast<float>(max_abs >= 0x7f800000u ? 0x7fc00000u : max_abs >= 0x00800000u ? max_abs : 0u);
  }
};

// Codes of kBits bits: with a sign 2^kBits - 1 values around zero, without one 2^kBits values above zero.
// F and W are float and uint32_t, or vectors of them.
template <int kBits_, bool kSigned_>
struct Quantizer {
  static constexpr int kBits = kBits_;
  static constexpr bool kSigned = kSigned_;
  // Into how many steps the root of the scale is divided.
  static constexpr float kSteps = kSigned ? (1 << (kBits - 1)) - 1 : 1 << kBits;
  // What the root of 1 lacks after its shift: a half or three quarters of its exponent.
  static constexpr uint32_t kRootBias = kSigned ? 0x1fc00000u : 0x2fa00000u;
  // The same, and the exponent that multiplies the root by kSteps, without a sign.
  static constexpr uint32_t kStepBias = kRootBias + (static_cast<uint32_t>(kBits) << 23);

  // Code i of an array from the byte that has it, as decode() takes it; and that byte with another code in it.
  FUSEDSTEP_FN static float code_in(uint8_t byte, int64_t i) {
    const int at = static_cast<int>(i) * kBits % 8, code = byte >> at & ((1 << kBits) - 1);
    constexpr int kHalf = 1 << (kBits - 1);
    return static_cast<float>(kSigned ? (code ^ kHalf) - kHalf : code + 1);
  }
  FUSEDSTEP_FN static uint8_t with_code(uint8_t byte, int64_t i, uint32_t code) {
    const int at = static_cast<int>(i) * kBits % 8;
    constexpr uint32_t kMask = (1u << kBits) - 1;
    return static_cast<uint8_t>((byte & ~(kMask << at)) | (code & kMask) << at);
  }

  // The code is the lowest bits of the result. relative: the magnitude as a multiple of the scale; bits: the number's,
  // for the sign.
  template <class W, class F>
  FUSEDSTEP_FN static W quantize_relative(F relative, W bits) {
    if constexpr (kSigned) {
      const W root = ((bit_cast<W>(relative) >> 1) + kRootBias) | (bits & 0x80000000u);
      return bit_cast<W>(bit_cast<F>(root) * kSteps + 0x1.8p23f);  // rounded to a whole number by the addition
    } else {
      const F root = bit_cast<F>((bit_cast<W>(relative) >> 2) + kStepBias);
      const W code = bit_cast<W>(root + 0x1p23f) - 1u, first = W{} + 0x4b000000u;
      return code > first ? code : first;
    }
  }
  template <class W, class F>
  FUSEDSTEP_FN static W quantize(F x, const Block& block) {
    const W bits = bit_cast<W>(x);
    return quantize_relative<W, F>(bit_cast<F>(bits & block.keep) * block.inverse, bits);
  }

  // code: a signed one as a number; an unsigned one as a number, plus 1.
  template <class W, class F>
  FUSEDSTEP_FN static F dequantize_nonzero(F code, float scale) {
    return bit_cast<F>(relative_nonzero<W>(code)) * scale;
  }
  template <class W, class F>
  FUSEDSTEP_FN static F dequantize(F code, float scale) {
    const W relative = relative_nonzero<W>(code), zero{};
    return bit_cast<F>(kSigned && code == F{} ? zero : relative) * scale;
  }

 private:
  template <class W, class F>
  FUSEDSTEP_FN static W relative_nonzero(F code) {
    if constexpr (kSigned) {
      const W root = bit_cast<W>(code * (1.0f / kSteps));
      return ((root - kRootBias) << 1) | (root & 0x80000000u);
    } else {
      return (bit_cast<W>(code) - kStepBias) << 2;
    }
  }
};

// Where codes lie, from one that begins a byte on.
template <class Q>
struct Codes {
  uint8_t* bytes;

  FUSEDSTEP_FN Codes operator+(int64_t n) const { return {bytes + n * Q::kBits / 8}; }
  // Bytes that n of them take.
  FUSEDSTEP_FN static constexpr int64_t size(int64_t n) { return (n * Q::kBits + 7) / 8; }
};

// Calls visit with the Quantizer whose codes have that dtype; false: it is none of a quantized state.
template <class Visit>
FUSEDSTEP_FN bool visit_quantizer(Dtype dtype, Visit&& visit) {
  switch (dtype) {
    case Dtype::kI8:
      visit(Quantizer<8, true>{});
      return true;
    case Dtype::kU8:
      visit(Quantizer<8, false>{});
      return true;
    case Dtype::kI4:
      visit(Quantizer<4, true>{});
      return true;
    case Dtype::kU4:
      visit(Quantizer<4, false>{});
      return true;
    case Dtype::kF32:
    case Dtype::kBF16:
    case Dtype::kF16:
    case Dtype::kF64:
    case Dtype::kI16:
      return false;
  }
  __builtin_unreachable();
}

}  // namespace FUSEDSTEP_ISA

// The dtype of the codes of quantized states, and back.
constexpr Dtype code_dtype(int bits, bool is_signed) {
  return bits == 8 ? (is_signed ? Dtype::kI8 : Dtype::kU8) : (is_signed ? Dtype::kI4 : Dtype::kU4);
}
constexpr bool is_signed_code(Dtype dtype) {
  return dtype == Dtype::kI8 || dtype == Dtype::kI4;
}
constexpr bool is_quantized(Dtype dtype) {
  return is_signed_code(dtype) || dtype == Dtype::kU8 || dtype == Dtype::kU4;
}
constexpr int kPackedBits[] = {4};  // of codes that share a byte

}  // namespace fusedstep
