// Launches of the stages of a step on parts of tensors.
#include "reducing_stages.cuh"
#include "runtime.h"

namespace fusedstep::cuda {
namespace {

template <class Rule>
int launch(const Call& call, const ReducingTable& table, char* work, const std::array<double*, kSumStages>& numbers,
           size_t segment_index, StageKernel which) {
  // 32 KB: built in place, a few times a step.
  static thread_local StageArguments a;
  set_arguments(&a, call, table, work, numbers, segment_index);
  return for_launches<Rule>(
      &a, call, table, segment_index, which, [&](auto kernel, int blocks, const StageArguments& arguments) {
        kernel<<<blocks, kReducingThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(arguments);
        check(cudaGetLastError(), "launching a kernel for the parts of a rule that reduces");
      });
}

}  // namespace

int step_stage(const Call& call, ReducingRuleId id, const ReducingTable& table, char* work,
               const std::array<double*, kSumStages>& numbers, int stage) {
  const OnDevice on_device(call.device);
  const auto own = [&](StageKernel which) {
    int launches = 0;
    for (size_t i = 0; i < table.segments.size(); ++i) {
      if (!takes_part(call, table, i)) continue;
      launches += visit_reducing_rule(
          id, [&](auto rule) { return launch<decltype(rule)>(call, table, work, numbers, i, which); });
    }
    return launches;
  };
  return for_stage(stage, own, [&](Pass pass) { return step_pass(call, id, table, work, pass); });
}

}  // namespace fusedstep::cuda
