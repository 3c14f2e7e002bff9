// Steps of 16-bit weights that are stored alone.
#include "launch.cuh"

namespace fusedstep::cuda {

void step_16_bit_weights(const Call& call, RuleId rule, const Table& table, size_t segment_index) {
  launch_family<k16BitWeights.first, k16BitWeights.end>(call, rule, table, segment_index);
}

}  // namespace fusedstep::cuda
