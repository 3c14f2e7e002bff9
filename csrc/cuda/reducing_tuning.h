// Sizes of the kernels for rules that reduce, for them and for whoever cuts tensors into items.
#pragma once

#include <cstdint>

namespace fusedstep::cuda {

constexpr int kReducingThreads = 256;
constexpr int kAhead = 8;  // rows that a thread asks for at once in pass 1, and has in an item of passes 2 and 3
constexpr int kBand = 32;  // blocks of rows whose column sums one block adds up
constexpr int kPreparedBytes = 128, kFinishedBytes = 16;
constexpr int kMostPack = 8;

}  // namespace fusedstep::cuda
