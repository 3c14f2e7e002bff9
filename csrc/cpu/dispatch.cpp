// Threads and the choice of instruction set; the arithmetic is in engine.cpp.
#include <omp.h>
#include <pthread.h>
#if FUSEDSTEP_X86
#include <cpuid.h>
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "team.h"

namespace fusedstep::cpu {

#if FUSEDSTEP_X86
namespace v2 {
void run(const Call&, int64_t, int64_t);
void run_phase(const CacheBatch&, Phase, int64_t, int64_t);
BufferSums sum_buffer(const Buffer&, int64_t, int64_t, double);
void scale_buffer(const Buffer&, int64_t, int64_t, double);
}  // namespace v2
namespace v3 {
void run(const Call&, int64_t, int64_t);
void run_phase(const CacheBatch&, Phase, int64_t, int64_t);
BufferSums sum_buffer(const Buffer&, int64_t, int64_t, double);
void scale_buffer(const Buffer&, int64_t, int64_t, double);
}  // namespace v3
namespace v4 {
void run(const Call&, int64_t, int64_t);
void run_phase(const CacheBatch&, Phase, int64_t, int64_t);
BufferSums sum_buffer(const Buffer&, int64_t, int64_t, double);
void scale_buffer(const Buffer&, int64_t, int64_t, double);
}  // namespace v4
#else
inline namespace base {
void run(const Call&, int64_t, int64_t);
void run_phase(const CacheBatch&, Phase, int64_t, int64_t);
BufferSums sum_buffer(const Buffer&, int64_t, int64_t, double);
void scale_buffer(const Buffer&, int64_t, int64_t, double);
}  // namespace base
#endif

namespace {

// A thread is worth waking for this many elements; below it one thread is quicker.
constexpr int64_t kElementsPerThread = 1 << 15;
// Threads start at multiples of this, so that no two write to one cache line in the common case.
constexpr int64_t kSplitMultiple = 64;

#if FUSEDSTEP_X86
// The levels by their features, because not every compiler knows their names here. Those that none asks for by name are
// read from the processor.
bool has_v2() {
  return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("popcnt");
}

bool has_v3() {
  unsigned a, b, basic = 0, extended = 0, d;
  __get_cpuid(1, &a, &b, &basic, &d);
  __get_cpuid(0x80000001, &a, &b, &extended, &d);
  constexpr unsigned kMovbe = 1u << 22, kF16c = 1u << 29, kLzcnt = 1u << 5;
  return has_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && (basic & kMovbe) && (basic & kF16c) && (extended & kLzcnt);
}

bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

std::vector<Isa> supported() {
  std::vector<Isa> isas;
#if FUSEDSTEP_X86
  __builtin_cpu_init();
  if (has_v2()) isas.push_back({"v2", v2::run, v2::run_phase, v2::sum_buffer, v2::scale_buffer});
  if (has_v3()) isas.push_back({"v3", v3::run, v3::run_phase, v3::sum_buffer, v3::scale_buffer});
  if (has_v4()) isas.push_back({"v4", v4::run, v4::run_phase, v4::sum_buffer, v4::scale_buffer});
  if (isas.empty()) throw std::runtime_error("fusedstep: the CPU engine needs an x86-64-v2 processor (SSE4.2)");
#else
  isas.push_back({"base", base::run, base::run_phase, base::sum_buffer, base::scale_buffer});
#endif
  return isas;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = supported();
  return list;
}

std::atomic<size_t> chosen{SIZE_MAX};

// libgomp's threads do not survive fork(): a parallel region in the child would wait for them for ever.
std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

const Isa& current() {
  return isas()[std::min(chosen.load(std::memory_order_relaxed), isas().size() - 1)];
}

int team_size(int threads, int64_t numel) {
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(numel / kElementsPerThread, 1)));
}

namespace {

// How a thread computes: what it makes of denormal numbers, how it rounds. Each thread has a mode of its own, and
// torch.set_flush_denormal sets the caller's alone.
class FloatingPointMode {
 public:
#if FUSEDSTEP_X86
  static FloatingPointMode mine() { return FloatingPointMode{_mm_getcsr() & ~kExceptionsSeen}; }
  void set() const { _mm_setcsr(static_cast<unsigned>(mode_)); }
#elif defined(__aarch64__)
  static FloatingPointMode mine() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return FloatingPointMode{mode};
  }
  void set() const { asm volatile("msr fpcr, %0" : : "r"(mode_)); }
#else
  static FloatingPointMode mine() { return FloatingPointMode{0}; }
  void set() const {}
#endif

 private:
  static constexpr uint64_t kExceptionsSeen = 0x3f;
  explicit FloatingPointMode(uint64_t mode) : mode_(mode) {}
  uint64_t mode_;
};

// The same body, on each thread in the mode of the one that makes this; a thread of torch's gets its own back.
Body in_my_mode(const Body& body) {
  return [&body, mode = FloatingPointMode::mine()](int index, int size, const std::function<void()>& wait) {
    const FloatingPointMode before = FloatingPointMode::mine();
    mode.set();
    body(index, size, wait);
    before.set();
  };
}

}  // namespace

void parallel(int threads, const Body& given) {
  if (threads <= 1) return given(0, 1, [] {});
  const Body body = in_my_mode(given);
  if (forked) {
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, nullptr, static_cast<unsigned>(threads));
    const auto wait = [&barrier] { pthread_barrier_wait(&barrier); };
    std::vector<std::thread> team;
    for (int i = 1; i < threads; ++i) team.emplace_back(body, i, threads, wait);
    body(0, threads, wait);
    for (std::thread& member : team) member.join();
    pthread_barrier_destroy(&barrier);
  } else {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
  }
}

namespace {

// The last element up to `i` that begins a block of its tensor, if `by_blocks` holds of that.
template <class Predicate>
int64_t block_start(const Call& call, int64_t i, const Predicate& by_blocks) {
  const Work* const end = call.work + call.work_size;
  const Work* const next = std::upper_bound(call.work, end, i, [](int64_t at, const Work& w) { return at < w.begin; });
  if (next == call.work || i >= call.numel) return i;
  const Work& work = next[-1];
  return by_blocks(work.record->precision) ? work.begin + (i - work.begin) / kBlock * kBlock : i;
}

}  // namespace

bool can_split_at(const Call& call, int64_t i) {
  return block_start(call, i, [](const Precision& precision) { return precision.state_bits != 0; }) == i;
}

namespace {

// A thread whose core another program uses begins milliseconds late, and the call waits for it. If that took longer
// than one thread would have needed for what the others do, the next short calls are made on one, twice as many each
// time.
constexpr int64_t kShort = 1 << 22;  // elements: one thread needs a few milliseconds
constexpr int kFewestAlone = 16, kMostAlone = 1024;
std::atomic<int> alone{0}, alone_next{kFewestAlone};

using Clock = std::chrono::steady_clock;

void learn_from(int team, Clock::duration working, Clock::duration waiting) {
  if (waiting > std::max<Clock::duration>((team - 1) * working, std::chrono::microseconds(500))) {
    alone = alone_next.load();
    alone_next = std::min(2 * alone, kMostAlone);
  } else {
    alone_next = kFewestAlone;
  }
}

}  // namespace

namespace {

// Elements: some tens of microseconds. Of shares of less than a few pieces none is given away: they stay in the caches of
// their threads' cores.
constexpr int64_t kPiece = 1 << 17, kFewestToShare = 4 * kPiece;

// What is left of a thread's share.
struct alignas(64) Rest {
  std::atomic<int64_t> next;
  int64_t last;
};

}  // namespace

void parallel_for(int threads, int64_t numel, const Share& share) {
  int team = team_size(threads, numel);
  const bool learns = team > 1 && numel < kShort;
  if (learns && alone > 0) {
    --alone;
    team = 1;
  }
  if (team == 1) return share(0, numel);
  std::vector<Rest> rests(static_cast<size_t>(team));
  for (int i = 0; i < team; ++i) {
    const auto cut = [&](int k) { return k == team ? numel : numel / team * k / kSplitMultiple * kSplitMultiple; };
    rests[static_cast<size_t>(i)].next = cut(i);
    rests[static_cast<size_t>(i)].last = cut(i + 1);
  }
  const bool shares = numel / team >= kFewestToShare;
  const int64_t piece = shares ? kPiece : numel;
  const auto take_from = [&](int i) {
    Rest& rest = rests[static_cast<size_t>(i % team)];
    for (int64_t at; (at = rest.next.fetch_add(piece, std::memory_order_relaxed)) < rest.last;)
      share(at, std::min(at + piece, rest.last));
  };
  const Clock::time_point called = Clock::now();
  Clock::duration working{};
  parallel(team, [&](int index, int size, const auto&) {
    const Clock::time_point begun = Clock::now();
    for (int i = index; i < team; i += size) take_from(i);  // size: less than team where fewer threads have come
    for (int i = 1; shares && i < team; ++i) take_from(index + i);
    if (index == 0) working = Clock::now() - begun;
  });
  if (learns) learn_from(team, working, Clock::now() - called - working);
}

void step(const Call& call, int threads) {
  const RunFunction run = current().run;
  parallel_for(threads, call.numel, [&](int64_t first, int64_t last) {
    const auto boundary = [&](int64_t i) {
      return block_start(call, i, [](const Precision& p) {
        return p.state_bits != 0 || p.weight_format == WeightFormat::kStochastic;
      });
    };
    const int64_t begin = boundary(first), end = boundary(last);
    if (begin < end) run(call, begin, end);
  });
  for (int64_t i = 0; i < call.work_size; ++i) {
    float* step = call.work[i].record->step;
    *step = next_counter(*step);
  }
}

void run_range(const Call& call, int64_t first, int64_t last) {
  current().run(call, first, last);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

std::string isa() {
  return current().name;
}

void set_isa(const std::string& name) {
  for (size_t i = 0; i < isas().size(); ++i) {
    if (isas()[i].name == name) {
      chosen = i;
      return;
    }
  }
  std::string names;
  for (const Isa& isa : isas()) names += (names.empty() ? "" : ", ") + isa.name;
  throw std::invalid_argument("instruction set '" + name + "' is not available on this processor; available: " + names);
}

}  // namespace fusedstep::cpu
