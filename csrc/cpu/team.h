// Threads, and the choice of instruction set that all of the CPU engine shares.
#pragma once

#include <functional>

#include "engine.h"
#include "norm.h"
#include "reducing.h"

namespace fusedstep::cpu {

struct Isa {
  std::string name;
  RunFunction run;
  PhaseFunction run_phase;
  SumFunction sum;
  ScaleFunction scale;
};

const Isa& current();  // the one in use

// How many of `threads` are worth waking for so many elements.
int team_size(int threads, int64_t numel);

// Calls body(index, size, wait) on each thread of a team of up to that size; wait() returns once all have called it.
using Body = std::function<void(int index, int size, const std::function<void()>& wait)>;
void parallel(int threads, const Body& body);

// Calls share(first, last) for ranges of elements that together are [0, numel), on as many threads as so many are worth.
// Each begins with a range of its own, whose memory it has used before; one that is done with a long one takes from the
// others, whose cores another program may be using too. Where a call is short, it runs on one thread while the others'
// cores are busy.
using Share = std::function<void(int64_t first, int64_t last)>;
void parallel_for(int threads, int64_t numel, const Share& share);

}  // namespace fusedstep::cpu
