// The CPU engine's passes over gradients alone: their norm, and scaling them in place. Sums are taken of pieces that
// depend on sizes alone and added up in order: the bits do not depend on the number of threads.
#pragma once

#include <vector>

#include "../norm.h"

namespace fusedstep::cpu {

// Numbers that fill one stretch of memory.
struct Stretch {
  void* data;
  int64_t numel;
  Dtype dtype;
};

struct StretchSums {
  double sum_of_squares, largest;
};

// The first two numbers of a Norm, of all stretches; squares are those of the numbers divided by `grad_scale`.
StretchSums sum_stretches(const std::vector<Stretch>& stretches, double grad_scale, int threads);

// Multiplies every number by `factor`, in the arithmetic of its dtype.
void scale_stretches(const std::vector<Stretch>& stretches, double factor, int threads);

// What each compiled copy of the engine provides: the same for elements [begin, begin + n) of one stretch.
using SumFunction = StretchSums (*)(const Stretch& stretch, int64_t begin, int64_t n, double grad_scale);
using ScaleFunction = void (*)(const Stretch& stretch, int64_t begin, int64_t n, double factor);

}  // namespace fusedstep::cpu
