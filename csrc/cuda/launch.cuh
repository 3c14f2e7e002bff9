// Launches of the step kernel.
#pragma once

#include <algorithm>

#include "general.cuh"
#include "runtime.h"
#include "tile.cuh"

namespace fusedstep::cuda {

template <class Way, int kCapacity>
void launch(const Call& call, const Table& table, size_t segment_index) {
  // Up to 32 KB: built in place, once a step.
  static thread_local Arguments<kCapacity> a;
  set_arguments(&a, call, table, segment_index);
  const unsigned blocks = blocks_of(table.segments[segment_index], kStepThreads);
  step_kernel<Way, kCapacity><<<blocks, kStepThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(a);
  check(cudaGetLastError(), "launching the step kernel");
}

template <class Rule, int kFormat>
void launch_format(const Call& call, const Table& table, size_t segment_index) {
  const Segment& segment = table.segments[segment_index];
  if (segment.format != kFormat) return;
  if constexpr (is_compiled<Rule>(kFormat)) {
    using Way = Tile<Rule, kFormat, false>;
    if constexpr (kFormats[kFormat].few) {
      if (!segment.followed && segment.n_records <= kFewTensors)
        return launch<Way, kFewTensors>(call, table, segment_index);
    }
    if (!segment.followed) return launch<Way, kMaxTensorsPerLaunch>(call, table, segment_index);
  }
  if constexpr (is_compiled<Rule>(kFormat, true)) {
    if (segment.followed) launch<Tile<Rule, kFormat, true>, kMaxTensorsPerLaunch>(call, table, segment_index);
  }
}

// For a segment whose format is one of a family's. Each family is compiled in a file of its own, by another process.
template <int kFirst, int... kOffsets>
void launch_one_of(const Call& call, RuleId id, const Table& table, size_t segment_index,
                   std::integer_sequence<int, kOffsets...>) {
  visit_rule(id,
             [&](auto rule) { (launch_format<decltype(rule), kFirst + kOffsets>(call, table, segment_index), ...); });
}
template <int kFirst, int kEnd>
void launch_family(const Call& call, RuleId id, const Table& table, size_t segment_index) {
  launch_one_of<kFirst>(call, id, table, segment_index, std::make_integer_sequence<int, kEnd - kFirst>{});
}

void step_fp32_weights(const Call& call, RuleId rule, const Table& table, size_t segment_index);
void step_16_bit_weights(const Call& call, RuleId rule, const Table& table, size_t segment_index);
void step_full_weights(const Call& call, RuleId rule, const Table& table, size_t segment_index);
void step_rounded_weights(const Call& call, RuleId rule, const Table& table, size_t segment_index);
void step_general(const Call& call, RuleId rule, const Table& table, size_t segment_index);

}  // namespace fusedstep::cuda
