// Sizes of the kernel that sums over gradients, for it and for whoever deals out its work.
#pragma once

#include "norm.h"

namespace fusedstep::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int kNormPacks = 8;                                        // 16-byte vectors a thread asks for at once
constexpr int64_t kNormChunkBytes = kNormThreads * kNormPacks * 16;  // of a block
constexpr int64_t kNormSmallBytes = 32 * kNormPacks * 16;            // of a warp
constexpr int kNormGroup = 256;                                      // blocks whose sums the last of them adds up

// Of a launch: at least one, for a group of empty tensors.
inline int64_t norm_blocks(const NormSegment& segment) {
  return std::max<int64_t>(segment.n_block_chunks + (segment.n_small_chunks + kNormWarps - 1) / kNormWarps, 1);
}

}  // namespace fusedstep::cuda
