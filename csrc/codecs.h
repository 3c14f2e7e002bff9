// How weights and states are stored in fewer bits than they are computed in, beyond plain rounding (numeric.h). Integer
// operations and single IEEE additions, multiplications and divisions only: python/fusedstep/codecs.py and
// triton_kernels/codecs.py repeat them to the same bits. No optimizer and no engine belongs here.
#pragma once

#include "numeric.h"

namespace fusedstep {

// How a 16-bit weight is stored; the numbers are python/fusedstep/precision.py's.
enum class Form : uint8_t {
  kPlain = 0,
  kMaster = 1,      // beside an fp32 copy, which is what a step updates
  kSplit = 2,       // bf16: as the upper half of an fp32 number; the lower half is the companion
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

  // Of elements 8 * group to 8 * group + 7 of parameter `index` in its step `step`.
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

template <>
FUSEDSTEP_FN BF16 narrow_stochastic<BF16>(float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t narrowed = magnitude > 0x7f800000u ? 0x7fc0u : (magnitude + random) >> 16;
  return BF16{static_cast<uint16_t>(narrowed | (bits >> 16 & 0x8000u))};
}
template <>
FUSEDSTEP_FN F16 narrow_stochastic<F16>(float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + (random & 0x1fffu) - 0x38000000u) >> 13;
  // Below 2^-14 numbers are multiples of 2^-24; the sum is in units of 2^-40.
  const float small = bit_cast<float>(magnitude < 0x38800000u ? magnitude : 0u);
  const uint32_t tiny = (static_cast<uint32_t>(static_cast<int32_t>(small * 0x1p40f)) + random) >> 16;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : magnitude < 0x47800000u ? normal : 0x7c00u;
  const uint32_t narrowed = magnitude > 0x7f800000u ? 0x7e00u : finite;
  return F16{static_cast<uint16_t>(narrowed | (bits >> 16 & 0x8000u))};
}

// An fp32 number as bf16, rounded to nearest with ties away from zero, and the lower 16 bits, which together are exact:
// to nearest even, two fp32 numbers would share some pairs.
FUSEDSTEP_FN BF16 upper_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BF16{static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + 0x8000u) >> 16)};
}
FUSEDSTEP_FN int16_t lower_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<int16_t>(is_nan ? 0u : bits & 0xffffu);
}
FUSEDSTEP_FN float join(BF16 upper, int16_t lower) {
  return bit_cast<float>((uint32_t{upper.bits} << 16) + static_cast<uint32_t>(int32_t{lower}));
}

// What storing x as `narrowed` has lost, in the same format; nothing where that is infinite or not a number.
template <class S>
FUSEDSTEP_FN S lost(float x, S narrowed) {
  const float wide = widen(narrowed);
  const bool finite = (bit_cast<uint32_t>(wide) & 0x7f800000u) != 0x7f800000u;
  return narrow<S>(finite ? x - wide : 0.0f);
}

// 8-bit states. A number is stored as a multiple of its block's scale, the largest magnitude in it, and that multiple as
// one of 127 (with its sign) or 256 evenly spaced values of its root: the square root for numbers with a sign, the
// fourth root for those that are never negative, whose dynamic range is the square of the gradient's. The root is taken
// as x86's famous trick does, by halving the exponent and the fraction together: an integer shift, exactly invertible.
// Without a sign no code stands for zero (in a block that has a scale): a second moment that vanishes while the first
// does not would make the step explode.
//
// A block whose largest magnitude is below the smallest normal number is all zeros; one with an infinity or a NaN
// becomes all NaN, for its scale is.
struct Block {
  float inverse;
  uint32_t keep;  // mask of the magnitudes to encode

  // largest: the bits of the block's largest magnitude.
  FUSEDSTEP_FN explicit Block(uint32_t largest) {
    const bool coded = largest >= 0x00800000u && largest < 0x7f800000u;
    inverse = coded ? 1.0f / bit_cast<float>(largest) : 0.0f;
    keep = coded ? 0x7fffffffu : 0u;
  }
  FUSEDSTEP_FN static float scale(uint32_t largest) {
    return bit_cast<float>(largest >= 0x7f800000u ? 0x7fc00000u : largest >= 0x00800000u ? largest : 0u);
  }
};

// The nearest whole number of x in [0, 2^22].
FUSEDSTEP_FN int32_t nearest(float x) {
  return static_cast<int32_t>(bit_cast<uint32_t>(x + 0x1p23f) - 0x4b000000u);
}

FUSEDSTEP_FN int8_t encode_signed(float x, const Block& block) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const float relative = bit_cast<float>(bits & block.keep) * block.inverse;
  const float root = bit_cast<float>((bit_cast<uint32_t>(relative) >> 1) + 0x1fc00000u);
  const int32_t code = nearest(root * 127.0f), sign = static_cast<int32_t>(bits) >> 31;
  return static_cast<int8_t>((code ^ sign) - sign);
}
FUSEDSTEP_FN uint8_t encode_unsigned(float x, const Block& block) {
  const float relative = bit_cast<float>(bit_cast<uint32_t>(x) & block.keep) * block.inverse;
  const float root = bit_cast<float>((bit_cast<uint32_t>(relative) >> 2) + 0x2fa00000u);
  const int32_t code = nearest(root * 256.0f) - 1;
  return static_cast<uint8_t>(block.keep == 0 || code < 0 ? 0 : code);
}
FUSEDSTEP_FN float decode(int8_t code, float scale) {
  const int32_t number = code, sign = number >> 31, magnitude = (number ^ sign) - sign;
  const float root = static_cast<float>(magnitude) * (1.0f / 127.0f);
  const uint32_t relative = magnitude == 0 ? 0u : (bit_cast<uint32_t>(root) - 0x1fc00000u) << 1;
  return bit_cast<float>(relative | (static_cast<uint32_t>(sign) & 0x80000000u)) * scale;
}
FUSEDSTEP_FN float decode(uint8_t code, float scale) {
  const float root = static_cast<float>(int32_t{code} + 1) * (1.0f / 256.0f);
  return bit_cast<float>((bit_cast<uint32_t>(root) - 0x2fa00000u) << 2) * scale;
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep
