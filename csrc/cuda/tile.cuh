// The way of a parameter whose format was known when its kernel was compiled: one vector a thread and array, everything
// that a step does with it in registers.
#pragma once

#include "formats.h"
#include "kernel.cuh"
#include "stored.cuh"

namespace fusedstep::cuda {

// States from k on.
template <class Rule, StateFormat kStates, int kN, int k = 0, bool kEnd = k == kNamed<Rule>>
struct States {
  static constexpr bool kHas = has_state<Rule>(k);
  using State = typename StateOf<state_dtype<Rule>(kStates, k), kN>::Type;
  State state;
  States<Rule, kStates, kN, k + 1> others;

  // visitor(k, state)
  template <class Visitor>
  __device__ __forceinline__ void for_each(Visitor&& visitor) {
    if constexpr (kHas) visitor(k, state);
    others.for_each(visitor);
  }
};
template <class Rule, StateFormat kStates, int kN, int k>
struct States<Rule, kStates, kN, k, true> {
  template <class Visitor>
  __device__ __forceinline__ void for_each(Visitor&&) {}
};

// What follows the weight: its average, and its copy in a dtype that is known only now.
template <int kN, bool kFollowed>
struct Followers {
  Numbers<float, kN> average;

  __device__ __forceinline__ static uint64_t address_bits(const Record& record) {
    return reinterpret_cast<uint64_t>(record.average) | reinterpret_cast<uint64_t>(record.copy);
  }
  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record& record, Visitor&& visitor) {
    if (record.average != nullptr) visitor(average, static_cast<float*>(record.average));
  }
  template <class S, class Visitor>
  __device__ __forceinline__ void store_copy(const Record& record, const float* followed, Visitor&& store) {
    Numbers<S, kN> numbers;
    numbers.put(followed);
    store(numbers, static_cast<S*>(record.copy));
  }
  template <class Visitor>
  __device__ __forceinline__ void update(const Record& record, const float* followed, float weight, Visitor&& store) {
    if (record.average != nullptr) {
      float values[kN];
#pragma unroll
      for (int i = 0; i < kN; ++i) values[i] = average[i] + weight * (followed[i] - average[i]);
      average.put(values);
      for_arrays(record, store);
    }
    if (record.copy == nullptr) return;
    if (record.copy_dtype == Dtype::kBF16)
      store_copy<BF16>(record, followed, store);
    else if (record.copy_dtype == Dtype::kF16)
      store_copy<F16>(record, followed, store);
    else
      store_copy<float>(record, followed, store);
  }
};
template <int kN>
struct Followers<kN, false> {
  __device__ __forceinline__ static uint64_t address_bits(const Record&) { return 0; }
  template <class Visitor>
  __device__ __forceinline__ void for_arrays(const Record&, Visitor&&) {}
  template <class Visitor>
  __device__ __forceinline__ void update(const Record&, const float*, float, Visitor&&) {}
};

template <class R, int kFormat, bool kFollowed>
struct Tile {
  using Rule = R;
  static constexpr Format kF = kFormats[kFormat];
  static constexpr int kN = numbers_per_thread(kF);
  struct alignas(16) Prepared {
    typename Rule::template Scalars<float> scalars;
    bool uses_change;
    uint32_t step;
    GradChange<float> change;

    __device__ __forceinline__ void fill(const Record&, const double* hyper, int64_t number, const GradsBecome& become) {
      scalars = Rule::template prepare<float>(hyper, number);
      change = become.change<float>();
      uses_change = change.any || change.zero || change.write;
      step = static_cast<uint32_t>(number);
    }
  };

  using GradNumber = typename NumberOf<kF.grad>::Type;
  typename WeightOf<kF.weight, kN>::Type weight;
  Numbers<GradNumber, kN> grad;
  States<Rule, kF.states, kN> states;
  Followers<kN, kFollowed> followers;
  bool aligned;

  // Blocks for each multiprocessor: four that have 64 bytes in flight for each thread, or three that have more.
  static constexpr int kBlocks = sizeof(weight) + sizeof(grad) + sizeof(states) + sizeof(followers) > 76 ? 3 : 4;

  __device__ __forceinline__ void begin(const Record& record, const void* gradient) {
    // Chunks begin at multiples of 16 elements, so that the tensors' own addresses decide.
    uint64_t bits = reinterpret_cast<uint64_t>(gradient) | followers.address_bits(record);
    const auto add = [&](auto&, auto* data, bool = true) { bits |= reinterpret_cast<uint64_t>(data); };
    weight.for_arrays(record, add);
    states.for_each([&](int k, auto& state) { state.for_arrays(record, k, add); });
    aligned = (bits & 15) == 0;
  }

  // Asks for everything, before anything is used. n: how many numbers there are from element i on, 0 or less included.
  __device__ __forceinline__ void ask(const Record& record, const void* gradient, int64_t i, int n) {
    states.for_each([&](int k, auto& state) { state.load_scale(record, k, i, n); });
    if (!whole(n)) return;
    for_loaded(record, gradient, [&](auto& array, auto* data) { array.load(data + i); });
  }

  __device__ __forceinline__ void zero_grad(const Record&, void* gradient, int64_t i, int n) {
    grad.clear();
    store_grad(gradient, i, n);
  }

  __device__ __forceinline__ void update(const Record& record, void* gradient, const Prepared& prepared, int64_t i, int n,
                                         double average_weight) {
    if (!whole(n)) for_loaded(record, gradient, [&](auto& array, auto* data) { array.load_some(data + i, n); });
    const auto s = prepared.scalars;
    constexpr int kPlaces = kNamed<Rule> > 0 ? kNamed<Rule> : 1;
    float param[kN], g[kN], values[kPlaces][kN] = {};
    weight.join(param);
#pragma unroll
    for (int j = 0; j < kN; ++j) g[j] = grad[j];
    states.for_each([&](int k, auto& state) { state.join(values[k]); });
    if (prepared.uses_change) change_grad(gradient, prepared.change, g, i, n);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      float of_one[kMaxStates] = {};
#pragma unroll
      for (int k = 0; k < kNamed<Rule>; ++k) of_one[k] = values[k][j];
      update_with<Rule>(param[j], g[j], of_one, s);
#pragma unroll
      for (int k = 0; k < kNamed<Rule>; ++k) values[k][j] = of_one[k];
    }
    weight.split(param, record, i, prepared.step);
    states.for_each([&](int k, auto& state) { state.split(values[k], record, k, i, n); });
    forget_addresses();
    const auto store = [&](auto& array, auto* data, bool = true) {
      if (whole(n))
        array.store(data + i);
      else
        array.store_some(data + i, n);
    };
    weight.for_arrays(record, store);
    states.for_each([&](int k, auto& state) { state.for_arrays(record, k, store); });
    followers.update(record, param, static_cast<float>(average_weight), store);
  }

 private:
  // Those of the loads are read again for the stores, rather than kept in registers meanwhile.
  __device__ __forceinline__ static void forget_addresses() { asm volatile("" ::: "memory"); }
  __device__ __forceinline__ bool whole(int n) const { return aligned && n >= kN; }
  template <class Visitor>
  __device__ __forceinline__ void for_loaded(const Record& record, const void* gradient, Visitor&& visitor) {
    const auto visit = [&](auto& array, auto* data, bool loaded = true) {
      if (loaded) visitor(array, data);
    };
    weight.for_arrays(record, visit);
    visit(grad, static_cast<const GradNumber*>(gradient));
    states.for_each([&](int k, auto& state) { state.for_arrays(record, k, visit); });
    followers.for_arrays(record, visit);
  }
  __device__ __forceinline__ void store_grad(void* gradient, int64_t i, int n) {
    GradNumber* const data = static_cast<GradNumber*>(gradient) + i;
    if (whole(n))
      grad.store(data);
    else
      grad.store_some(data, n);
  }
  __device__ __forceinline__ void change_grad(void* gradient, const GradChange<float>& change, float* g, int64_t i,
                                              int n) {
    if (change.divides) {
#pragma unroll
      for (int j = 0; j < kN; ++j) g[j] = g[j] / change.scale;
    }
    if (change.any) {
#pragma unroll
      for (int j = 0; j < kN; ++j) g[j] = g[j] * change.factor;
    }
    if (change.zero) {
      grad.clear();
      store_grad(gradient, i, n);
    } else if (change.write) {
      float written[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j) written[j] = g[j] * change.sign;
      grad.put(written);
      store_grad(gradient, i, n);
    }
  }
};

}  // namespace fusedstep::cuda
