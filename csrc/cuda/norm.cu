// Launches of the kernel that sums over gradients.
#include <algorithm>

#include "norm.cuh"
#include "runtime.h"

namespace fusedstep::cuda {
namespace {

template <int kCapacity>
void launch(const NormCall& call, const Table& table, size_t segment_index, bool first, bool last) {
  // 32 KB: built in place, once a step.
  static thread_local NormArguments<kCapacity> a;
  set_arguments(&a, call, table, segment_index, first, last);
  const int64_t items = a.n_block_chunks + (a.n_small_chunks + kWarps - 1) / kWarps;
  const int64_t resident = int64_t{kMinBlocks} * multiprocessors(call.device);
  // At least one block, for a group of empty tensors.
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(items, 1, resident));
  norm_kernel<kCapacity><<<blocks, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(a);
  check(cudaGetLastError(), "launching the kernel that sums over gradients");
}

}  // namespace

int add_to_norm(const NormCall& call, const Table& table) {
  const OnDevice on_device(call.device);
  return for_segments(call, table, [&](size_t i, bool first, bool last) {
    if (table.segments[i].n_records <= kFewTensors)
      launch<kFewTensors>(call, table, i, first, last);
    else
      launch<kMaxTensorsPerLaunch>(call, table, i, first, last);
  });
}

}  // namespace fusedstep::cuda
