// Tensors that are not stored as the rule computes: a tile of their elements at a time is widened to fp32, updated by
// the engine's fp32 loop, and narrowed again.
#pragma once

#include "../table.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

// The loop on n elements of a tile, whose param and grad are fp32.
using UpdateTile = void (*)(const Record& tile, float* grad, int64_t n, const void* context);

// Updates elements [begin, end) of a tensor whose arithmetic is in fp32. Quantized states: `begin` and `end` must lie
// at the boundaries of their blocks.
//
// states: bit k says whether the rule has state k. step: the number of this step, from 1. writes_grad: whether
// `update` changes the gradient. widens_states: it takes them in fp32 as well; otherwise as they are.
void update_tiles(const Record& record, const void* grad, int64_t begin, int64_t end, uint32_t states, int64_t step,
                  bool writes_grad, bool widens_states, UpdateTile update, const void* context);

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
