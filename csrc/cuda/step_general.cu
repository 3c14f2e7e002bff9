// Steps of everything that no other kernel was compiled for.
#include "launch.cuh"

namespace fusedstep::cuda {

void step_general(const Call& call, RuleId rule, const Table& table, size_t segment_index) {
  visit_rule(rule, [&](auto r) { launch<General<decltype(r)>, kMaxTensorsPerLaunch>(call, table, segment_index); });
}

}  // namespace fusedstep::cuda
