// The step kernels on the host, a family in each translation unit, so that they can be compiled side by side.
#pragma once

// clang-format off
#include "cuda_on_host.h"
#include "../../csrc/cuda/general.cuh"
#include "../../csrc/cuda/tile.cuh"
// clang-format on

namespace fusedstep::cuda {

using ManyArguments = Arguments<kMaxTensorsPerLaunch>;

template <class Way>
void run_way(const Segment& segment, unsigned threads, const ManyArguments& a) {
  launch_on_host(blocks_of(segment, static_cast<int>(threads)), threads,
                 [&] { step_kernel<Way, kMaxTensorsPerLaunch>(a); });
}

template <class Rule, int kFormat>
bool run_format(const Segment& segment, unsigned threads, const ManyArguments& a) {
  if (segment.format != kFormat) return false;
  if constexpr (is_compiled<Rule>(kFormat)) {
    if (!segment.followed) return run_way<Tile<Rule, kFormat, false>>(segment, threads, a), true;
  }
  if constexpr (is_compiled<Rule>(kFormat, true)) {
    if (segment.followed) return run_way<Tile<Rule, kFormat, true>>(segment, threads, a), true;
  }
  return false;
}

// Runs the kernel of a segment whose format is in a family; false: it is not.
template <int kFirst, int... kOffsets>
bool run_one_of(int rule, const Segment& segment, unsigned threads, const ManyArguments& a,
                std::integer_sequence<int, kOffsets...>) {
  return visit_rule(static_cast<RuleId>(rule),
                    [&](auto r) { return (run_format<decltype(r), kFirst + kOffsets>(segment, threads, a) || ...); });
}
template <int kFirst, int kEnd>
bool run_family(int rule, const Segment& segment, unsigned threads, const ManyArguments& a) {
  return run_one_of<kFirst>(rule, segment, threads, a, std::make_integer_sequence<int, kEnd - kFirst>{});
}

bool run_fp32_weights(int rule, const Segment& segment, unsigned threads, const ManyArguments& a);
bool run_16_bit_weights(int rule, const Segment& segment, unsigned threads, const ManyArguments& a);
bool run_full_weights(int rule, const Segment& segment, unsigned threads, const ManyArguments& a);
bool run_rounded_weights(int rule, const Segment& segment, unsigned threads, const ManyArguments& a);
bool run_general(int rule, const Segment& segment, unsigned threads, const ManyArguments& a);

}  // namespace fusedstep::cuda
