// The CUDA engine: what Python's side calls. No CUDA types, so that plain C++ can include it.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../rules.h"
#include "../table.h"
#include "tuning.h"

namespace fusedstep::cuda {

// A slice of one tensor: the work of one block, or of one warp where the whole tensor is small.
struct Chunk {
  int32_t record;  // among those of its launch
  int32_t n;
  int64_t offset;
};

// What one launch covers.
struct Segment {
  int64_t first_record, n_records;
  int64_t first_chunk, n_block_chunks, n_small_chunks;
  int format = 0;         // of a step: the one of all of its records, an index of kFormats or kGeneral
  bool followed = false;  // whether they have averages or copies
};

// The part of a plan that does not change from step to step, to be copied to the device as it is.
struct Table {
  std::vector<Record> records;
  std::vector<Chunk> chunks;
  std::vector<Segment> segments;
  std::vector<int32_t> order;  // of a step: which of the plan's records each one is

  std::vector<char> bytes() const;  // records, chunks, and one zeroed counter for each segment
  size_t size_in_bytes() const {
    return records.size() * sizeof(Record) + chunks.size() * sizeof(Chunk) + segments.size() * sizeof(uint32_t);
  }
};
// Records are sorted by how they are stored; each kind that occurs has segments of its own.
Table build_table(const std::vector<Record>& records, RuleId rule, int multiprocessors);

// A number, or a one-element tensor on the device that the kernel reads when it runs.
struct Scalar {
  double value;
  const void* tensor;  // null: value holds
  Dtype dtype;
};

// What one step does, whatever its rule and besides its tensors: kernels are given it as it is.
struct Step {
  Scalar hyper[kMaxHyper];
  const float* grad_scale;    // on the device; null: gradients are not scaled
  const float* found_inf;     // on the device; null: there is no check
  const double* coefficient;  // on the device, what gradients are multiplied by; null: nothing
  bool maximize;
  bool zero_grads;        // each gradient is set to zero when it was read for the last time, in a skipped step too
  bool write_grads;       // or to what it was changed to, but not negated
  double average_weight;  // of the new parameter in its average
};

struct Call : Step {
  char* device_table;        // a copy of the table's bytes(), 16-byte aligned
  const void* const* grads;  // one for each of the plan's records; null: takes no part
  int device;
  void* stream;
};

// Whether a tensor of the segment has a gradient.
inline bool takes_part(const Call& call, const Segment& segment) {
  const void* const* grads = call.grads + segment.first_record;
  return std::any_of(grads, grads + segment.n_records, [](const void* grad) { return grad != nullptr; });
}
// The same of a step's table.
inline bool takes_part(const Call& call, const Table& table, size_t segment_index) {
  const Segment& segment = table.segments[segment_index];
  const int32_t* const order = table.order.data() + segment.first_record;
  return std::any_of(order, order + segment.n_records, [&](int32_t i) { return call.grads[i] != nullptr; });
}

// Queues the update; returns the number of launches. Throws std::runtime_error with CUDA's own words.
int step(const Call& call, RuleId rule, const Table& table);

// Queues the count of a step of n groups with schedules; the arguments are those of schedule.h's advance_schedule, on
// the device. found_inf: null, or nothing is counted if it is not 0. Throws as step does.
void advance_schedules(double* values, const double* table, int n, const float* found_inf, int device, void* stream);

int device_count(std::string* why_none);  // 0 without a GPU or a driver, with CUDA's words for it
int multiprocessors(int device);
std::string why_not(int device);    // why the kernel cannot run there; empty if it can
std::vector<int> compiled_archs();  // as in {80, 90, 100}

}  // namespace fusedstep::cuda
