// Launches of the kernels for rules that reduce.
#include <algorithm>

#include "reducing.cuh"
#include "runtime.h"

namespace fusedstep::cuda {
namespace {

template <class Rule>
int launch(const Call& call, const ReducingTable& table, char* work, size_t segment_index) {
  // 32 KB: built in place, once a step.
  static thread_local ReducingArguments a;
  set_arguments(&a, call, table, work, segment_index);
  const int64_t resident = int64_t{kReducingBlocks} * multiprocessors(call.device);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(a.n_items, resident));
  return for_launches<Rule>([&](auto kernel) {
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(a);
    check(cudaGetLastError(), "launching a kernel of a rule that reduces");
  });
}

}  // namespace

int step(const Call& call, ReducingRuleId id, const ReducingTable& table, char* work) {
  const OnDevice on_device(call.device);
  int launches = 0;
  for (size_t i = 0; i < table.segments.size(); ++i) {
    const Segment& segment = table.segments[i];
    if (!takes_part(call, segment)) continue;
    launches += visit_reducing_rule(id, [&](auto rule) { return launch<decltype(rule)>(call, table, work, i); });
  }
  return launches;
}

}  // namespace fusedstep::cuda
