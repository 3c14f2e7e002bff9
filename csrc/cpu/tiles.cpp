// Widening and narrowing of tiles, compiled once per instruction set (FUSEDSTEP_ISA). It knows storage formats, but no
// rule. The loops over elements are plain ones that the compiler turns into vector code.
#include "tiles.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "stored.h"
#include "weights.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {
namespace {

constexpr int64_t kTile = kBlock;

struct alignas(64) Buffer {
  float numbers[kTile];
};

// Calls visit(the numbers from element `at` on).
template <class Visit>
void visit_stored(void* data, Dtype dtype, int64_t at, const Visit& visit) {
  AnyStored<float>{data, dtype}.visit([&](auto stored) {
    stored.data += at;
    visit(stored);
  });
}

void widen_plain(const void* data, Dtype dtype, int64_t at, int64_t n, float* to) {
  visit_stored(const_cast<void*>(data), dtype, at, [n, to](auto stored) {
    const int64_t count = n;  // stores may change whatever is not a variable of this function
    const Stored<float, float> wide{to};
    int64_t i = 0;
    for (; i + kLanes<float> <= count; i += kLanes<float>) wide.store(i, stored.load(i));
    if (i < count) wide.store_part(i, count - i, stored.load_part(i, count - i));
  });
}

void narrow_plain(void* data, Dtype dtype, int64_t at, int64_t n, const float* from) {
  visit_stored(data, dtype, at, [n, from](auto stored) {
    const int64_t count = n;
    const Stored<float, float> wide{const_cast<float*>(from)};
    int64_t i = 0;
    for (; i + kLanes<float> <= count; i += kLanes<float>) stored.store(i, wide.load(i));
    if (i < count) stored.store_part(i, count - i, wide.load_part(i, count - i));
  });
}

// Calls body(i) for the packs of n numbers, and body(i, rest) for what is left of the last.
template <class Body>
FUSEDSTEP_FN void for_packs(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) body(i, kLanes<float>);
  if (i < n) body(i, n - i);
}

// 16-bit words as the upper halves of 32-bit ones.
template <class S>
FUSEDSTEP_FN WordPack load_upper(const S* from, int64_t n) {
  alignas(64) S part[kLanes<float>];
  if (n < kLanes<float>) load_part_of<kLanes<float>>(part, from, n);
  HalfWordPack halves;
  __builtin_memcpy(&halves, n < kLanes<float> ? part : from, sizeof(halves));
  return widen_words(halves) << 16;
}
template <class S>
FUSEDSTEP_FN void store_upper(S* to, WordPack words, int64_t n) {
  const HalfWordPack halves = upper_halves(words);
  if (n == kLanes<float>) {
    __builtin_memcpy(to, &halves, sizeof(halves));
  } else {
    alignas(64) S part[kLanes<float>];
    __builtin_memcpy(part, &halves, sizeof(halves));
    store_part_of<kLanes<float>>(to, part, n);
  }
}

FUSEDSTEP_FN FloatPack wide_pack(const float* from) {
  return load_pack<float, float>(from);
}

void narrow_at_random(BF16* to, const uint16_t* random, int64_t n, const float* from) {
  for_packs(n, [&](int64_t i, int64_t part) FUSEDSTEP_INLINE {
    HalfWordPack halves{};
    __builtin_memcpy(&halves, random + i, static_cast<size_t>(part) * sizeof(uint16_t));
    store_upper(to + i, stochastic_upper_half<WordPack>(wide_pack(from + i), widen_words(halves)), part);
  });
}

void narrow_at_random(F16* to, const uint16_t* random, int64_t n, const float* from) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow_stochastic<F16>(from[i], random[i]);
}

void widen_split(const BF16* upper, const int16_t* lower, int64_t n, float* to) {
  for_packs(n, [&](int64_t i, int64_t part) FUSEDSTEP_INLINE {
    store_pack<float, float>(to + i, join<FloatPack>(load_upper(upper + i, part), load_upper(lower + i, part)));
  });
}

void narrow_split(BF16* upper, int16_t* lower, int64_t n, const float* from) {
  for_packs(n, [&](int64_t i, int64_t part) FUSEDSTEP_INLINE {
    const Split<WordPack, FloatPack> split(wide_pack(from + i));
    store_upper(upper + i, split.upper, part);
    store_upper(lower + i, split.lower, part);
  });
}

template <class S>
void narrow_compensated(S* to, S* compensation, int64_t n, const float* from) {
  alignas(64) S narrowed[kTile], rest[kTile];
  for_packs(n, [&](int64_t i, int64_t) FUSEDSTEP_INLINE {
    const FloatPack wide = wide_pack(from + i);
    store_pack<float, S>(narrowed + i, wide);
    const FloatPack back = load_pack<float, S>(narrowed + i);
    const WordPack exponent = (WordPack)back & 0x7f800000u;
    store_pack<float, S>(rest + i, exponent != 0x7f800000u ? wide - back : FloatPack{});
  });
  std::memcpy(to, narrowed, static_cast<size_t>(n) * sizeof(S));
  std::memcpy(compensation, rest, static_cast<size_t>(n) * sizeof(S));
}

template <class S>
FUSEDSTEP_FN FloatPack load_rest(const S* from, int64_t n) {
  return Stored<float, S>{const_cast<S*>(from)}.load_part(0, n);
}

template <class S>
void widen_compensated(const S* from, const S* compensation, int64_t n, float* to) {
  for_packs(n, [&](int64_t i, int64_t part) FUSEDSTEP_INLINE {
    const bool whole = part == kLanes<float>;
    const FloatPack sum = whole ? load_pack<float, S>(from + i) + load_pack<float, S>(compensation + i)
                                : load_rest(from + i, part) + load_rest(compensation + i, part);
    store_pack<float, float>(to + i, sum);
  });
}

// A weight, in its form. The fp32 numbers lie in the buffer, or where they are kept.
struct Weight {
  const Record& record;
  Buffer buffer;

  float* load(int64_t at, int64_t n) {
    float* const wide = buffer.numbers;
    void* const aux = record.precision.aux;
    switch (record.precision.weight_format) {
      case WeightFormat::kMaster:
        return static_cast<float*>(aux) + at;
      case WeightFormat::kSplit: {
        const BF16* const upper = static_cast<const BF16*>(record.param) + at;
        const int16_t* const lower = static_cast<const int16_t*>(aux) + at;
        widen_split(upper, lower, n, wide);
        return wide;
      }
      case WeightFormat::kKahan:
        visit_half([&](auto* param) {
          using S = std::remove_pointer_t<decltype(param)>;
          widen_compensated(param + at, static_cast<const S*>(aux) + at, n, wide);
        });
        return wide;
      case WeightFormat::kPlain:
      case WeightFormat::kStochastic:
        break;
    }
    if (record.param_dtype == Dtype::kF32) return static_cast<float*>(record.param) + at;
    widen_plain(record.param, record.param_dtype, at, n, wide);
    return wide;
  }

  void store(int64_t at, int64_t n, int64_t step, const float* wide) const {
    void* const aux = record.precision.aux;
    switch (record.precision.weight_format) {
      case WeightFormat::kSplit: {
        BF16* const upper = static_cast<BF16*>(record.param) + at;
        int16_t* const lower = static_cast<int16_t*>(aux) + at;
        return narrow_split(upper, lower, n, wide);
      }
      case WeightFormat::kKahan:
        return visit_half([&](auto* param) {
          using S = std::remove_pointer_t<decltype(param)>;
          narrow_compensated(param + at, static_cast<S*>(aux) + at, n, wide);
        });
      case WeightFormat::kStochastic: {
        RandomBlock random;
        random.fill(record.precision, static_cast<uint32_t>(step), at / kBlock * kBlock);
        return visit_half([&](auto* param) { narrow_at_random(param + at, random.bits + at % kBlock, n, wide); });
      }
      case WeightFormat::kPlain:
      case WeightFormat::kMaster:
        break;
    }
    if (record.param_dtype != Dtype::kF32) narrow_plain(record.param, record.param_dtype, at, n, wide);
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

// A state that is not updated where it lies.
struct State {
  void* data;
  Dtype dtype;
  Buffer buffer;

  float* load(int64_t at, int64_t n) {
    if (dtype == Dtype::kF32) return static_cast<float*>(data) + at;
    widen_plain(data, dtype, at, n, buffer.numbers);
    return buffer.numbers;
  }
  void store(int64_t at, int64_t n) const {
    if (dtype != Dtype::kF32) narrow_plain(data, dtype, at, n, buffer.numbers);
  }
};

}  // namespace

void update_tiles(const Record& record, const void* grad, int64_t begin, int64_t end, uint32_t states, int64_t step,
                  bool writes_grad, bool widens_states, UpdateTile update, const void* context) {
  Weight weight{record, {}};
  State state[kMaxStates];
  for (int k = 0; k < kMaxStates; ++k) {
    state[k].data = record.states[k];
    state[k].dtype = record.state_dtypes[k];
  }
  Buffer grad_buffer;
  Record tile = record;
  const bool in_place = record.precision.weight_format == WeightFormat::kPlain && record.param_dtype == Dtype::kF32 &&
                        record.grad_dtype == Dtype::kF32 && !widens_states;
  for (int64_t at = begin, n; at < end; at += n) {
    n = (in_place ? end : std::min(end, (at / kTile + 1) * kTile)) - at;
    float* wide_grad = static_cast<float*>(const_cast<void*>(grad)) + at;
    if (record.grad_dtype != Dtype::kF32) {
      wide_grad = grad_buffer.numbers;
      widen_plain(grad, record.grad_dtype, at, n, wide_grad);
    }
    float* const wide = weight.load(at, n);
    tile.param = wide;
    for (int k = 0; k < kMaxStates; ++k) {
      if ((states >> k & 1) == 0) continue;
      if (widens_states)
        tile.states[k] = state[k].load(at, n);
      else
        tile.states[k] = static_cast<char*>(record.states[k]) + size_of(record.state_dtypes[k], at);
    }
    update(tile, wide_grad, n, context);
    weight.store(at, n, step, wide);
    for (int k = 0; k < kMaxStates; ++k)
      if (widens_states && (states >> k & 1)) state[k].store(at, n);
    if (writes_grad && record.grad_dtype != Dtype::kF32)
      narrow_plain(const_cast<void*>(grad), record.grad_dtype, at, n, wide_grad);
  }
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
