// The CUDA kernel's own source, run on the host for the tests.
// clang-format off
#include "cuda_on_host.h"
#include "call.h"
#include "steps.h"
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

// The index of each record's format, n_formats() for the general way.
void host_formats(int rule, const Record* records, int64_t n_records, int* formats) {
  visit_rule(static_cast<RuleId>(rule), [&](auto r) {
    for (int64_t i = 0; i < n_records; ++i) formats[i] = format_of<decltype(r)>(records[i]);
  });
}
int n_formats() {
  return kNumFormats;
}

// One step over records; grads[i] null: takes no part. Returns the number of launches, or -1 if a counter is left over.
// general: whether every record goes the general way.
int host_step(int rule, const Scalar* hyper, bool maximize, bool zero_grads, bool write_grads, const float* grad_scale,
              const float* found_inf, const double* coefficient, double average_weight, const Record* records,
              int64_t n_records, const void* const* grads, int multiprocessors, bool general, unsigned threads) {
  Table table =
      build_table(std::vector<Record>(records, records + n_records), static_cast<RuleId>(rule), multiprocessors);
  std::vector<char> bytes = table.bytes();
  const Call call = call_of(hyper, maximize, zero_grads, write_grads, grad_scale, found_inf, coefficient,
                            average_weight, grads, bytes.data());
  int launches = 0;
  for (size_t i = 0; i < table.segments.size(); ++i) {
    Segment& segment = table.segments[i];
    if (general) segment.format = kGeneral;
    if (!takes_part(call, table, i)) continue;
    static Arguments<kMaxTensorsPerLaunch> a;
    set_arguments(&a, call, table, i);
    const bool found = run_fp32_weights(rule, segment, threads, a) || run_16_bit_weights(rule, segment, threads, a) ||
                       run_full_weights(rule, segment, threads, a) || run_rounded_weights(rule, segment, threads, a) ||
                       run_general(rule, segment, threads, a);
    if (!found) return -2;
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

// Deals out tensors of the given sizes, of two kinds; returns the number of chunks, or -1 if an element is dealt out
// twice or not at all. No memory is touched.
int64_t check_chunks(const int64_t* numels, int64_t n, int multiprocessors) {
  std::vector<Record> records(n);
  for (int64_t i = 0; i < n; ++i) {
    records[i] = {};
    records[i].numel = numels[i];
    if (i % 3 == 1) records[i].param_dtype = records[i].grad_dtype = Dtype::kBF16;
  }
  const Table table = build_table(records, RuleId::kSgd, multiprocessors);
  std::vector<int64_t> reached(n, 0);
  int64_t n_segment_records = 0, n_segment_chunks = 0;
  for (const Segment& segment : table.segments) {
    if (segment.first_record != n_segment_records || segment.first_chunk != n_segment_chunks) return -1;
    n_segment_records += segment.n_records;
    n_segment_chunks += segment.n_block_chunks + segment.n_small_chunks;
    for (int64_t c = segment.first_chunk; c < n_segment_chunks; ++c) {
      const Chunk& chunk = table.chunks[c];
      int64_t& at = reached[table.order[segment.first_record + chunk.record]];
      if (chunk.offset != at || chunk.n <= 0 || chunk.offset % kBlock != 0) return -1;
      at += chunk.n;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    if (reached[i] != numels[i]) return -1;
  }
  return n_segment_records == n ? static_cast<int64_t>(table.chunks.size()) : -1;
}
}
