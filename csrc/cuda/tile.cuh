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
  void* copy;
  Dtype copy_dtype;

  __device__ __forceinline__ void begin(const Record& record, int64_t offset) {
    average.data = record.average == nullptr ? nullptr : static_cast<float*>(record.average) + offset;
    copy_dtype = record.copy_dtype;
    copy = record.copy == nullptr
               ? nullptr
               : static_cast<char*>(record.copy) + offset * (copy_dtype == Dtype::kF32 ? sizeof(float) : sizeof(BF16));
  }
  __device__ __forceinline__ uint64_t address_bits() const {
    return reinterpret_cast<uint64_t>(average.data) | reinterpret_cast<uint64_t>(copy);
  }
  template <class Visitor>
  __device__ __forceinline__ void for_loaded(Visitor&& visitor) {
    if (average.data != nullptr) visitor(average);
  }
  template <class S>
  __device__ __forceinline__ void store_copy(const float* followed, int at, int n, bool whole) {
    Numbers<S, kN> numbers;
    numbers.data = static_cast<S*>(copy);
    numbers.put(followed);
    if (whole)
      numbers.store(at);
    else
      numbers.store_some(at, n);
  }
  __device__ __forceinline__ void update(const float* followed, float weight, int at, int n, bool whole) {
    if (average.data != nullptr) {
      float values[kN];
#pragma unroll
      for (int i = 0; i < kN; ++i) values[i] = average[i] + weight * (followed[i] - average[i]);
      average.put(values);
      if (whole)
        average.store(at);
      else
        average.store_some(at, n);
    }
    if (copy == nullptr) return;
    if (copy_dtype == Dtype::kBF16)
      store_copy<BF16>(followed, at, n, whole);
    else if (copy_dtype == Dtype::kF16)
      store_copy<F16>(followed, at, n, whole);
    else
      store_copy<float>(followed, at, n, whole);
  }
};
template <int kN>
struct Followers<kN, false> {
  __device__ __forceinline__ void begin(const Record&, int64_t) {}
  __device__ __forceinline__ uint64_t address_bits() const { return 0; }
  template <class Visitor>
  __device__ __forceinline__ void for_loaded(Visitor&&) {}
  __device__ __forceinline__ void update(const float*, float, int, int, bool) {}
};

template <class R, int kFormat, bool kFollowed>
struct Tile {
  using Rule = R;
  static constexpr Format kF = kFormats[kFormat];
  static constexpr int kN = numbers_per_thread(kF);
  // Registers for four blocks a multiprocessor, or for three where many numbers are held.
  static constexpr int kBlocks = (kHeld<Rule> + (kFollowed ? 1 : 0)) * kN > 20 ? 3 : 4;

  struct Prepared {
    typename Rule::template Scalars<float> scalars;
    GradChange<float> change;
    uint32_t step;

    __device__ __forceinline__ void fill(const double* hyper, int64_t number, bool, const GradsBecome& become) {
      scalars = Rule::template prepare<float>(hyper, number);
      change = become.change<float>();
      step = static_cast<uint32_t>(number);
    }
  };

  typename WeightOf<kF.weight, kN>::Type weight;
  Numbers<typename NumberOf<kF.grad>::Type, kN> grad;
  States<Rule, kF.states, kN> states;
  Followers<kN, kFollowed> followers;
  int64_t offset;
  bool aligned;

  __device__ __forceinline__ void begin(const Record& record, const void* gradient, int64_t chunk_offset) {
    offset = chunk_offset;
    weight.begin(record, offset);
    grad.data = const_cast<decltype(grad.data)>(static_cast<const std::remove_pointer_t<decltype(grad.data)>*>(gradient)) +
                offset;
    states.for_each([&](int k, auto& state) { state.begin(record, k, chunk_offset); });
    followers.begin(record, offset);
    // Chunks begin at multiples of 16 elements, so that the tensors' own addresses decide.
    uint64_t bits = reinterpret_cast<uint64_t>(grad.data) | followers.address_bits();
    const auto add = [&](auto& array, bool = true) { bits |= reinterpret_cast<uint64_t>(array.data); };
    weight.for_arrays(add);
    states.for_each([&](int, auto& state) { state.for_arrays(add); });
    aligned = (bits & 15) == 0;
  }

  __device__ __forceinline__ bool is_fp64() const { return false; }
  // Asks for everything, before anything is used. n: how many numbers there are from `at` on, 0 or less included.
  __device__ __forceinline__ void ask(int at, int n) {
    states.for_each([&](int, auto& state) { state.load_scale(at, n); });
    if (!whole(n)) return;
    const auto take = [&](auto& array, bool loaded = true) {
      if (loaded) array.load(at);
    };
    weight.for_arrays(take);
    take(grad);
    states.for_each([&](int, auto& state) { state.for_arrays(take); });
    followers.for_loaded(take);
  }

  __device__ __forceinline__ void zero_grad(int at, int n) {
    grad.clear();
    store_grad(at, n);
  }

  __device__ __forceinline__ void update(const Prepared& prepared, int at, int n, double average_weight) {
    if (!whole(n)) {
      const auto take = [&](auto& array, bool loaded = true) {
        if (loaded) array.load_some(at, n);
      };
      weight.for_arrays(take);
      take(grad);
      states.for_each([&](int, auto& state) { state.for_arrays(take); });
      followers.for_loaded(take);
    }
    const auto s = prepared.scalars;
    const GradChange<float>& change = prepared.change;
    constexpr int kPlaces = kNamed<Rule> > 0 ? kNamed<Rule> : 1;
    float param[kN], g[kN], values[kPlaces][kN] = {};
    weight.join(param);
#pragma unroll
    for (int i = 0; i < kN; ++i) g[i] = grad[i];
    states.for_each([&](int k, auto& state) { state.join(values[k]); });
    if (change.divides) {
#pragma unroll
      for (int i = 0; i < kN; ++i) g[i] = g[i] / change.scale;
    }
    if (change.any) {
#pragma unroll
      for (int i = 0; i < kN; ++i) g[i] = g[i] * change.factor;
    }
    if (change.zero) {
      zero_grad(at, n);
    } else if (change.write) {
      float written[kN];
#pragma unroll
      for (int i = 0; i < kN; ++i) written[i] = g[i] * change.sign;
      grad.put(written);
      store_grad(at, n);
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      float of_one[kMaxStates] = {};
#pragma unroll
      for (int k = 0; k < kNamed<Rule>; ++k) of_one[k] = values[k][i];
      update_with<Rule>(param[i], g[i], of_one, s);
#pragma unroll
      for (int k = 0; k < kNamed<Rule>; ++k) values[k][i] = of_one[k];
    }
    weight.split(param, Position{offset + at, n, prepared.step});
    states.for_each([&](int k, auto& state) { state.split(values[k], at, n); });
    if (whole(n)) {
      const auto put = [&](auto& array, bool = true) { array.store(at); };
      weight.for_arrays(put);
      states.for_each([&](int, auto& state) { state.for_arrays(put); });
    } else {
      const auto put = [&](auto& array, bool = true) { array.store_some(at, n); };
      weight.for_arrays(put);
      states.for_each([&](int, auto& state) { state.for_arrays(put); });
    }
    followers.update(param, static_cast<float>(average_weight), at, n, whole(n));
  }

 private:
  __device__ __forceinline__ bool whole(int n) const { return aligned && n >= kN; }
  __device__ __forceinline__ void store_grad(int at, int n) {
    if (whole(n))
      grad.store(at);
    else
      grad.store_some(at, n);
  }
};

}  // namespace fusedstep::cuda
