#include "steps.h"

namespace fusedstep::cuda {

bool run_full_weights(int rule, const Segment& segment, unsigned threads, const ManyArguments& a) {
  return run_family<kFullWeights.first, kFullWeights.end>(rule, segment, threads, a);
}

}  // namespace fusedstep::cuda
