// Launches of the kernel that sums over gradients.
#include "norm.cuh"
#include "runtime.h"

namespace fusedstep::cuda {
namespace {

template <int kCapacity>
void launch(const NormCall& call, const NormTable& table, size_t segment_index, bool first, bool last) {
  // Up to 32 KB: built in place, once a step.
  static thread_local NormArguments<kCapacity> a;
  set_arguments(&a, call, table, segment_index, first, last);
  const auto kernel = call.grad_scale != nullptr ? norm_kernel<kCapacity, true> : norm_kernel<kCapacity, false>;
  kernel<<<a.n_blocks, kNormThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(a);
  check(cudaGetLastError(), "launching the kernel that sums over gradients");
}

}  // namespace

int add_to_norm(const NormCall& call, const NormTable& table) {
  const OnDevice on_device(call.device);
  return for_segments(call, table, [&](size_t i, bool first, bool last) {
    if (table.segments[i].n_records <= kFewTensors)
      launch<kFewTensors>(call, table, i, first, last);
    else
      launch<kMaxTensorsPerLaunch>(call, table, i, first, last);
  });
}

}  // namespace fusedstep::cuda
