// The source of the CUDA kernels for rules that reduce, run on the host for the tests.
// clang-format off
#include "cuda_on_host.h"
#include "call.h"
#include "../../csrc/cuda/reducing.cuh"
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

// One step over records by the rule of that name with so many states; grads[i] null: takes no part. Returns the number
// of launches, or -1 if a counter is left over.
int host_reducing_step(const char* rule, int n_states, const Scalar* hyper, bool maximize, bool zero_grads,
                       bool write_grads, const float* grad_scale, const float* found_inf, const double* coefficient,
                       double average_weight, const Record* records, int64_t n_records, const void* const* grads) {
  int launches = 0;
  const auto step = [&](auto r) {
    using Rule = decltype(r);
    if (std::string(rule) != Rule::kName || n_states != kNumPresent<Rule>) return;
    const ReducingTable table =
        build_reducing_table(std::vector<Record>(records, records + n_records), kReducingTraits<Rule>);
    std::vector<char> bytes = table.bytes();
    std::vector<double> work(table.work_bytes / sizeof(double) + 1, std::numeric_limits<double>::quiet_NaN());
    const Call call = call_of(hyper, maximize, zero_grads, write_grads, grad_scale, found_inf, coefficient,
                              average_weight, grads, bytes.data());
    static ReducingArguments a;
    for (size_t i = 0; i < table.segments.size(); ++i) {
      set_arguments(&a, call, table, reinterpret_cast<char*>(work.data()), i);
      launches += for_launches<Rule>(&a, call, table, i, [&](auto kernel, int blocks, const auto& arguments) {
        launch_on_host(blocks, kReducingThreads, [&] { kernel(arguments); });
      });
    }
    for (size_t at = bytes.size() - table.n_counters * sizeof(uint32_t); at < bytes.size(); ++at) {
      if (bytes[at] != 0) launches = -1;  // they must be ready for the next step
    }
  };
  for (int id = 0; id < static_cast<int>(ReducingRuleId::kCount); ++id)
    visit_reducing_rule(static_cast<ReducingRuleId>(id), step);
  return launches;
}
}
