// The CPU engine: what Python's side calls, and what each compiled copy of the engine provides.
#pragma once

#include <string>
#include <vector>

#include "../rules.h"
#include "step.h"

namespace fusedstep::cpu {

// A tensor that takes part in this step. Elements of all tensors are numbered through: this one starts at `begin`.
struct Work {
  const Record* record;
  const void* grad;
  int64_t begin;
};

struct Call : Step {
  RuleId rule;
  const Work* work;
  int64_t work_size;
  int64_t numel;  // of all tensors together
};

// Updates elements [first, last) of the call.
using RunFunction = void (*)(const Call& call, int64_t first, int64_t last);

// Updates everything on up to `threads` threads and then advances the step counters.
void step(const Call& call, int threads);

// Whether ranges may meet before element i: blocks that share a scale are not divided.
bool can_split_at(const Call& call, int64_t i);

// Updates elements [first, last) on this thread and leaves the step counters alone.
void run_range(const Call& call, int64_t first, int64_t last);

std::vector<std::string> available_isas();  // that this processor can run, best last
std::string isa();                          // the one in use
void set_isa(const std::string& name);      // throws std::invalid_argument for one that is not available

}  // namespace fusedstep::cpu
