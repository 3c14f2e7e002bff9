// The skeleton of a step: one launch for tensors of a group that are stored alike, a block for a few tiles of one of them
// or a warp for a small one. A Way says what is done with a tile: Tile (tile.cuh) or General (general.cuh).
//
// Blocks are small and end soon, so that the loads of new ones overlap with the stores of old ones. A block asks for its
// first tile's numbers, and while they are under way one thread computes the step's scalars in fp64.
//
// It uses little of CUDA, so that the host can stand in for it in the tests: thread and block indices, shared memory,
// barriers, one atomic counter, bytes permuted.
#pragma once

#include "parts.cuh"

namespace fusedstep::cuda {

template <int kCapacity>
struct Arguments {
  const Record* records;
  const Chunk* chunks;
  uint32_t* done;  // blocks that have read the step; the last one sets it back to zero
  int32_t n_records, n_block_chunks, n_small_chunks;
  const float* found_inf;
  GradsBecome grads_become;
  double average_weight;
  Scalar hyper[kMaxHyper];
  const void* grads[kCapacity];
};

template <class Way, int kCapacity>
__global__ void __launch_bounds__(kThreads, Way::kBlocks)
    step_kernel(const __grid_constant__ Arguments<kCapacity> arguments) {
  constexpr int kHyper = sizeof(Way::Rule::kHyper) / sizeof(Way::Rule::kHyper[0]);
  __shared__ double hyper[kThreads / kWarp][kHyper];
  __shared__ typename Way::Prepared prepared[kThreads / kWarp];
  __shared__ bool is_last;
  const auto& a = arguments;
  const int thread = threadIdx.x, warp = thread / kWarp, warps = blockDim.x / kWarp, block = blockIdx.x;
  // The block takes one chunk, or each of its warps takes one.
  const bool together = block < a.n_block_chunks;
  const int index = together ? block : a.n_block_chunks + (block - a.n_block_chunks) * warps + warp;
  const Team team = together ? Team{thread, static_cast<int>(blockDim.x)} : Team{thread % kWarp, kWarp};
  const int owner = together ? 0 : warp;  // of what the team shares
  // The same for all blocks: none counts itself as done, and no step counter moves.
  const bool skipped = a.found_inf != nullptr && *global(a.found_inf) != 0.0f;

  Way tile;
  const float* step = nullptr;
  int left = 0;  // of the chunk, from the tile on; 0: nothing to do
  if (index < a.n_block_chunks + a.n_small_chunks) {
    const Chunk chunk = a.chunks[index];
    const void* const grad = a.grads[chunk.record];
    if (grad != nullptr) {
      const Record& record = a.records[chunk.record];
      step = record.step;
      left = chunk.n;
      tile.begin(record, grad, chunk.offset);
    }
  }
  int at = team.index * Way::kN;
  const int before = at, stride = team.size * Way::kN;
  if (skipped) {
    if (!a.grads_become.zero) return;
    for (; at < left; at += stride) tile.zero_grad(at, left - at);
    return;
  }

  if (left > 0) {
    tile.ask(at, left - before);
    if (team.index < kWarp) {
      if (team.index < kHyper) {
        const Scalar& scalar = a.hyper[team.index];
        hyper[owner][team.index] =
            scalar.tensor == nullptr ? scalar.value : load_any<double>(scalar.tensor, scalar.dtype, 0);
      }
      __syncwarp();
      if (team.index == 0)
        prepared[owner].fill(hyper[owner], static_cast<int64_t>(*global(step)) + 1, tile.is_fp64(), a.grads_become);
    }
  }
  __syncthreads();
  // Here all of the block's threads that read a step have used it. The last block to come here advances the counters, at
  // its end.
  bool last = false;
  if (thread == 0) last = atomicInc(a.done, gridDim.x - 1) == gridDim.x - 1;

  while (left > 0) {
    tile.update(prepared[owner], at, left - before, a.average_weight);
    at += stride;
    left -= stride;
    if (left > 0) tile.ask(at, left - before);
  }

  if (thread == 0) is_last = last;
  __syncthreads();
  if (!is_last) return;
  for (int i = thread; i < a.n_records; i += blockDim.x) {
    if (a.grads[i] != nullptr) *global(a.records[i].step) += 1.0f;
  }
}

// The arguments of the launch for a segment.
template <int kCapacity>
void set_arguments(Arguments<kCapacity>* a, const Call& call, const Table& table, size_t segment_index) {
  const Segment& segment = table.segments[segment_index];
  char* const chunks = call.device_table + table.records.size() * sizeof(Record);
  char* const counters = chunks + table.chunks.size() * sizeof(Chunk);
  a->records = reinterpret_cast<const Record*>(call.device_table) + segment.first_record;
  a->chunks = reinterpret_cast<const Chunk*>(chunks) + segment.first_chunk;
  a->done = reinterpret_cast<uint32_t*>(counters) + segment_index;
  a->n_records = static_cast<int32_t>(segment.n_records);
  a->n_block_chunks = static_cast<int32_t>(segment.n_block_chunks);
  a->n_small_chunks = static_cast<int32_t>(segment.n_small_chunks);
  a->found_inf = call.found_inf;
  a->grads_become = grads_become(call);
  a->average_weight = call.average_weight;
  for (int k = 0; k < kMaxHyper; ++k) a->hyper[k] = call.hyper[k];
  const int32_t* const order = table.order.data() + segment.first_record;
  for (int64_t i = 0; i < segment.n_records; ++i) a->grads[i] = call.grads[order[i]];
}

// How many blocks of so many threads a segment takes: at least one, for the step counters of empty tensors.
inline unsigned blocks_of(const Segment& segment, int threads) {
  const int64_t warps = threads / kWarp;
  const int64_t blocks = segment.n_block_chunks + (segment.n_small_chunks + warps - 1) / warps;
  return static_cast<unsigned>(std::max<int64_t>(blocks, 1));
}

}  // namespace fusedstep::cuda
