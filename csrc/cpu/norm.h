// The CPU engine's passes over gradients alone: their norm, and scaling them in place. Sums are taken of pieces that
// depend on sizes alone and added up in order: the bits do not depend on the number of threads.
#pragma once

#include <vector>

#include "../norm.h"

namespace fusedstep::cpu {

// Contiguous numbers.
struct Buffer {
  void* data;
  int64_t numel;
  Dtype dtype;
};

struct BufferSums {
  double sum_of_squares, max_abs;
};

// The first two numbers of a Norm, of all stretches; squares are those of the numbers divided by `grad_scale`.
BufferSums sum_buffers(const std::vector<Buffer>& buffers, double grad_scale, int threads);

// Multiplies every number by `factor`, in the arithmetic of its dtype.
void scale_buffers(const std::vector<Buffer>& buffers, double factor, int threads);

// What each compiled copy of the engine provides: the same for elements [begin, begin + n) of one buffer.
using SumFunction = BufferSums (*)(const Buffer& buffer, int64_t begin, int64_t n, double grad_scale);
using ScaleFunction = void (*)(const Buffer& buffer, int64_t begin, int64_t n, double factor);

}  // namespace fusedstep::cpu
