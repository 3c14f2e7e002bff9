// The general way, for whatever has no kernel of its own: any dtypes, any form of weight, fp64, one element after the
// other. A lane takes eight elements, of one random counter; a warp a block of 256, which may share a scale.
#pragma once

#include "formats.h"
#include "kernel.cuh"

namespace fusedstep::cuda {

template <class T>
__device__ __forceinline__ T load_weight(const Record& record, int64_t i) {
  const void* const aux = record.precision.aux;
  switch (record.precision.weight_format) {
    case WeightFormat::kMaster:
      return load<T>(global(static_cast<const float*>(aux))[i]);
    case WeightFormat::kSplit:
      return load<T>(
          join(global(static_cast<const BF16*>(record.param))[i], global(static_cast<const int16_t*>(aux))[i]));
    case WeightFormat::kKahan:
      return load_any<T>(record.param, record.param_dtype, i) + load_any<T>(aux, record.param_dtype, i);
    case WeightFormat::kPlain:
    case WeightFormat::kStochastic:
      break;
  }
  return load_any<T>(record.param, record.param_dtype, i);
}

template <class S>
__device__ __forceinline__ void store_compensated(const Record& record, int64_t i, float param) {
  const S narrowed = narrow<S>(param);
  global(static_cast<S*>(record.param))[i] = narrowed;
  global(static_cast<S*>(record.precision.aux))[i] = lost(param, narrowed);
}
template <class S>
__device__ __forceinline__ void store_at_random(const Record& record, int64_t i, float param, uint32_t bits) {
  global(static_cast<S*>(record.param))[i] = narrow_stochastic<S>(param, bits);
}

__device__ __forceinline__ void store_formed(const Record& record, int64_t i, float param, uint32_t step) {
  const Precision& p = record.precision;
  const bool bf16 = record.param_dtype == Dtype::kBF16;
  switch (p.weight_format) {
    case WeightFormat::kMaster:
      global(static_cast<float*>(p.aux))[i] = param;
      return store_any(record.param, record.param_dtype, i, param);
    case WeightFormat::kSplit: {
      const Split<uint32_t, float> split(param);
      global(static_cast<BF16*>(record.param))[i] = BF16{static_cast<uint16_t>(split.upper >> 16)};
      global(static_cast<int16_t*>(p.aux))[i] = static_cast<int16_t>(split.lower >> 16);
      return;
    }
    case WeightFormat::kKahan:
      return bf16 ? store_compensated<BF16>(record, i, param) : store_compensated<F16>(record, i, param);
    case WeightFormat::kStochastic: {
      const int64_t element = p.element_map.element(i);
      const Philox random(p.seed, p.index, step, static_cast<uint64_t>(element) / kPhiloxElements);
      const uint32_t bits = random.bits(static_cast<int>(element % kPhiloxElements));
      return bf16 ? store_at_random<BF16>(record, i, param, bits) : store_at_random<F16>(record, i, param, bits);
    }
    case WeightFormat::kPlain:
      return store_any(record.param, record.param_dtype, i, param);
  }
}

// What followers follow: the fp32 weight where one is kept, else the stored one.
template <class T>
__device__ __forceinline__ void follow_one(const Record& record, int64_t i, T weight) {
  const bool exact =
      record.precision.weight_format == WeightFormat::kMaster || record.precision.weight_format == WeightFormat::kSplit;
  const T param = exact ? load_weight<T>(record, i) : load_any<T>(record.param, record.param_dtype, i);
  if (record.average != nullptr) {
    T* const average = global(static_cast<T*>(record.average));
    average[i] = average[i] + weight * (param - average[i]);
  }
  if (record.copy != nullptr) store_any(record.copy, record.copy_dtype, i, param);
}

template <class T>
__device__ __forceinline__ T load_state(const Record& record, int k, int64_t i, float scale) {
  T value;
  const bool quantized = visit_quantizer(record.state_dtypes[k], [&](auto quantizer) {
    using Q = decltype(quantizer);
    const uint8_t byte = global(static_cast<const uint8_t*>(record.states[k]))[i * Q::kBits / 8];
    value = Q::template dequantize<uint32_t>(Q::code_in(byte, i), scale);
  });
  return quantized ? value : load_any<T>(record.states[k], record.state_dtypes[k], i);
}
template <class T>
__device__ __forceinline__ void store_state(const Record& record, int k, int64_t i, T value, const Block& block) {
  const bool quantized = visit_quantizer(record.state_dtypes[k], [&](auto quantizer) {
    using Q = decltype(quantizer);
    uint8_t* const byte = global(static_cast<uint8_t*>(record.states[k])) + i * Q::kBits / 8;
    *byte = Q::with_code(*byte, i, Q::template quantize<uint32_t>(static_cast<float>(value), block));
  });
  if (!quantized) store_any(record.states[k], record.state_dtypes[k], i, value);
}

template <class R>
struct General {
  using Rule = R;
  static constexpr int kN = kGeneralNumbers, kBlocks = kGeneralBlocks;
  static_assert(kN * kWarp == kBlock && kN == kPhiloxElements, "a warp holds a block");

  union Prepared {
    struct {
      typename Rule::template Scalars<float> single;
      GradChange<float> change;
      uint32_t step;
    };
    struct {
      typename Rule::template Scalars<double> fp64;
      GradChange<double> change_fp64;
    };

    __device__ __forceinline__ void fill(const Record& record, const double* hyper, int64_t number, const Step& given) {
      if (record.param_dtype == Dtype::kF64) {
        fp64 = Rule::template prepare<double>(hyper, number);
        change_fp64 = grad_change<double>(given);
      } else {
        single = Rule::template prepare<float>(hyper, number);
        change = grad_change<float>(given);
        step = static_cast<uint32_t>(number);
      }
    }
  };

  __device__ __forceinline__ void begin(const Record&, const void*) {}
  __device__ __forceinline__ void ask(const Record&, const void*, int64_t, int) {}
  __device__ __forceinline__ void zero_grad(const Record& record, void* grad, int64_t at, int n) {
    for (int j = 0; j < min(n, kN); ++j) store_any(grad, record.grad_dtype, at + j, 0.0f);
  }
  __device__ __forceinline__ void update(const Record& record, void* grad, const Prepared& prepared, int64_t at, int n,
                                         double average_weight) {
    if (record.param_dtype == Dtype::kF64)
      update_as(record, grad, prepared.fp64, prepared.change_fp64, 0, at, n, average_weight);
    else
      update_as(record, grad, prepared.single, prepared.change, prepared.step, at, n,
                static_cast<float>(average_weight));
  }

 private:
  template <class T>
  __device__ __forceinline__ void update_as(const Record& record, void* grad,
                                            const typename Rule::template Scalars<T>& s, const GradChange<T>& change,
                                            uint32_t step, int64_t at, int n, T average_weight) {
    const bool in_blocks = record.precision.state_bits != 0;
    float scales[kMaxStates] = {};
    uint32_t max_abs[kMaxStates] = {};
    Block blocks[kMaxStates];
#pragma unroll
    for (int k = 0; k < kNumNamed<Rule>; ++k) {
      if (has_state<Rule>(k) && is_quantized(record.state_dtypes[k]) && static_cast<int>(at % kBlock) + n > 0)
        scales[k] = global(record.precision.scales[k])[at / kBlock];
    }
    // States that share scales are computed twice: the largest of a block is known only after the first time.
#pragma unroll 1
    for (int pass = in_blocks ? 0 : 1; pass < 2; ++pass) {
#pragma unroll 1
      for (int j = 0; j < min(n, kN); ++j) {
        const int64_t i = at + j;
        T param = load_weight<T>(record, i);
        const T g = change(load_any<T>(grad, record.grad_dtype, i));
        T states[kMaxStates] = {};
#pragma unroll
        for (int k = 0; k < kNumNamed<Rule>; ++k)
          if (has_state<Rule>(k)) states[k] = load_state<T>(record, k, i, scales[k]);
        update_with<Rule>(param, g, states, s);
        if (pass == 0) {
#pragma unroll
          for (int k = 0; k < kNumNamed<Rule>; ++k) {
            const uint32_t magnitude = bit_cast<uint32_t>(static_cast<float>(states[k])) & 0x7fffffffu;
            max_abs[k] = magnitude > max_abs[k] ? magnitude : max_abs[k];
          }
          continue;
        }
        if constexpr (std::is_same_v<T, double>)
          store_any(record.param, record.param_dtype, i, param);
        else
          store_formed(record, i, param, step);
        if (change.zero) store_any(grad, record.grad_dtype, i, T(0));
        if (change.write) store_any(grad, record.grad_dtype, i, g * change.sign);
#pragma unroll
        for (int k = 0; k < kNumNamed<Rule>; ++k)
          if (has_state<Rule>(k)) store_state(record, k, i, states[k], blocks[k]);
        if (record.has_followers()) follow_one<T>(record, i, average_weight);
      }
      if (pass == 0) {
#pragma unroll
        for (int k = 0; k < kNumNamed<Rule>; ++k) {
          if (!has_state<Rule>(k)) continue;
          max_abs[k] = warp_maximum(max_abs[k]);
          blocks[k] = Block(max_abs[k]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kNumNamed<Rule>; ++k) {
      if (has_state<Rule>(k) && is_quantized(record.state_dtypes[k]) && at % kBlock == 0 && n > 0)
        global(record.precision.scales[k])[at / kBlock] = Block::scale(max_abs[k]);
    }
  }
};

}  // namespace fusedstep::cuda
