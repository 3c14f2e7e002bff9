// The sizes of all kernels' blocks and pieces, for the kernels and for whoever deals out their work. Measured on an
// H200 where docs/gpu.md says so.
#pragma once

#include <cstdint>

namespace fusedstep::cuda {

constexpr int kWarp = 32;
// Gradient addresses travel as a kernel argument, so their number is limited.
constexpr int64_t kMaxTensorsPerLaunch = 4000;
// For few tensors there are kernels of their own, whose arguments fit into the 4 KB of ordinary launches.
constexpr int64_t kFewTensors = 448;

// A step. Small blocks wait less for their slowest warp, and for the scalars.
constexpr int kStepThreads = 128;
constexpr int64_t kSmallTensor = 1024;  // elements; below it a warp takes the whole tensor
constexpr int64_t kBlocksToFill = 16;   // for each multiprocessor, before a block takes more than one tile
constexpr int kGeneralBlocks = 6;       // for each multiprocessor, of the general kernel

// The sums of a norm.
constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / kWarp;
constexpr int kNormMinBlocks = 5;                                    // for each multiprocessor: at most 48 registers
constexpr int kNormPacks = 8;                                        // 16-byte vectors a thread asks for at once
constexpr int64_t kNormRoundBytes = kNormThreads * kNormPacks * 16;  // that a block asks for at once
constexpr int64_t kNormSmallBytes = kWarp * kNormPacks * 16;         // of a warp
// A block's bytes: more where there is plenty, so that its beginning and its end weigh less.
constexpr int64_t norm_chunk_bytes(int64_t gradient_bytes) {
  return kNormRoundBytes * (gradient_bytes >= (16 << 20) ? 4 : gradient_bytes >= (1 << 20) ? 2 : 1);
}
constexpr int kNormGroup = 256;  // blocks whose sums the last of them adds up

// Rules that reduce. For each multiprocessor in pass 1 at most 128 registers a thread, which hold enough loads in
// flight.
constexpr int kTallBlocks = 2, kLowBlocks = 4, kStateBlocks = 3, kBesideBlocks = 2;
constexpr int64_t kSmallMatrix = 1024;  // elements; up to here a warp takes a whole matrix
constexpr int64_t kTinyMatrix = 32;     // elements; up to here a thread does
constexpr int64_t kItemElements = 8192;
constexpr int kReducingThreads = 256;
constexpr int kAhead = 8;  // rows that a thread asks for at once in pass 1, and has in an item of passes 2 and 3
constexpr int kBand = 32;  // blocks of rows whose column sums one block adds up
constexpr int kPreparedBytes = 128, kFinishedBytes = 16;
constexpr int kMostPack = 8;

}  // namespace fusedstep::cuda
