// The kernel that moves learning rates on after a step: one thread for each parameter group with a schedule.
#pragma once

#include "../schedule.h"

namespace fusedstep::cuda {

__global__ void schedule_kernel(double* values, const double* table, int n, const float* found_inf) {
  if (found_inf != nullptr && *found_inf != 0.0f) return;  // the step was skipped: it does not count
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    advance_schedule(values, table, n, i);
}

}  // namespace fusedstep::cuda
