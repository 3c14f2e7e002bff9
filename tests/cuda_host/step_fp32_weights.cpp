#include "steps.h"

namespace fusedstep::cuda {

bool run_fp32_weights(int rule, const Segment& segment, unsigned threads, const ManyArguments& a) {
  return run_family<kFP32Weights.first, kFP32Weights.end>(rule, segment, threads, a);
}

}  // namespace fusedstep::cuda
