// The source of the CUDA kernels for rules that reduce, run on the host for the tests.
// clang-format off
#include "cuda_on_host.h"
#include "call.h"
#include "../../csrc/cuda/reducing_stages.cuh"
// clang-format on

#include <limits>

using namespace fusedstep;
using namespace fusedstep::cuda;

extern "C" {

// Whether blocks, and the threads between two barriers, run from the last to the first.
void set_reverse(int reverse) {
  in_reverse = reverse != 0;
}

int record_size() {
  return sizeof(Record);
}
}

namespace {

// A table as a device has it, and the memory that its kernels work in.
struct HostTable {
  ReducingTable table;
  std::vector<char> bytes = table.bytes();
  std::vector<double> work =
      std::vector<double>(table.work_bytes / sizeof(double) + 1, std::numeric_limits<double>::quiet_NaN());

  char* work_memory() { return reinterpret_cast<char*>(work.data()); }
  // They must be, for the next step.
  bool counters_are_ready() const {
    return std::all_of(bytes.end() - table.n_counters * static_cast<int64_t>(sizeof(uint32_t)), bytes.end(),
                       [](char byte) { return byte == 0; });
  }
};

// Calls body with the rule of that name with so many states.
template <class Body>
void with_rule(const char* name, int n_states, const Body& body) {
  for (int id = 0; id < static_cast<int>(ReducingRuleId::kCount); ++id) {
    visit_reducing_rule(static_cast<ReducingRuleId>(id), [&](auto rule) {
      using Rule = decltype(rule);
      if (std::string(name) == Rule::kName && n_states == kNumPresent<Rule>) body(rule);
    });
  }
}

const auto on_host = [](auto kernel, int blocks, const auto& arguments) {
  launch_on_host(blocks, kReducingThreads, [&] { kernel(arguments); });
};

template <class Rule>
int run_pass(const Call& call, HostTable* host, Pass pass) {
  static ReducingArguments a;
  int launches = 0;
  for (size_t i = 0; i < host->table.segments.size(); ++i) {
    set_arguments(&a, call, host->table, host->work_memory(), i);
    launches += for_launches<Rule>(&a, call, host->table, i, pass, on_host);
  }
  return launches;
}

}  // namespace

extern "C" {

// One step over records by a rule; grads[i] null: takes no part. Returns the number of launches, or -1 if a counter is
// left over.
int host_reducing_step(const char* rule, int n_states, const Scalar* hyper, bool maximize, bool zero_grads,
                       bool write_grads, const float* grad_scale, const float* found_inf, const double* coefficient,
                       double average_weight, const Record* records, int64_t n_records, const void* const* grads) {
  int launches = 0;
  with_rule(rule, n_states, [&](auto r) {
    using Rule = decltype(r);
    HostTable host{build_reducing_table(std::vector<Record>(records, records + n_records), kReducingTraits<Rule>)};
    const Call call = call_of(hyper, maximize, zero_grads, write_grads, grad_scale, found_inf, coefficient,
                              average_weight, grads, host.bytes.data());
    for (const Pass pass : {Pass::kSums, Pass::kUpdate, Pass::kApply}) launches += run_pass<Rule>(call, &host, pass);
    if (!host.counters_are_ready()) launches = -1;
  });
  return launches;
}

// The table of records that are parts of tensors of (rows, columns, elements); to be given to free_host_table.
HostTable* host_parts(const char* rule, int n_states, const Record* records, int64_t n_records,
                      const WholeTensor* wholes) {
  HostTable* host = nullptr;
  with_rule(rule, n_states, [&](auto r) {
    host = new HostTable{build_reducing_table(std::vector<Record>(records, records + n_records),
                                              kReducingTraits<decltype(r)>,
                                              std::vector<WholeTensor>(wholes, wholes + n_records))};
  });
  return host;
}
void free_host_table(HostTable* host) {
  delete host;
}
// Writes the sizes of the sums that a record has of a stage, at most three; returns how many there are.
int host_sums(const HostTable* host, int stage, int64_t record, int64_t* sizes) {
  const std::vector<int64_t>& found = host->table.sums[stage][record];
  std::copy(found.begin(), found.end(), sizes);
  return static_cast<int>(found.size());
}

// One stage of such a step; numbers: one address for each stage that leaves sums. Returns as host_reducing_step does.
int host_stage(HostTable* host, double* const* numbers, int stage, const char* rule, int n_states, const Scalar* hyper,
               bool maximize, bool zero_grads, bool write_grads, const float* grad_scale, const float* found_inf,
               const double* coefficient, double average_weight, const void* const* grads) {
  int launches = 0;
  const Call call = call_of(hyper, maximize, zero_grads, write_grads, grad_scale, found_inf, coefficient,
                            average_weight, grads, host->bytes.data());
  with_rule(rule, n_states, [&](auto r) {
    using Rule = decltype(r);
    const auto own = [&](StageKernel which) {
      static StageArguments a;
      int n = 0;
      for (size_t i = 0; i < host->table.segments.size(); ++i) {
        set_arguments(&a, call, host->table, host->work_memory(), {numbers[0], numbers[1], numbers[2]}, i);
        n += for_launches<Rule>(&a, call, host->table, i, which, on_host);
      }
      return n;
    };
    launches = for_stage(stage, own, [&](Pass pass) { return run_pass<Rule>(call, host, pass); });
  });
  return host->counters_are_ready() ? launches : -1;
}
}
