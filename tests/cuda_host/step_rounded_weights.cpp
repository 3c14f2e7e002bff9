#include "steps.h"

namespace fusedstep::cuda {

bool run_rounded_weights(int rule, const Segment& segment, unsigned threads, const ManyArguments& a) {
  return run_family<kRoundedWeights.first, kRoundedWeights.end>(rule, segment, threads, a);
}

}  // namespace fusedstep::cuda
