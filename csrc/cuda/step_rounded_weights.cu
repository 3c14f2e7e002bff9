// Steps of bf16 weights that are rounded in other ways than to nearest alone.
#include "launch.cuh"

namespace fusedstep::cuda {

void step_rounded_weights(const Call& call, RuleId rule, const Table& table, size_t segment_index) {
  launch_family<kRoundedWeights.first, kRoundedWeights.end>(call, rule, table, segment_index);
}

}  // namespace fusedstep::cuda
