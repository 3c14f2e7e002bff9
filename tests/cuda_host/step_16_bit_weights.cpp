#include "steps.h"

namespace fusedstep::cuda {

bool run_16_bit_weights(int rule, const Segment& segment, unsigned threads, const ManyArguments& a) {
  return run_family<k16BitWeights.first, k16BitWeights.end>(rule, segment, threads, a);
}

}  // namespace fusedstep::cuda
