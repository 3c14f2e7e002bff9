// Chunks of tensors whose dtypes do not tell all: master weights, split and compensated ones, stochastic rounding,
// 8-bit states; and of those beside them in a group that are stored plainly. A warp takes a block of 256 elements at a
// time, each lane eight of them: those of one random counter, and 16 bytes of a 16-bit tensor. Everything stays in
// registers; a block's largest magnitude goes through the warp by shuffles.
#pragma once

#include <type_traits>

#include "kernel.cuh"

namespace fusedstep::cuda {

constexpr int kLaneElements = kPhiloxElements;
static_assert(kLaneElements * kWarp == kBlock, "a warp holds a block");

// What a lane holds of a tensor stored as S; n: how many there are, eight but at a tensor's end.
template <class S>
struct Lane {
  using Word = std::conditional_t<sizeof(S) == 1, uint64_t, Vector>;
  static constexpr int kWords = kLaneElements * sizeof(S) / sizeof(Word);
  union {
    Word words[kWords];
    S numbers[kLaneElements];
  };

  __device__ __forceinline__ static bool whole(const S* at, int n) {
    return n == kLaneElements && reinterpret_cast<uint64_t>(at) % sizeof(Word) == 0;
  }
  __device__ __forceinline__ void load(const S* from, int n) {
    if (whole(from, n)) {
      const Word* source = global(reinterpret_cast<const Word*>(from));
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w] = source[w];
    } else {
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) numbers[i] = i < n ? global(from)[i] : S{};
    }
  }
  __device__ __forceinline__ void store(S* to, int n) const {
    if (whole(to, n)) {
      Word* target = global(reinterpret_cast<Word*>(to));
#pragma unroll
      for (int w = 0; w < kWords; ++w) target[w] = words[w];
    } else {
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        if (i < n) global(to)[i] = numbers[i];
    }
  }
};

template <class S>
__device__ __forceinline__ void widen_lane(const void* data, int64_t at, int n, float* to) {
  Lane<S> lane;
  lane.load(static_cast<const S*>(data) + at, n);
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) to[i] = load<float>(lane.numbers[i]);
}
template <class S>
__device__ __forceinline__ void narrow_lane(void* data, int64_t at, int n, const float* from) {
  Lane<S> lane;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) lane.numbers[i] = narrow<S>(from[i]);
  lane.store(static_cast<S*>(data) + at, n);
}

// The same for a dtype that is known only now; it is the same for all of a warp.
__device__ __forceinline__ void widen_any(const void* data, Dtype dtype, int64_t at, int n, float* to) {
  switch (dtype) {
    case Dtype::kBF16:
      return widen_lane<BF16>(data, at, n, to);
    case Dtype::kF16:
      return widen_lane<F16>(data, at, n, to);
    case Dtype::kF64:
      return widen_lane<double>(data, at, n, to);
    default:
      return widen_lane<float>(data, at, n, to);
  }
}
__device__ __forceinline__ void narrow_any(void* data, Dtype dtype, int64_t at, int n, const float* from) {
  switch (dtype) {
    case Dtype::kBF16:
      return narrow_lane<BF16>(data, at, n, from);
    case Dtype::kF16:
      return narrow_lane<F16>(data, at, n, from);
    case Dtype::kF64:
      return narrow_lane<double>(data, at, n, from);
    default:
      return narrow_lane<float>(data, at, n, from);
  }
}

// A weight in each of its forms.
template <class S>
__device__ __forceinline__ void store_compensated(const Record& record, int64_t at, int n, const float* from) {
  Lane<S> narrowed, rest;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    narrowed.numbers[i] = narrow<S>(from[i]);
    rest.numbers[i] = lost(from[i], narrowed.numbers[i]);
  }
  narrowed.store(static_cast<S*>(record.param) + at, n);
  rest.store(static_cast<S*>(record.precision.companion) + at, n);
}
template <class S>
__device__ __forceinline__ void store_at_random(const Record& record, int64_t at, int n, const float* from) {
  const uint32_t step = static_cast<uint32_t>(count_of(*global(record.step)) + 1);
  const Philox random(record.precision.seed, record.precision.index, step, static_cast<uint64_t>(at) / kPhiloxElements);
  Lane<S> narrowed;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) narrowed.numbers[i] = narrow_stochastic<S>(from[i], random.bits(i));
  narrowed.store(static_cast<S*>(record.param) + at, n);
}

__device__ __forceinline__ void load_weight(const Record& record, int64_t at, int n, float* to) {
  const void* const companion = record.precision.companion;
  switch (record.precision.form) {
    case Form::kMaster:
      return widen_lane<float>(companion, at, n, to);
    case Form::kSplit: {
      Lane<BF16> upper;
      Lane<int16_t> lower;
      upper.load(static_cast<const BF16*>(record.param) + at, n);
      lower.load(static_cast<const int16_t*>(companion) + at, n);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) to[i] = join(upper.numbers[i], lower.numbers[i]);
      return;
    }
    case Form::kKahan: {
      float rest[kLaneElements];
      widen_any(record.param, record.param_dtype, at, n, to);
      widen_any(companion, record.param_dtype, at, n, rest);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) to[i] = to[i] + rest[i];
      return;
    }
    default:
      return widen_any(record.param, record.param_dtype, at, n, to);
  }
}
__device__ __forceinline__ void store_weight(const Record& record, int64_t at, int n, const float* from) {
  void* const companion = record.precision.companion;
  const bool bf16 = record.param_dtype == Dtype::kBF16;
  switch (record.precision.form) {
    case Form::kMaster:
      narrow_lane<float>(companion, at, n, from);
      return narrow_any(record.param, record.param_dtype, at, n, from);
    case Form::kSplit: {
      Lane<BF16> upper;
      Lane<int16_t> lower;
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        const Split<uint32_t, float> split(from[i]);
        upper.numbers[i] = BF16{static_cast<uint16_t>(split.upper >> 16)};
        lower.numbers[i] = static_cast<int16_t>(split.lower >> 16);
      }
      upper.store(static_cast<BF16*>(record.param) + at, n);
      return lower.store(static_cast<int16_t*>(companion) + at, n);
    }
    case Form::kKahan:
      return bf16 ? store_compensated<BF16>(record, at, n, from) : store_compensated<F16>(record, at, n, from);
    case Form::kStochastic:
      return bf16 ? store_at_random<BF16>(record, at, n, from) : store_at_random<F16>(record, at, n, from);
    default:
      return narrow_any(record.param, record.param_dtype, at, n, from);
  }
}

// A block of an 8-bit state.
template <class Code>
__device__ __forceinline__ void decode_lane(const void* data, float scale, int64_t at, int n, float* to) {
  Lane<Code> codes;
  codes.load(static_cast<const Code*>(data) + at, n);
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const int32_t code = codes.numbers[i];
    to[i] = std::is_signed_v<Code> ? decode_signed<uint32_t>(static_cast<float>(code), scale)
                                   : decode_unsigned<uint32_t>(static_cast<float>(code + 1), scale);
  }
}
template <class Code>
__device__ __forceinline__ void encode_lane(void* data, float* scale, int64_t at, int n, const float* from) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const uint32_t magnitude = bit_cast<uint32_t>(from[i]) & 0x7fffffffu;
    largest = i < n && magnitude > largest ? magnitude : largest;
  }
#pragma unroll
  for (unsigned lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, largest, lanes);
    largest = other > largest ? other : largest;
  }
  const Block block(largest);
  Lane<Code> codes;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i)
    codes.numbers[i] = static_cast<Code>(std::is_signed_v<Code> ? encode_signed<uint32_t>(from[i], block)
                                                                : encode_unsigned<uint32_t>(from[i], block));
  codes.store(static_cast<Code*>(data) + at, n);
  if (at % kBlock == 0) *global(scale) = Block::scale(largest);
}

__device__ __forceinline__ void load_state(const Record& record, int k, int64_t at, int n, float* to) {
  const Dtype dtype = record.state_dtypes[k];
  if (dtype != Dtype::kI8 && dtype != Dtype::kU8) return widen_any(record.states[k], dtype, at, n, to);
  // A lane behind the last element still is in its warp's block.
  const float scale = global(record.precision.scales[k])[at / kBlock];
  return dtype == Dtype::kI8 ? decode_lane<int8_t>(record.states[k], scale, at, n, to)
                             : decode_lane<uint8_t>(record.states[k], scale, at, n, to);
}
__device__ __forceinline__ void store_state(const Record& record, int k, int64_t at, int n, const float* from) {
  const Dtype dtype = record.state_dtypes[k];
  if (dtype != Dtype::kI8 && dtype != Dtype::kU8) return narrow_any(record.states[k], dtype, at, n, from);
  float* const scale = record.precision.scales[k] + at / kBlock;
  return dtype == Dtype::kI8 ? encode_lane<int8_t>(record.states[k], scale, at, n, from)
                             : encode_lane<uint8_t>(record.states[k], scale, at, n, from);
}

// Chunks begin at multiples of a block. The warps of a team take blocks in turn.
template <class Rule>
struct Stored {
  __device__ __forceinline__ static void update(const Record& record, const void* grad, const Chunk& chunk, Team team,
                                                GradChange<float> change,
                                                const typename Rule::template Scalars<float>& scalars) {
    const auto s = scalars;
    constexpr int kPlaces = kNamed<Rule> > 0 ? kNamed<Rule> : 1;
    const int warp = team.index / kWarp, warps = team.size / kWarp, lane = team.index % kWarp;
    for (int first = warp * kBlock; first < chunk.n; first += warps * kBlock) {
      const int64_t at = chunk.offset + first + lane * kLaneElements;
      const int64_t rest = chunk.offset + chunk.n - at;
      const int n = rest >= kLaneElements ? kLaneElements : rest > 0 ? static_cast<int>(rest) : 0;
      float param[kLaneElements], g[kLaneElements], states[kPlaces][kLaneElements];
      load_weight(record, at, n, param);
      widen_any(grad, record.grad_dtype, at, n, g);
#pragma unroll
      for (int k = 0; k < kNamed<Rule>; ++k)
        if (has_state<Rule>(k)) load_state(record, k, at, n, states[k]);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        float values[kMaxStates] = {};
#pragma unroll
        for (int k = 0; k < kNamed<Rule>; ++k)
          if (has_state<Rule>(k)) values[k] = states[k][i];
        const float changed = change(g[i]);
        g[i] = change.write ? changed * change.sign : 0.0f;
        update_with<Rule>(param[i], changed, values, s);
#pragma unroll
        for (int k = 0; k < kNamed<Rule>; ++k)
          if (has_state<Rule>(k)) states[k][i] = values[k];
      }
      store_weight(record, at, n, param);
      if (change.zero || change.write) narrow_any(const_cast<void*>(grad), record.grad_dtype, at, n, g);
#pragma unroll
      for (int k = 0; k < kNamed<Rule>; ++k)
        if (has_state<Rule>(k)) store_state(record, k, at, n, states[k]);
    }
  }
};

}  // namespace fusedstep::cuda
