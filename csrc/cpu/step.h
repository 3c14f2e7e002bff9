// What one step of the CPU engine does, whatever its rule and besides its tensors.
#pragma once

#include "../table.h"

namespace fusedstep::cpu {

struct Step {
  double hyper[kMaxHyper];
  bool maximize;
  double grad_scale;      // gradients are divided by it; 1 leaves them alone
  double coefficient;     // and then multiplied by it
  bool zero_grads;        // each gradient is set to zero when it was read for the last time
  bool write_grads;       // or to what it was changed to, but not negated
  double average_weight;  // of the new parameter in its average
};

}  // namespace fusedstep::cpu
