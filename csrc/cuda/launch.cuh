// The launch of the step kernel.
#pragma once

#include <algorithm>

#include "kernel.cuh"
#include "runtime.h"

namespace fusedstep::cuda {

template <class Rule, template <class> class Storage, int kCapacity>
void launch(const Call& call, const Table& table, size_t segment_index) {
  // Up to 32 KB: built in place, once a step.
  static thread_local Arguments<kCapacity> a;
  set_arguments(&a, call, table, segment_index);
  constexpr int kWarps = kThreads / kWarp;
  const int64_t items = a.n_block_chunks + (a.n_small_chunks + kWarps - 1) / kWarps;
  const int64_t resident = int64_t{kMinBlocks} * multiprocessors(call.device);
  // At least one block, for the step counters of a group of empty tensors.
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(items, 1, resident));
  step_kernel<Rule, Storage, kCapacity><<<blocks, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(a);
  check(cudaGetLastError(), "launching the step kernel");
}

// For a segment that is not plain; in a file of its own, whose kernels another compiler process builds.
void step_stored(const Call& call, RuleId rule, const Table& table, size_t segment_index);

}  // namespace fusedstep::cuda
