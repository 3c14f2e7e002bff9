// Steps of groups with tensors whose dtypes do not tell all.
#include "launch.cuh"
#include "stored.cuh"

namespace fusedstep::cuda {

void step_stored(const Call& call, RuleId id, const Table& table, size_t segment_index) {
  // One capacity: the arguments of many tensors cost a launch little, a second set of kernels every build much.
  visit_rule(id, [&](auto rule) { launch<decltype(rule), Stored, kMaxTensorsPerLaunch>(call, table, segment_index); });
}

}  // namespace fusedstep::cuda
