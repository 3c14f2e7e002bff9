// The Call that the engines take, from the plain arguments that a test's library is given. Nothing is run here.
#pragma once

#include "../../csrc/cuda/engine.h"

namespace fusedstep::cuda {

inline Call call_of(const Scalar* hyper, bool maximize, bool zero_grads, bool write_grads, const float* grad_scale,
                    const float* found_inf, const double* coefficient, double average_weight, const void* const* grads,
                    char* table) {
  Call call{};
  for (int k = 0; k < kMaxHyper; ++k) call.hyper[k] = hyper[k];
  call.maximize = maximize;
  call.grad_scale = grad_scale;
  call.found_inf = found_inf;
  call.coefficient = coefficient;
  call.zero_grads = zero_grads;
  call.write_grads = write_grads;
  call.average_weight = average_weight;
  call.device_table = table;
  call.grads = grads;
  return call;
}

}  // namespace fusedstep::cuda
