// The skeleton of a step: one launch for tensors of a group that are stored alike, a block for a few tiles of one of
// them or a warp for a small one. A Way says what is done with a tile: Tile (tile.cuh) or General (general.cuh).
//
// Blocks are small and end soon, so that the loads of new ones overlap with the stores of old ones. A block asks for
// its first tile's numbers, and while they are under way one thread computes the step's scalars in fp64.
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
  Step step;
  const void* grads[kCapacity];
};

// What a team shares: addresses too, which would take too many registers from each thread.
template <class Way>
struct TeamShared {
  static constexpr int kHyper = sizeof(Way::Rule::kHyper) / sizeof(Way::Rule::kHyper[0]);
  Record record;
  void* grad;
  double hyper[kHyper];
  typename Way::Prepared prepared;

  // By a warp, of which `lane` is this thread's. step: what from.step points to.
  template <int kCapacity>
  __device__ __forceinline__ void fill(const Arguments<kCapacity>& a, const Record& from, const void* gradient,
                                       float step, int lane) {
    static_assert(sizeof(Record) % sizeof(uint64_t) == 0 && sizeof(Record) / sizeof(uint64_t) <= kWarp &&
                  kHyper < kWarp);
    if (lane < static_cast<int>(sizeof(Record) / sizeof(uint64_t)))
      reinterpret_cast<uint64_t*>(&record)[lane] = global(reinterpret_cast<const uint64_t*>(&from))[lane];
    if (lane < kHyper) {
      const Scalar& scalar = a.step.hyper[lane];
      hyper[lane] = scalar.tensor == nullptr ? scalar.value : load_any<double>(scalar.tensor, scalar.dtype, 0);
    }
    __syncwarp();
    if (lane != 0) return;
    grad = const_cast<void*>(gradient);
    prepared.fill(record, hyper, count_of(step) + 1, a.step);
  }
};

template <class Way, int kCapacity>
__global__ void __launch_bounds__(kStepThreads, Way::kBlocks)
    step_kernel(const __grid_constant__ Arguments<kCapacity> arguments) {
  __shared__ TeamShared<Way> shared[kStepThreads / kWarp];
  __shared__ bool is_last;
  const auto& a = arguments;
  const int thread = threadIdx.x, warp = thread / kWarp, warps = blockDim.x / kWarp, block = blockIdx.x;
  // The block takes one chunk, or each of its warps takes one.
  const bool together = block < a.n_block_chunks;
  const int index = together ? block : a.n_block_chunks + (block - a.n_block_chunks) * warps + warp;
  const Team team = together ? Team{thread, static_cast<int>(blockDim.x)} : Team{thread % kWarp, kWarp};
  const int owner = together ? 0 : warp;  // of what the team shares
  // The same for all blocks: none counts itself as done, and no step counter moves.
  const bool skipped = a.step.found_inf != nullptr && *global(a.step.found_inf) != 0.0f;

  Way tile;
  int left = 0;    // of the chunk, from this thread's numbers on
  int end = 0;     // where left is when the team's first thread has none left
  int64_t at = 0;  // where this thread's numbers begin in the tensor
  const int stride = team.size * Way::kN;
  if (index < a.n_block_chunks + a.n_small_chunks) {
    const Chunk chunk = a.chunks[index];
    const void* const grad = a.grads[chunk.record];
    if (grad != nullptr) {
      const Record& record = a.records[chunk.record];
      end = -team.index * Way::kN;
      left = chunk.n + end;
      at = chunk.offset + team.index * Way::kN;
      tile.begin(record, grad);
      if (skipped) {
        if (a.step.zero_grads) {
          for (; left > 0; left -= stride, at += stride) tile.zero_grad(record, const_cast<void*>(grad), at, left);
        }
        return;
      }
      const float step = *global(record.step);  // asked for before the rest, which waits for it
      tile.ask(record, grad, at, left);
      if (team.index < kWarp) shared[owner].fill(a, record, grad, step, team.index);
    }
  }
  if (skipped) return;
  __syncthreads();
  // Here all of the block's threads that read a step have used it. The last block to come here advances the counters,
  // at its end.
  bool last = false;
  if (thread == 0) last = atomicInc(a.done, gridDim.x - 1) == gridDim.x - 1;

  const TeamShared<Way>& mine = shared[owner];
  while (left > end) {
    tile.update(mine.record, mine.grad, mine.prepared, at, left, a.step.average_weight);
    at += stride;
    left -= stride;
    if (left > end) tile.ask(mine.record, mine.grad, at, left);
  }

  if (thread == 0) is_last = last;
  __syncthreads();
  if (!is_last) return;
  for (int i = thread; i < a.n_records; i += blockDim.x) {
    if (a.grads[i] != nullptr) *global(a.records[i].step) = next_counter(*global(a.records[i].step));
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
  a->step = call;
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
