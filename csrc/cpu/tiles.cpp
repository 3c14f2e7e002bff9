// Widening and narrowing of tiles, compiled once per instruction set (FUSEDSTEP_ISA). It knows storage formats, but no
// rule. The loops over elements are plain ones that the compiler turns into vector code.
// clang-format off
#include "stored.h"  // first, as in engine.cpp
#include "tiles.h"
// clang-format on

#include <algorithm>
#include <cstring>

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {
namespace {

constexpr int64_t kTile = kBlock;

struct alignas(64) Buffer {
  float numbers[kTile];
};

template <class Visit>
void visit_stored(void* data, Dtype dtype, const Visit& visit) {
  AnyStored<float>{data, dtype}.visit(visit);
}

void widen_plain(const void* data, Dtype dtype, int64_t at, int64_t n, float* to) {
  visit_stored(const_cast<void*>(data), dtype, [&](auto stored) {
    const Stored<float, float> wide{to};
    int64_t i = 0;
    for (; i + kLanes<float> <= n; i += kLanes<float>) wide.store(i, stored.load(at + i));
    if (i < n) wide.store_part(i, n - i, stored.load_part(at + i, n - i));
  });
}

void narrow_plain(void* data, Dtype dtype, int64_t at, int64_t n, const float* from) {
  visit_stored(data, dtype, [&](auto stored) {
    const Stored<float, float> wide{const_cast<float*>(from)};
    int64_t i = 0;
    for (; i + kLanes<float> <= n; i += kLanes<float>) stored.store(at + i, wide.load(i));
    if (i < n) stored.store_part(at + i, n - i, wide.load_part(i, n - i));
  });
}

// 16 random bits for each element of a whole tile: the engine's form of codecs.h's Philox, round by round for all
// counters at once.
struct alignas(64) RandomTile {
  static constexpr int kCounters = kTile / kPhiloxElements;
  uint32_t words[kCounters][4];

  void fill(uint64_t seed, uint32_t index, uint32_t step, int64_t tile) {
    alignas(64) uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
    const uint64_t first = static_cast<uint64_t>(tile) * kCounters;  // a multiple of 32: the lower words do not wrap
    for (int i = 0; i < kCounters; ++i) {
      c0[i] = static_cast<uint32_t>(first) + static_cast<uint32_t>(i);
      c1[i] = static_cast<uint32_t>(first >> 32);
      c2[i] = index;
      c3[i] = step;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < kCounters; ++i) {
        const uint64_t p0 = uint64_t{c0[i]} * kPhiloxMultipliers[0], p1 = uint64_t{c2[i]} * kPhiloxMultipliers[1];
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
        c1[i] = static_cast<uint32_t>(p1);
        c3[i] = static_cast<uint32_t>(p0);
      }
      k0 += kPhiloxKeySteps[0];
      k1 += kPhiloxKeySteps[1];
    }
    for (int i = 0; i < kCounters; ++i) {
      words[i][0] = c0[i], words[i][1] = c1[i], words[i][2] = c2[i], words[i][3] = c3[i];
    }
  }
  uint32_t bits(int64_t i) const { return words[i / 8][i % 8 / 2] >> (16 * (i % 2)) & 0xffffu; }
};

template <class S>
void narrow_at_random(S* to, const RandomTile& random, int64_t first, int64_t n, const float* from) {
  alignas(64) uint16_t bits[kTile];
  for (int64_t i = 0; i < kTile / 2; ++i) {
    bits[2 * i] = static_cast<uint16_t>(random.words[i / 4][i % 4]);
    bits[2 * i + 1] = static_cast<uint16_t>(random.words[i / 4][i % 4] >> 16);
  }
  for (int64_t i = 0; i < n; ++i) to[i] = narrow_stochastic<S>(from[i], bits[first + i]);
}

template <class S>
void narrow_compensated(S* to, S* compensation, int64_t n, const float* from) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = narrow<S>(from[i]);
    compensation[i] = lost(from[i], to[i]);
  }
}

template <class S>
void widen_compensated(const S* from, const S* compensation, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]) + widen(compensation[i]);
}

// A weight, in its form. The fp32 numbers lie in the buffer, or where they are kept.
struct Weight {
  const Record& record;
  Buffer buffer;

  float* load(int64_t at, int64_t n) {
    float* const wide = buffer.numbers;
    void* const companion = record.precision.companion;
    switch (record.precision.form) {
      case Form::kMaster:
        return static_cast<float*>(companion) + at;
      case Form::kSplit: {
        const BF16* const upper = static_cast<const BF16*>(record.param) + at;
        const int16_t* const lower = static_cast<const int16_t*>(companion) + at;
        for (int64_t i = 0; i < n; ++i) wide[i] = join(upper[i], lower[i]);
        return wide;
      }
      case Form::kKahan:
        visit_half([&](auto* param) {
          using S = std::remove_pointer_t<decltype(param)>;
          widen_compensated(param + at, static_cast<const S*>(companion) + at, n, wide);
        });
        return wide;
      default:
        if (record.param_dtype == Dtype::kF32) return static_cast<float*>(record.param) + at;
        widen_plain(record.param, record.param_dtype, at, n, wide);
        return wide;
    }
  }

  void store(int64_t at, int64_t n, int64_t step, const float* wide) const {
    void* const companion = record.precision.companion;
    switch (record.precision.form) {
      case Form::kSplit: {
        BF16* const upper = static_cast<BF16*>(record.param) + at;
        int16_t* const lower = static_cast<int16_t*>(companion) + at;
        for (int64_t i = 0; i < n; ++i) {
          upper[i] = upper_half(wide[i]);
          lower[i] = lower_half(wide[i]);
        }
        return;
      }
      case Form::kKahan:
        return visit_half([&](auto* param) {
          using S = std::remove_pointer_t<decltype(param)>;
          narrow_compensated(param + at, static_cast<S*>(companion) + at, n, wide);
        });
      case Form::kStochastic: {
        RandomTile random;
        random.fill(record.precision.seed, record.precision.index, static_cast<uint32_t>(step), at / kTile);
        return visit_half([&](auto* param) { narrow_at_random(param + at, random, at % kTile, n, wide); });
      }
      default:
        if (record.param_dtype != Dtype::kF32) narrow_plain(record.param, record.param_dtype, at, n, wide);
    }
  }

 private:
  template <class Visit>
  void visit_half(const Visit& visit) const {
    if (record.param_dtype == Dtype::kBF16)
      visit(static_cast<BF16*>(record.param));
    else
      visit(static_cast<F16*>(record.param));
  }
};

template <class Code>
void decode_block(const Code* codes, float scale, int64_t n, float* to) {
  alignas(64) Code whole[kTile] = {};
  std::memcpy(whole, codes, static_cast<size_t>(n));
  for (int64_t i = 0; i < kTile; ++i) to[i] = decode(whole[i], scale);
  if (n < kTile) std::memset(to + n, 0, static_cast<size_t>(kTile - n) * sizeof(float));
}

// from: a whole tile, zeros behind the first n numbers.
template <class Code>
void encode_block(Code* codes, float* scale, int64_t n, const float* from) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < kTile; ++i) largest = std::max(largest, bit_cast<uint32_t>(from[i]) & 0x7fffffffu);
  const Block block(largest);
  alignas(64) Code whole[kTile];
  for (int64_t i = 0; i < kTile; ++i) {
    if constexpr (std::is_signed_v<Code>)
      whole[i] = encode_signed(from[i], block);
    else
      whole[i] = encode_unsigned(from[i], block);
  }
  std::memcpy(codes, whole, static_cast<size_t>(n));
  *scale = Block::scale(largest);
}

// A state, in its format.
struct State {
  void* data;
  float* scales;
  Dtype dtype;
  Buffer buffer;

  float* load(int64_t at, int64_t n) {
    if (dtype == Dtype::kF32) return static_cast<float*>(data) + at;
    if (dtype == Dtype::kI8)
      decode_block(static_cast<const int8_t*>(data) + at, scales[at / kBlock], n, buffer.numbers);
    else if (dtype == Dtype::kU8)
      decode_block(static_cast<const uint8_t*>(data) + at, scales[at / kBlock], n, buffer.numbers);
    else
      widen_plain(data, dtype, at, n, buffer.numbers);
    return buffer.numbers;
  }
  void store(int64_t at, int64_t n) const {
    if (dtype == Dtype::kF32) return;
    if (dtype == Dtype::kI8)
      encode_block(static_cast<int8_t*>(data) + at, scales + at / kBlock, n, buffer.numbers);
    else if (dtype == Dtype::kU8)
      encode_block(static_cast<uint8_t*>(data) + at, scales + at / kBlock, n, buffer.numbers);
    else
      narrow_plain(data, dtype, at, n, buffer.numbers);
  }
};

}  // namespace

void update_tiles(const Record& record, const void* grad, int64_t begin, int64_t end, uint32_t states, int64_t step,
                  bool zero_grad, UpdateTile update, const void* context) {
  Weight weight{record, {}};
  State state[kMaxStates];
  for (int k = 0; k < kMaxStates; ++k) {
    state[k].data = record.states[k];
    state[k].scales = record.precision.scales[k];
    state[k].dtype = record.state_dtypes[k];
  }
  Buffer grad_buffer;
  Record tile = record;
  for (int64_t at = begin, n; at < end; at += n) {
    n = std::min(end, (at / kTile + 1) * kTile) - at;
    const float* wide_grad = static_cast<const float*>(grad) + at;
    if (record.grad_dtype != Dtype::kF32) {
      widen_plain(grad, record.grad_dtype, at, n, grad_buffer.numbers);
      wide_grad = grad_buffer.numbers;
    }
    float* const wide = weight.load(at, n);
    tile.param = wide;
    for (int k = 0; k < kMaxStates; ++k)
      if (states >> k & 1) tile.states[k] = state[k].load(at, n);
    update(tile, wide_grad, n, context);
    weight.store(at, n, step, wide);
    for (int k = 0; k < kMaxStates; ++k)
      if (states >> k & 1) state[k].store(at, n);
    if (zero_grad)
      std::memset(static_cast<char*>(const_cast<void*>(grad)) + at * size_of(record.grad_dtype), 0,
                  static_cast<size_t>(n * size_of(record.grad_dtype)));
  }
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
