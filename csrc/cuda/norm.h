// The reduction over gradients on CUDA: what Python's side calls. No CUDA types, so that plain C++ can include it.
//
// One launch for each plan (and 4,000 tensors). A launch adds to what those before it on the device have left; the last
// one fills in what follows from the sums. The order of every sum is that of the chunks, which sizes alone decide.
#pragma once

#include "../norm.h"
#include "engine.h"

namespace fusedstep::cuda {

struct ChunkSums {
  double sum_of_squares, largest;
};

struct NormCall {
  char* device_table;             // a copy of the table's bytes(), 16-byte aligned
  ChunkSums* sums;                // on the device, one for each chunk; they need no values
  const void* const* grads;       // one for each record; null: takes no part
  const float* grad_scale;        // on the device; null: gradients are not scaled
  const float* found_inf_before;  // on the device; the step is skipped if it is not 0; null: there was no check
  float* found_inf;               // on the device: whether the step is skipped
  Norm* norm;                     // on the device
  bool first, last;               // of the plans whose gradients have one norm
  NormLimits limits;              // for the last one
  int device;
  void* stream;
};

// Queues the launches for a plan that has a gradient; returns their number. Throws as step() does.
int add_to_norm(const NormCall& call, const Table& table);

}  // namespace fusedstep::cuda
