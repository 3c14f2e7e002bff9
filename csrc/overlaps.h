// Finds gradients that share memory, which a step that writes into gradients must not write before all are read.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "plan.h"

namespace fusedstep {

// From address to address.
using Extent = std::pair<uintptr_t, uintptr_t>;

class Overlaps {
 public:
  // (plan, tensor) of each gathered gradient whose memory another one has a part of, or one of `others`, which are
  // written too.
  std::vector<std::pair<size_t, size_t>> find(const std::vector<const Plan*>& plans, const std::vector<Extent>& others);

 private:
  std::vector<Extent> extents_;  // of all tensors of all plans and of the others; empty: takes no part
  std::vector<size_t> order_;    // by their beginnings; kept, since gradients that move mostly do so in the same order
};

}  // namespace fusedstep
