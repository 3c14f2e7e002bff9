// The reduction over gradients on CUDA: what Python's side calls. No CUDA types, so that plain C++ can include it.
//
// One launch for each plan (and 4,000 tensors). A launch adds to what those before it on the device have left; the last
// one fills in what follows from the sums. The order of every sum is that of the chunks, which sizes and dtypes alone
// decide.
#pragma once

#include "../norm.h"
#include "engine.h"

namespace fusedstep::cuda {

// A slice of one gradient: the work of a block, or of a warp.
struct NormChunk {
  int64_t offset;
  int32_t n;
  uint16_t record;  // among those of its launch
  Dtype dtype;
};

// What one launch covers: a block for each block chunk, then one for every few small chunks.
struct NormSegment {
  int64_t first_record, n_records;
  int64_t first_chunk, n_block_chunks, n_small_chunks;
  int64_t first_sum,
      first_counter;  // a sum for each block and for each group of blocks; a counter for each group and 1
};

struct ChunkSums {
  double sum_of_squares, max_abs;
};

// The part of a plan that does not change from step to step.
struct NormTable {
  std::vector<Dtype> dtypes;  // of the gradients
  std::vector<NormChunk> chunks;
  std::vector<NormSegment> segments;
  int64_t n_sums = 0, n_counters = 0;

  // What the device memory starts as: chunks, sums, counters.
  std::vector<char> bytes() const;
};
NormTable build_norm_table(const std::vector<Record>& records);

struct NormCall {
  char* memory;                   // on the device, 16-byte aligned: what began as the table's bytes()
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

// Blocks of a launch: at least one, for a group of empty tensors.
inline int64_t norm_blocks(const NormSegment& segment) {
  return std::max<int64_t>(segment.n_block_chunks + (segment.n_small_chunks + kNormWarps - 1) / kNormWarps, 1);
}

// Queues the launches for a plan that has a gradient; returns their number. Throws as step() does.
int add_to_norm(const NormCall& call, const NormTable& table);

}  // namespace fusedstep::cuda
