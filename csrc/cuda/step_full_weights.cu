// Steps of bf16 weights beside the rest of an fp32 number.
#include "launch.cuh"

namespace fusedstep::cuda {

void step_full_weights(const Call& call, RuleId rule, const Table& table, size_t segment_index) {
  launch_family<kFullWeights.first, kFullWeights.end>(call, rule, table, segment_index);
}

}  // namespace fusedstep::cuda
