// As much of CUDA as the step kernel uses, on host threads: a block is a group of threads, blocks run one after
// another.
#pragma once

#include <pthread.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __isGlobal(pointer) ((pointer) != nullptr)
#define __builtin_assume(condition) ((void)(condition))

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx;
inline Index blockIdx, blockDim, gridDim;

class Barrier {
 public:
  explicit Barrier(unsigned n) { pthread_barrier_init(&barrier_, nullptr, n); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};
inline std::unique_ptr<Barrier> block_barrier;
inline std::vector<std::unique_ptr<Barrier>> warp_barriers;

inline void __syncthreads() {
  block_barrier->wait();
}
inline void __syncwarp() {
  warp_barriers[threadIdx.x / 32]->wait();
}
inline void __threadfence() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {  // called by one thread of one block at a time
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

template <class Kernel>
void launch_on_host(unsigned blocks, unsigned threads, const Kernel& kernel) {
  gridDim.x = blocks;
  blockDim.x = threads;
  block_barrier = std::make_unique<Barrier>(threads);
  warp_barriers.clear();
  for (unsigned warp = 0; warp < threads / 32; ++warp) warp_barriers.push_back(std::make_unique<Barrier>(32));
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    std::vector<std::thread> team;
    for (unsigned thread = 0; thread < threads; ++thread) {
      team.emplace_back([&kernel, thread] {
        threadIdx.x = thread;
        kernel();
      });
    }
    for (std::thread& member : team) member.join();
  }
}
