// Launches of the kernels for rules that reduce.
#include "reducing.cuh"
#include "runtime.h"

namespace fusedstep::cuda {
namespace {

// The passes from one to another of a segment.
template <class Rule>
int launch(const Call& call, const ReducingTable& table, char* work, size_t segment_index, Pass first, Pass last) {
  // 32 KB: built in place, once a step.
  static thread_local ReducingArguments a;
  set_arguments(&a, call, table, work, segment_index);
  int launches = 0;
  for (const Pass pass : {Pass::kSums, Pass::kUpdate, Pass::kApply}) {
    if (pass < first || pass > last) continue;
    launches += for_launches<Rule>(
        &a, call, table, segment_index, pass, [&](auto kernel, int blocks, const ReducingArguments& arguments) {
          kernel<<<blocks, kReducingThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(arguments);
          check(cudaGetLastError(), "launching a kernel of a rule that reduces");
        });
  }
  return launches;
}

int launch_all(const Call& call, ReducingRuleId id, const ReducingTable& table, char* work, Pass first, Pass last) {
  const OnDevice on_device(call.device);
  int launches = 0;
  for (size_t i = 0; i < table.segments.size(); ++i) {
    if (!takes_part(call, table, i)) continue;
    launches +=
        visit_reducing_rule(id, [&](auto rule) { return launch<decltype(rule)>(call, table, work, i, first, last); });
  }
  return launches;
}

}  // namespace

int step(const Call& call, ReducingRuleId id, const ReducingTable& table, char* work) {
  return launch_all(call, id, table, work, Pass::kSums, Pass::kApply);
}

int step_pass(const Call& call, ReducingRuleId id, const ReducingTable& table, char* work, Pass pass) {
  return launch_all(call, id, table, work, pass, pass);
}

}  // namespace fusedstep::cuda
