// Tensors of every format of weights and states, filled with numbers that depend on nothing but integer arithmetic.
#pragma once

#include <cstring>
#include <vector>

#include "../../csrc/table.h"

namespace fusedstep {

struct Random {
  uint64_t state = 0x9e3779b97f4a7c15u;
  uint32_t bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
  // Mostly ordinary; now and then anything.
  float number() {
    const uint32_t x = bits();
    const float ordinary = static_cast<float>(static_cast<int32_t>(x)) * 0x1p-31f;
    return bits() % 97 == 0 ? bit_cast<float>(bits()) : ordinary;
  }
};

using Bytes = std::vector<unsigned char>;

inline void put(Bytes& bytes, Dtype dtype, int64_t i, float number) {
  const auto at = [&](auto stored) {
    std::memcpy(bytes.data() + i * static_cast<int64_t>(sizeof(stored)), &stored, sizeof(stored));
  };
  switch (dtype) {
    case Dtype::kF64:
      return at(static_cast<double>(number));
    case Dtype::kF32:
      return at(number);
    case Dtype::kBF16:
      return at(narrow<BF16>(number));
    case Dtype::kF16:
      return at(narrow<F16>(number));
    default:
      return;  // codes and halves begin as zeros
  }
}

template <class T>
void canonical(T& bits, T magnitude, T infinity) {
  if ((bits & magnitude) > infinity) bits = magnitude;
}

inline uint64_t hashed(Bytes bytes, Dtype dtype, uint64_t hash) {
  const size_t size = static_cast<size_t>(size_of(dtype));
  for (size_t i = 0; i + size <= bytes.size(); i += size) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, size);
    if (dtype == Dtype::kF64) canonical<uint64_t>(word, 0x7fffffffffffffffu, 0x7ff0000000000000u);
    if (dtype == Dtype::kF32) canonical<uint64_t>(word, 0x7fffffffu, 0x7f800000u);
    if (dtype == Dtype::kBF16) canonical<uint64_t>(word, 0x7fffu, 0x7f80u);
    if (dtype == Dtype::kF16) canonical<uint64_t>(word, 0x7fffu, 0x7c00u);
    hash = (hash ^ word) * 0x100000001b3u;
  }
  return hash;
}

enum class States { kFp32, kFp64, kBf16, kFp16, k8Bit, k4Bit };

struct Format {
  const char* name;
  Dtype param;
  WeightFormat weight_format;
  States states;
};
constexpr Format kFormats[] = {
    {"fp64", Dtype::kF64, WeightFormat::kPlain, States::kFp64},
    {"fp32", Dtype::kF32, WeightFormat::kPlain, States::kFp32},
    {"fp32, bf16 states", Dtype::kF32, WeightFormat::kPlain, States::kBf16},
    {"fp32, 8-bit states", Dtype::kF32, WeightFormat::kPlain, States::k8Bit},
    {"fp32, 4-bit states", Dtype::kF32, WeightFormat::kPlain, States::k4Bit},
    {"bf16", Dtype::kBF16, WeightFormat::kPlain, States::kBf16},
    {"bf16, fp32 states", Dtype::kBF16, WeightFormat::kPlain, States::kFp32},
    {"bf16, 8-bit states", Dtype::kBF16, WeightFormat::kPlain, States::k8Bit},
    {"bf16, 4-bit states", Dtype::kBF16, WeightFormat::kPlain, States::k4Bit},
    {"fp16", Dtype::kF16, WeightFormat::kPlain, States::kFp16},
    {"fp16, 8-bit states", Dtype::kF16, WeightFormat::kPlain, States::k8Bit},
    {"split", Dtype::kBF16, WeightFormat::kSplit, States::kFp32},
    {"split, bf16 states", Dtype::kBF16, WeightFormat::kSplit, States::kBf16},
    {"split, 8-bit states", Dtype::kBF16, WeightFormat::kSplit, States::k8Bit},
    {"master bf16", Dtype::kBF16, WeightFormat::kMaster, States::kFp32},
    {"master fp16", Dtype::kF16, WeightFormat::kMaster, States::kFp32},
    {"kahan bf16", Dtype::kBF16, WeightFormat::kKahan, States::kBf16},
    {"kahan fp16", Dtype::kF16, WeightFormat::kKahan, States::kFp16},
    {"stochastic bf16", Dtype::kBF16, WeightFormat::kStochastic, States::kBf16},
    {"stochastic fp16", Dtype::kF16, WeightFormat::kStochastic, States::kFp16},
    {"stochastic, 8-bit states", Dtype::kBF16, WeightFormat::kStochastic, States::k8Bit},
    {"stochastic, 4-bit states", Dtype::kBF16, WeightFormat::kStochastic, States::k4Bit},
};

inline Dtype aux_dtype(const Format& format) {
  return format.weight_format == WeightFormat::kMaster  ? Dtype::kF32
         : format.weight_format == WeightFormat::kSplit ? Dtype::kI16
                                                        : format.param;
}

// A parameter and what a rule has beside it.
template <class Rule>
struct Tensor {
  const Format format;
  float step = 0.0f;
  Bytes param, grad, aux, states[kMaxStates];
  std::vector<float> scales[kMaxStates];
  Record record{};

  Tensor(const Format& given, int64_t n, Random& random) : format(given) {
    const auto memory = [&](Dtype dtype) { return Bytes(static_cast<size_t>(size_of(dtype, n))); };
    param = memory(format.param), grad = param, aux = memory(aux_dtype(format));
    record.param = param.data();
    record.step = &step;
    record.numel = n;
    record.param_dtype = record.grad_dtype = format.param;
    record.precision.weight_format = format.weight_format;
    if (format.weight_format != WeightFormat::kPlain && format.weight_format != WeightFormat::kStochastic)
      record.precision.aux = aux.data();
    record.precision.seed = 7, record.precision.index = 3;
    for (int k = 0; k < kNumNamed<Rule>; ++k) {
      if (!Rule::kPresent[k]) continue;
      Dtype dtype = format.states == States::kFp64   ? Dtype::kF64
                    : format.states == States::kBf16 ? Dtype::kBF16
                    : format.states == States::kFp16 ? Dtype::kF16
                                                     : Dtype::kF32;
      const int bits = format.states == States::k8Bit ? 8 : format.states == States::k4Bit ? 4 : 0;
      if (bits != 0 && Rule::kCodes[k] != Code::kNone) {
        dtype = code_dtype(bits, Rule::kCodes[k] == Code::kSigned);
        scales[k].resize(static_cast<size_t>((n + kBlock - 1) / kBlock));
        record.precision.scales[k] = scales[k].data();
        record.precision.state_bits = static_cast<uint8_t>(bits);
      }
      states[k] = memory(dtype);
      record.states[k] = states[k].data();
      record.state_dtypes[k] = dtype;
    }
    for (int64_t i = 0; i < n; ++i) {
      const float number = random.number();
      put(param, format.param, i, number);
      if (format.weight_format == WeightFormat::kMaster) put(aux, Dtype::kF32, i, number);
    }
  }
  Tensor(const Tensor&) = delete;

  void fill_grad(Random& random) {
    for (int64_t i = 0; i < record.numel; ++i) put(grad, format.param, i, random.number());
  }
  uint64_t hash_of_weight(uint64_t hash) const {
    hash = hashed(param, format.param, hash);
    return record.precision.aux == nullptr ? hash : hashed(aux, aux_dtype(format), hash);
  }
  uint64_t hash_of_state(int k, uint64_t hash) const {
    Bytes scale(scales[k].size() * sizeof(float));
    if (!scale.empty()) std::memcpy(scale.data(), scales[k].data(), scale.size());
    return hashed(scale, Dtype::kF32, hashed(states[k], record.state_dtypes[k], hash));
  }
};

}  // namespace fusedstep
