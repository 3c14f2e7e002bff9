// The CUDA kernels' own source on the host, compiled for the rules of rules.h.
// clang-format off
#include "../cuda_host/cuda_on_host.h"
#include "rules.h"
#define visit_rule visit_own
#include "../cuda_host/library.cpp"
#include "../cuda_host/step_16_bit_weights.cpp"
#include "../cuda_host/step_fp32_weights.cpp"
#include "../cuda_host/step_full_weights.cpp"
#include "../cuda_host/step_general.cpp"
#include "../cuda_host/step_rounded_weights.cpp"
#include "../../csrc/cuda_table.cpp"
// clang-format on

void fusedstep::take_step(int rule, Record& record, void* grad, const double* hyper, int n_hyper) {
  Scalar scalars[kMaxHyper] = {};
  for (int h = 0; h < n_hyper; ++h) scalars[h].value = hyper[h];
  const void* const grads[] = {grad};
  const int launches =
      host_step(rule, scalars, false, false, false, nullptr, nullptr, nullptr, 0.0, &record, 1, grads, 2, false, 64);
  if (launches != 1) std::printf("%d launches\n", launches), ++different;
}

int main() {
  return fusedstep::check_all();
}
