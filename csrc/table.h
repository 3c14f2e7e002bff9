// The seam between Python and the engines: tensors as raw pointers, and what one call does with them.
// Plain data only: no torch, no Python, no CUDA types.
#pragma once

#include "codecs.h"
#include "rule.h"

namespace fusedstep {

// Which element of the whole tensor, in the order of its memory, element i of a part of it is: the elements lie in runs
// of `run`, of which `runs` begin `stride` apart from each other, and groups of these `outer` apart. A run of 0 never
// ends. python/fusedstep/shards.py is the same.
struct ElementMap {
  int64_t first, run, runs, stride, outer;

  FUSEDSTEP_FN int64_t element(int64_t i) const {
    if (run == 0) return first + i;
    const int64_t begun = i / run;
    return first + i % run + begun % runs * stride + begun / runs * outer;
  }
  // How many elements from i on lie one after the other, at least.
  FUSEDSTEP_FN int64_t together(int64_t i) const { return run == 0 ? INT64_MAX : run - i % run; }
  // Whether those that share a random counter here do so in the whole tensor.
  constexpr bool keeps_groups() const { return ((first | run | stride | outer) & (kPhiloxElements - 1)) == 0; }
};

// How a record's weight and states are stored where dtypes alone do not tell; all zero: they do. What every step reads
// comes first.
struct Precision {
  void* aux;       // what the weight's format keeps beside it: an fp32 master, lower halves, compensation
  uint32_t index;  // of the parameter among its optimizer's
  WeightFormat weight_format;
  uint8_t state_bits;         // of the codes of quantized states; 0: no state is quantized
  uint64_t seed;              // of stochastic rounding
  ElementMap element_map;     // of the memory in the whole parameter, by whose elements it is random
  float* scales[kMaxStates];  // of quantized states, one for each block
};

// Updates are counted in one fp32 number, as torch has it. Above 2^24, where adding 1 would change it no more, it moves
// to the next number: the count is then that of the numbers passed. python/fusedstep/counts.py is the same.
constexpr uint32_t kExactCounter = 0x4b800000u, kLastCounter = 0x7f7fffffu;  // the bits of 2^24, and of the largest

FUSEDSTEP_FN int64_t count_of(float counter) {
  const uint32_t bits = bit_cast<uint32_t>(counter);
  return bits > kExactCounter && bits <= kLastCounter ? (int64_t{1} << 24) + (bits - kExactCounter)
                                                      : static_cast<int64_t>(counter);
}

FUSEDSTEP_FN float next_counter(float counter) {
  const uint32_t bits = bit_cast<uint32_t>(counter);
  return bits >= kExactCounter && bits < kLastCounter ? bit_cast<float>(bits + 1) : counter + 1.0f;
}

// How a reducing rule sees a record: contiguous matrices [batch, rows, columns]; or, if it is not factored, one number
// after the other.
struct Matrices {
  int64_t batch, rows, columns;
  bool factored;
};

// One parameter and what belongs to it; python/fusedstep/record.py has the same names, for tensors. Its memory is flat:
// param, grad and states share one dense layout.
struct Record {
  void* param;
  void* states[kMaxStates];
  float* step;  // updates done so far, as count_of reads them; in the engine's own memory (host or device)
  int64_t numel;
  void* average;  // of the parameter over the steps, in fp32 (fp64 for a fp64 parameter); null: none
  void* copy;     // the parameter in copy_dtype, after each step; null: none
  Dtype param_dtype, grad_dtype, state_dtypes[kMaxStates], copy_dtype;
  Precision precision;
  Matrices matrices;  // for a reducing rule; all zero for an elementwise one

  constexpr bool has_followers() const { return average != nullptr || copy != nullptr; }
};

// Whether every number of a record is stored in its dtype, one after the other.
FUSEDSTEP_FN bool is_plain(const Record& record) {
  return record.precision.weight_format == WeightFormat::kPlain && record.precision.state_bits == 0;
}

}  // namespace fusedstep
