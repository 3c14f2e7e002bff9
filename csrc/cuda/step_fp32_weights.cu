// Steps of fp32 weights.
#include "launch.cuh"

namespace fusedstep::cuda {

void step_fp32_weights(const Call& call, RuleId rule, const Table& table, size_t segment_index) {
  launch_family<kFP32Weights.first, kFP32Weights.end>(call, rule, table, segment_index);
}

}  // namespace fusedstep::cuda
