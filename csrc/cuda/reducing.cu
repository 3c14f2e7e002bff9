// Launches of the kernels for rules that reduce.
#include "reducing.cuh"
#include "runtime.h"

namespace fusedstep::cuda {
namespace {

template <class Rule>
int launch(const Call& call, const ReducingTable& table, char* work, size_t segment_index) {
  // 32 KB: built in place, once a step.
  static thread_local ReducingArguments a;
  set_arguments(&a, call, table, work, segment_index);
  return for_launches<Rule>(&a, call, table, segment_index, [&](auto kernel, int blocks, const auto& arguments) {
    kernel<<<blocks, kReducingThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(arguments);
    check(cudaGetLastError(), "launching a kernel of a rule that reduces");
  });
}

}  // namespace

int step(const Call& call, ReducingRuleId id, const ReducingTable& table, char* work) {
  const OnDevice on_device(call.device);
  int launches = 0;
  for (size_t i = 0; i < table.segments.size(); ++i) {
    const void* const* const grads = call.grads + table.segments[i].first_record;
    if (std::all_of(grads, grads + table.segments[i].n_records, [](const void* grad) { return grad == nullptr; }))
      continue;
    launches += visit_reducing_rule(id, [&](auto rule) { return launch<decltype(rule)>(call, table, work, i); });
  }
  return launches;
}

}  // namespace fusedstep::cuda
