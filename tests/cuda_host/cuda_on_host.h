// As much of CUDA as the kernels use, on the host: the threads of a block are fibers of one thread that run, one at a
// time, from barrier to barrier; blocks run one after another. Both orders can be turned round: a result that depends
// on them shows a missing barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
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

using std::min;

inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;
inline bool in_reverse = false;

class Block {
 public:
  explicit Block(unsigned threads) : fibers_(threads) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);  // not zeroed: it is much memory
  }

  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    for (Fiber& fiber : fibers_) fiber.at = At::kStart;
    const unsigned n = static_cast<unsigned>(fibers_.size());
    for (bool finished = false; !finished;) {
      bool moved = false;
      for (unsigned i = 0; i < n; ++i) {
        const unsigned thread = in_reverse ? n - 1 - i : i;
        if (fibers_[thread].at == At::kReady || fibers_[thread].at == At::kStart) {
          resume(thread);
          moved = true;
        }
      }
      finished = all(0, n, At::kEnd);
      for (unsigned first = 0; first < n; first += 32)
        release(first, std::min(first + 32, n), At::kWarpBarrier, &moved);
      release(0, n, At::kBlockBarrier, &moved);
      if (!moved && !finished) {
        std::fprintf(stderr, "block %u: its threads wait at different barriers\n", blockIdx.x);
        std::abort();
      }
    }
  }

  void sync_block() { wait(At::kBlockBarrier); }
  void sync_warp() { wait(At::kWarpBarrier); }

  template <class T>
  T exchange(T mine, unsigned from) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&fibers_[threadIdx.x].offered, &mine, sizeof(T));
    sync_warp();
    T theirs;
    std::memcpy(&theirs, &fibers_[threadIdx.x / 32 * 32 + from % 32].offered, sizeof(T));
    sync_warp();
    return theirs;
  }

 private:
  enum class At { kStart, kReady, kWarpBarrier, kBlockBarrier, kEnd };
  struct Fiber {
    At at = At::kEnd;
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    jmp_buf where;
    uint64_t offered = 0;
  };
  static constexpr size_t kStack = 128 * 1024;

  bool all(unsigned first, unsigned end, At at) const {
    for (unsigned i = first; i < end; ++i) {
      if (fibers_[i].at != at) return false;
    }
    return true;
  }
  // Threads that have returned do not count at a barrier.
  void release(unsigned first, unsigned end, At barrier, bool* moved) {
    for (unsigned i = first; i < end; ++i) {
      if (fibers_[i].at != barrier && fibers_[i].at != At::kEnd) return;
    }
    for (unsigned i = first; i < end; ++i) {
      if (fibers_[i].at != barrier) continue;
      fibers_[i].at = At::kReady;
      *moved = true;
    }
  }

  void resume(unsigned thread) {
    Fiber& fiber = fibers_[thread];
    threadIdx.x = thread;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.at != At::kStart) _longjmp(fiber.where, 1);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Block::enter, 0);
    current = this;
    setcontext(&fiber.start);
  }
  static void enter() {
    (*current->kernel_)();
    current->fibers_[threadIdx.x].at = At::kEnd;
    _longjmp(current->scheduler_, 1);
  }
  void wait(At barrier) {
    Fiber& fiber = fibers_[threadIdx.x];
    fiber.at = barrier;
    if (_setjmp(fiber.where) == 0) _longjmp(scheduler_, 1);
  }

  std::vector<Fiber> fibers_;
  const std::function<void()>* kernel_ = nullptr;
  jmp_buf scheduler_;

 public:
  static inline Block* current = nullptr;
};

inline void __syncthreads() {
  Block::current->sync_block();
}
inline void __syncwarp() {
  Block::current->sync_warp();
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned lanes) {
  return Block::current->exchange(value, (threadIdx.x % 32) ^ lanes);
}
// Four of the eight bytes of x and then y, by the lowest three bits of each digit of the selector.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    if (selector >> (4 * i) & 8) std::abort();  // would repeat the sign, which no kernel wants
    result |= (bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return Block::current->exchange(value, lane);
}
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

inline void launch_on_host(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  gridDim.x = blocks;
  blockDim.x = threads;
  static std::map<unsigned, Block> of_size;  // their stacks are made once
  Block& block = of_size.try_emplace(threads, threads).first->second;
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = in_reverse ? blocks - 1 - i : i;
    block.run(kernel);
  }
}
