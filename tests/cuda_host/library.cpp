// The CUDA kernel's own source, run on the host for the tests.
// clang-format off
#include "cuda_on_host.h"
#include "../../csrc/cuda/plain.cuh"
#include "../../csrc/cuda/stored.cuh"
#include "../../csrc/cuda/norm.cuh"
#include "../../csrc/cuda/schedule.cuh"
// clang-format on

using namespace fusedstep;
using namespace fusedstep::cuda;

extern "C" {

int record_size() {
  return sizeof(Record);
}

// Whether blocks, and the threads between two barriers, run from the last to the first.
void set_reverse(int reverse) {
  in_reverse = reverse != 0;
}

// One step over records; grads[i] null: takes no part. Returns the number of launches.
int host_step(int rule, const Scalar* hyper, bool maximize, bool zero_grads, bool write_grads, const float* grad_scale,
              const float* found_inf, const double* coefficient, double average_weight, const Record* records,
              int64_t n_records, const void* const* grads, int multiprocessors, unsigned blocks, unsigned threads) {
  const Table table = build_table(std::vector<Record>(records, records + n_records), multiprocessors);
  std::vector<char> bytes = table.bytes();
  Call call{{},          maximize,       grad_scale,   found_inf, coefficient, zero_grads,
            write_grads, average_weight, bytes.data(), grads,     0,           nullptr};
  for (int k = 0; k < kMaxHyper; ++k) call.hyper[k] = hyper[k];
  int launches = 0;
  for (size_t i = 0; i < table.segments.size(); ++i) {
    static Arguments<kMaxTensorsPerLaunch> a;
    set_arguments(&a, call, table, i);
    visit_rule(static_cast<RuleId>(rule), [&](auto r) {
      using Rule = decltype(r);
      const auto kernel = table.segments[i].is_plain ? step_kernel<Rule, Plain, kMaxTensorsPerLaunch>
                                                     : step_kernel<Rule, Stored, kMaxTensorsPerLaunch>;
      launch_on_host(blocks, threads, [&] { kernel(a); });
    });
    if (*a.done != 0) return -1;  // the counter must be ready for the next launch
    ++launches;
  }
  return launches;
}

// Adds a plan's sums to `norm`; returns the number of launches, or -1 if a counter is left over.
int host_norm(const Record* records, int64_t n_records, const void* const* grads, const float* grad_scale,
              const float* found_inf_before, const double* limits, float* found_inf, double* norm, bool first,
              bool last) {
  const NormTable table = build_norm_table(std::vector<Record>(records, records + n_records));
  std::vector<char> memory = table.bytes();
  const size_t sums = table.chunks.size() * sizeof(NormChunk), counters = sums + table.n_sums * sizeof(ChunkSums);
  std::fill(memory.begin() + sums, memory.begin() + counters, '\xff');  // NaN
  NormCall call{memory.data(), grads, grad_scale, found_inf_before, found_inf, reinterpret_cast<Norm*>(norm), first,
                last,          {},    0,          nullptr};
  call.limits = {limits[0], limits[1], limits[2] != 0, limits[3] != 0, limits[4] != 0, limits[5] != 0};
  const int launches = for_segments(call, table, [&](size_t i, bool is_first, bool is_last) {
    static NormArguments<kMaxTensorsPerLaunch> a;
    set_arguments(&a, call, table, i, is_first, is_last);
    const auto kernel =
        grad_scale != nullptr ? norm_kernel<kMaxTensorsPerLaunch, true> : norm_kernel<kMaxTensorsPerLaunch, false>;
    launch_on_host(a.n_blocks, kNormThreads, [&] { kernel(a); });
  });
  return std::all_of(memory.begin() + counters, memory.end(), [](char byte) { return byte == 0; }) ? launches : -1;
}

// Counts a step of n groups with schedules.
void host_advance_schedules(double* values, const double* table, int n, const float* found_inf, unsigned blocks,
                            unsigned threads) {
  launch_on_host(blocks, threads, [&] { schedule_kernel(values, table, n, found_inf); });
}

// Deals out tensors of the given sizes; returns the number of chunks, or -1 if an element is dealt out twice or not at
// all. No memory is touched.
int64_t check_chunks(const int64_t* numels, int64_t n, int multiprocessors) {
  std::vector<Record> records(n);
  for (int64_t i = 0; i < n; ++i) records[i].numel = numels[i];
  const Table table = build_table(records, multiprocessors);
  std::vector<int64_t> reached(n, 0);
  int64_t n_segment_records = 0, n_segment_chunks = 0;
  for (const Segment& segment : table.segments) {
    if (segment.first_record != n_segment_records || segment.first_chunk != n_segment_chunks) return -1;
    n_segment_records += segment.n_records;
    n_segment_chunks += segment.n_block_chunks + segment.n_small_chunks;
    for (int64_t c = segment.first_chunk; c < n_segment_chunks; ++c) {
      const Chunk& chunk = table.chunks[c];
      int64_t& at = reached[segment.first_record + chunk.record];
      if (chunk.offset != at || chunk.n <= 0 || chunk.offset % 16 != 0) return -1;
      at += chunk.n;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    if (reached[i] != numels[i]) return -1;
  }
  return n_segment_records == n ? static_cast<int64_t>(table.chunks.size()) : -1;
}
}
