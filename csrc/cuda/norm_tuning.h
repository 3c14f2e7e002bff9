// Sizes of the kernel that sums over gradients, for it and for whoever deals out its work.
#pragma once

#include "norm.h"

namespace fusedstep::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int kNormPacks = 8;                                        // 16-byte vectors a thread asks for at once
constexpr int64_t kNormRoundBytes = kNormThreads * kNormPacks * 16;  // that a block asks for at once
constexpr int64_t kNormSmallBytes = 32 * kNormPacks * 16;            // of a warp
// Of a block: more where there is plenty, so that its beginning and its end weigh less.
constexpr int64_t norm_chunk_bytes(int64_t gradient_bytes) {
  return kNormRoundBytes * (gradient_bytes >= (16 << 20) ? 4 : gradient_bytes >= (1 << 20) ? 2 : 1);
}
constexpr int kNormGroup = 256;  // blocks whose sums the last of them adds up

// Of a launch: at least one, for a group of empty tensors.
inline int64_t norm_blocks(const NormSegment& segment) {
  return std::max<int64_t>(segment.n_block_chunks + (segment.n_small_chunks + kNormWarps - 1) / kNormWarps, 1);
}

}  // namespace fusedstep::cuda
