// The norm of all gradients of a step, and what follows from it: one for the CPU and CUDA engines.
#pragma once

#include "arithmetic.h"

namespace fusedstep {

// What a reduction over gradients leaves behind. The first two add up over several calls; the others follow from them.
struct Norm {
  double sum_of_squares;  // of the gradients divided by their scale
  double max_abs;         // absolute value of a gradient as it is stored: not finite if and only if one of them is not
  double norm;
  double coefficient;  // by which the gradients are to be multiplied
};

// What the norm decides.
struct NormLimits {
  double max_norm;        // coefficient: 1, or what brings the norm down to this
  double epsilon;         // added to the norm before max_norm is divided by it
  bool by_max_abs;        // the norm is the largest absolute value, not the root of the sum of squares
  bool nan_if_nonfinite;  // the coefficient is NaN if the norm is not finite
  bool find_nonfinite;    // a step with a gradient that is not finite is to be skipped
  bool skip_nonfinite;    // so is a step whose norm is not finite
};

inline namespace FUSEDSTEP_ISA {

FUSEDSTEP_FN bool is_finite(double x) {
  return x - x == 0.0;
}

// found_inf is set to 1 if the step is to be skipped, which it is in any case if `skipped`, else to 0.
FUSEDSTEP_FN void finish_norm(Norm& n, float* found_inf, const NormLimits& limits, double grad_scale, bool skipped) {
  n.norm = limits.by_max_abs ? n.max_abs / grad_scale : square_root(n.sum_of_squares);
  n.coefficient = minimum(1.0, limits.max_norm / (n.norm + limits.epsilon));
  if (limits.nan_if_nonfinite) n.coefficient = n.coefficient + (n.norm - n.norm);
  const bool skips =
      skipped || (limits.find_nonfinite && !is_finite(n.max_abs)) || (limits.skip_nonfinite && !is_finite(n.norm));
  *found_inf = skips ? 1.0f : 0.0f;
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep
