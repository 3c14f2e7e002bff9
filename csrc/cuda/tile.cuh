// The way of a parameter whose format was known when its kernel was compiled: one vector a thread and array, everything
// that a step does with it in registers.
#pragma once

#include <climits>

#include "formats.h"
#include "kernel.cuh"
#include "quick.cuh"
#include "states.cuh"
#include "weights.cuh"

namespace fusedstep::cuda {

// States from k on.
template <class Rule, StateFormat kStates, int kN, int k = 0, bool kEnd = k == kNumNamed<Rule>>
struct States {
  static constexpr bool kHas = has_state<Rule>(k);
  struct Absent {};
  using State = std::conditional_t<kHas, typename StateOf<state_dtype<Rule>(kStates, k), kN>::Type, Absent>;
  State state;
  States<Rule, kStates, kN, k + 1> others;

  // visitor(k, state)
  template <class Visitor>
  __device__ __forceinline__ void for_each(Visitor&& visitor) {
    if constexpr (kHas) visitor(k, state);
    others.for_each(visitor);
  }
  template <class Visitor>
  __device__ __forceinline__ void for_each(Visitor&& visitor) const {
    if constexpr (kHas) visitor(k, state);
    others.for_each(visitor);
  }
};
template <class Rule, StateFormat kStates, int kN, int k>
struct States<Rule, kStates, kN, k, true> {
  template <class Visitor>
  __device__ __forceinline__ void for_each(Visitor&&) const {}
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
    uint32_t step;
    GradChange<float> change;
    bool changes, stores;  // the gradient, for the update and in memory

    __device__ __forceinline__ void fill(const Record&, const double* hyper, int64_t number, const Step& given) {
      scalars = Rule::template prepare<float>(hyper, number);
      change = grad_change<float>(given);
      changes = change.any;
      stores = change.zero || change.write;
      step = static_cast<uint32_t>(number);
    }
  };

  using GradNumber = typename NumberOf<kF.grad>::Type;
  typename WeightOf<kF.weight, kN>::Type weight;
  Numbers<GradNumber, kN> grad;
  States<Rule, kF.states, kN> states;
  Followers<kN, kFollowed> followers;
  int whole_from;  // as many numbers as make a whole vector, or more than there are if not all addresses are aligned
  static constexpr int kStateSlots = kNumNamed<Rule> > 0 ? kNumNamed<Rule> : 1;

  // Blocks for each multiprocessor: eight that have 64 bytes in flight for each thread, six that have more, and fewer
  // where many scalars take the registers.
  static constexpr bool kManyScalars = kN == 8 && sizeof(typename Rule::template Scalars<float>) > 36;
  static constexpr bool kManyBytes = sizeof(weight) + sizeof(grad) + sizeof(states) + sizeof(followers) > 76;
  static constexpr int kBlocks = kManyScalars && kFollowed ? 4 : kManyScalars || kManyBytes ? 6 : 8;

  __device__ __forceinline__ void begin(const Record& record, const void* gradient) {
    // Chunks begin at multiples of 16 elements, so that the tensors' own addresses decide.
    uint64_t bits = reinterpret_cast<uint64_t>(gradient) | followers.address_bits(record);
    const auto add = [&](auto&, auto data, bool = true) { bits |= address_bits(data); };
    weight.for_arrays(record, add);
    states.for_each([&](int k, auto& state) { state.for_arrays(record, k, add); });
    // These are numbers' addresses. To look at them has them loaded now, beside the others, not one by one later.
    uint64_t beside = reinterpret_cast<uint64_t>(record.step);
    states.for_each([&](int k, auto& state) { beside |= state.address_of_scales(record, k); });
    bits |= beside % sizeof(float);
    whole_from = (bits & 15) == 0 ? kN : INT_MAX;
  }

  // Asks for everything, before anything is used. n: how many numbers there are from element i on, 0 or less included.
  __device__ __forceinline__ void ask(const Record& record, const void* gradient, int64_t i, int n) {
    if (whole(n)) for_loaded(record, gradient, [&](auto& array, auto data) { array.load(data + i); });
    // A lane behind the last element may still be in the last block. A whole warp behind it takes any.
    const uint32_t block = static_cast<int>(offset_in_block(i)) + n > 0 ? block_of(i) : 0;
    states.for_each([&](int k, auto& state) { state.load_scale(record, k, block); });
  }

  __device__ __forceinline__ void zero_grad(const Record&, void* gradient, int64_t i, int n) {
    grad.clear();
    store_grad(gradient, i, n);
  }

  __device__ __forceinline__ void update(const Record& record, void* const& gradient, const Prepared& prepared,
                                         int64_t i, int n, double average_weight) {
    float param[kN], values[kStateSlots][kN];
    const bool stores_grad = prepared.stores;
    if (!whole(n) || !compute<Quick>(prepared, param, values)) {
      forget_addresses();
      for_loaded(record, gradient, [&](auto& array, auto data) {
        if (whole(n))
          array.load(data + i);
        else
          array.load_some(data + i, n);
      });
      compute<float>(prepared, param, values);
    }
    grad.forget();
    weight.split(param, record, i, prepared.step);
    states.for_each([&](int k, auto& state) { state.split(values[k], record, k, i, n); });
    forget_addresses();
    if (whole(n) && !stores_grad)
      return store(record, param, average_weight, [&](auto& array, auto data, bool = true) { array.store(data + i); });
    if (stores_grad) store_changed(gradient, prepared.change, i, n);
    store(record, param, average_weight, [&](auto& array, auto data, bool = true) {
      if (whole(n))
        array.store(data + i);
      else
        array.store_some(data + i, n);
    });
  }

 private:
  // Those of the loads are read again for the stores, rather than kept in registers meanwhile.
  __device__ __forceinline__ static void forget_addresses() { asm volatile("" ::: "memory"); }
  __device__ __forceinline__ bool whole(int n) const { return n >= whole_from; }
  template <class Visitor>
  __device__ __forceinline__ void for_loaded(const Record& record, const void* gradient, Visitor&& visitor) {
    const auto visit = [&](auto& array, auto data, bool loaded = true) {
      if (loaded) visitor(array, data);
    };
    weight.for_arrays(record, visit);
    visit(grad, static_cast<const GradNumber*>(gradient));
    states.for_each([&](int k, auto& state) { state.for_arrays(record, k, visit); });
    followers.for_arrays(record, visit);
  }
  template <class Store>
  __device__ __forceinline__ void store(const Record& record, const float* param, double average_weight,
                                        Store&& store) {
    weight.for_arrays(record, store);
    states.for_each([&](int k, auto& state) { state.for_arrays(record, k, store); });
    followers.update(record, param, static_cast<float>(average_weight), store);
  }
  __device__ __forceinline__ void store_grad(void* gradient, int64_t i, int n) {
    GradNumber* const data = static_cast<GradNumber*>(gradient) + i;
    if (whole(n))
      grad.store(data);
    else
      grad.store_some(data, n);
  }
  // With numbers T, from what was loaded. False: some are to be computed by plain float.
  template <class T>
  __device__ __forceinline__ bool compute(const Prepared& prepared, float* param, float (*values)[kN]) const {
    const auto s = prepared.scalars;
    float g[kN];
    weight.join(param);
#pragma unroll
    for (int j = 0; j < kN; ++j) g[j] = grad[j];
    states.for_each([&](int k, auto& state) { state.join(values[k]); });
    if (prepared.changes) {
#pragma unroll
      for (int j = 0; j < kN; ++j) g[j] = prepared.change(g[j]);
    }
    Doubts doubts;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      T p = param[j], of_one[kMaxStates] = {};
#pragma unroll
      for (int k = 0; k < kNumNamed<Rule>; ++k) {
        if (has_state<Rule>(k)) of_one[k] = values[k][j];
      }
      update_with<Rule>(p, T(g[j]), of_one, s);
      param[j] = taken(p, &doubts);
#pragma unroll
      for (int k = 0; k < kNumNamed<Rule>; ++k) values[k][j] = taken(of_one[k], &doubts);
    }
    return doubts.none();
  }
  __device__ __forceinline__ static float taken(float x, Doubts*) { return x; }
  __device__ __forceinline__ static float taken(const Quick& x, Doubts* all) {
    *all = all->with(x.doubts);
    return x.value;
  }

  __device__ __forceinline__ void store_changed(void* gradient, const GradChange<float>& change, int64_t i, int n) {
    if (change.zero) {
      grad.clear();
    } else {
      // Asked for again, rather than kept in registers through all that a step computes.
      if (whole(n))
        grad.load(static_cast<const GradNumber*>(gradient) + i);
      else
        grad.load_some(static_cast<const GradNumber*>(gradient) + i, n);
      float written[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j) written[j] = change(grad[j]) * change.sign;
      grad.put(written);
    }
    store_grad(gradient, i, n);
  }
};

}  // namespace fusedstep::cuda
