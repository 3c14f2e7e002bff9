// How weights are stored, one struct for each way: the arrays that a thread reads and writes raw, and how fp32 numbers
// are joined from them and split into them. No rule and no loop belongs here.
#pragma once

#include "arrays.cuh"
#include "formats.h"

namespace fusedstep::cuda {

// for_arrays() visits each array and its tensor, with false those that are only written; join() gives fp32
// numbers, and split() takes new ones, of step `step` and from element i on, and leaves in their place what averages
// and copies follow. No address stays in a register.

template <class S, int kN>
struct PlainWeight {
  Numbers<S, kN> stored;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, Visitor&& visitor) {
    visitor(stored, static_cast<S*>(record.param));
  }
  __device__ __forceinline__ void join(float* to) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = stored[i];
  }
  __device__ __forceinline__ void split(float* from, const Record&, int64_t, uint32_t) {
    stored.put(from);
    join(from);
  }
};

template <int kN>
struct MasterWeight {
  Numbers<BF16, kN> stored;
  Numbers<float, kN> master;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, Visitor&& visitor) {
    visitor(stored, static_cast<BF16*>(record.param), false);
    visitor(master, static_cast<float*>(record.precision.aux));
  }
  __device__ __forceinline__ void join(float* to) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = master[i];
  }
  __device__ __forceinline__ void split(float* from, const Record&, int64_t, uint32_t) {
    stored.put(from);
    master.put(from);
  }
};

// The halves of fp32 numbers (Split and join in codecs.h), two at a time.
template <int kN>
struct SplitWeight {
  Array<BF16, kN> upper;
  Array<int16_t, kN> lower;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, Visitor&& visitor) {
    visitor(upper, static_cast<BF16*>(record.param));
    visitor(lower, static_cast<int16_t*>(record.precision.aux));
  }
  __device__ __forceinline__ void join(float* to) const {
    uint32_t zeros = 0;  // has a bit set if an upper half is zero, and maybe if one is not
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) zeros |= ((upper.words[k] & 0x7fff7fffu) - 0x00010001u) & 0x80008000u;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const uint32_t high = upper.words[i / 2], low = lower.words[i / 2];
      to[i] = bit_cast<float>(i % 2 == 0 ? (high << 16) + static_cast<int16_t>(low)
                                         : (high & 0xffff0000u) + (static_cast<int32_t>(low) >> 16));
    }
    if (zeros == 0) return;
    // No number is split into zero and a negative rest: what is borrowed is no more than there is.
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const uint32_t both = both_halves(i), borrow = (both & 0x8000u) << 1, magnitude = both & 0x7fffffffu;
      to[i] = bit_cast<float>(both - (magnitude < borrow ? magnitude : borrow));
    }
  }
  __device__ __forceinline__ void split(float* from, const Record&, int64_t, uint32_t) {
#pragma unroll
    for (int i = 0; i < kN; i += 2) {
      const uint32_t low = bits_of(from[i]), high = bits_of(from[i + 1]);
      upper.words[i / 2] = __byte_perm(low + 0x8000u, high + 0x8000u, 0x7632);
      lower.words[i / 2] = __byte_perm(low, high, 0x5410);
    }
  }

 private:
  __device__ __forceinline__ uint32_t both_halves(int i) const {
    return __byte_perm(lower.words[i / 2], upper.words[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
  }
  __device__ __forceinline__ static uint32_t bits_of(float x) {
    return x != x ? 0x7fc00000u : bit_cast<uint32_t>(x);  // one NaN for all
  }
};

template <int kN>
struct KahanWeight {
  Numbers<BF16, kN> stored, rest;

  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, Visitor&& visitor) {
    visitor(stored, static_cast<BF16*>(record.param));
    visitor(rest, static_cast<BF16*>(record.precision.aux));
  }
  __device__ __forceinline__ void join(float* to) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = stored[i] + rest[i];
  }
  __device__ __forceinline__ void split(float* from, const Record&, int64_t, uint32_t) {
    stored.put(from);
    float left[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float wide = stored[i];
      const bool finite = (bit_cast<uint32_t>(wide) & 0x7f800000u) != 0x7f800000u;
      left[i] = finite ? from[i] - wide : 0.0f;
      from[i] = wide;
    }
    rest.put(left);
  }
};

template <int kN>
struct StochasticWeight : PlainWeight<BF16, kN> {
  __device__ __forceinline__ void split(float* from, const Record& record, int64_t i, uint32_t step) {
    static_assert(kN == kPhiloxElements, "a thread's numbers share a counter");
    const Philox random(record.precision.seed, record.precision.index, step,
                        static_cast<uint64_t>(record.precision.element_map.element(i)) / kPhiloxElements);
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      const uint32_t low = stochastic_upper_half<uint32_t>(from[j], random.bits(j));
      const uint32_t high = stochastic_upper_half<uint32_t>(from[j + 1], random.bits(j + 1));
      this->stored.words[j / 2] = __byte_perm(low, high, 0x7632);
    }
    this->join(from);
  }
};

// What the names of formats stand for.
template <StoredWeight kWeight, int kN>
struct WeightOf;
template <int kN>
struct WeightOf<StoredWeight::kF32, kN> {
  using Type = PlainWeight<float, kN>;
};
template <int kN>
struct WeightOf<StoredWeight::kBF16, kN> {
  using Type = PlainWeight<BF16, kN>;
};
template <int kN>
struct WeightOf<StoredWeight::kF16, kN> {
  using Type = PlainWeight<F16, kN>;
};
template <int kN>
struct WeightOf<StoredWeight::kMaster, kN> {
  using Type = MasterWeight<kN>;
};
template <int kN>
struct WeightOf<StoredWeight::kSplit, kN> {
  using Type = SplitWeight<kN>;
};
template <int kN>
struct WeightOf<StoredWeight::kKahan, kN> {
  using Type = KahanWeight<kN>;
};
template <int kN>
struct WeightOf<StoredWeight::kStochastic, kN> {
  using Type = StochasticWeight<kN>;
};

}  // namespace fusedstep::cuda
