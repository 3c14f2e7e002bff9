// Launches of the kernel, and what there is to know about the devices.
#include <algorithm>
#include <iterator>

#include "kernel.cuh"
#include "runtime.h"
#include "schedule.cuh"

namespace fusedstep::cuda {
namespace {

template <class Rule, int kCapacity>
void launch(const Call& call, const Table& table, size_t index) {
  const Segment& segment = table.segments[index];
  char* chunks = call.device_table + table.records.size() * sizeof(Record);
  char* counters = chunks + table.chunks.size() * sizeof(Chunk);
  // 32 KB: built in place, once a step.
  static thread_local Arguments<kCapacity> a;
  a.records = reinterpret_cast<const Record*>(call.device_table) + segment.first_record;
  a.chunks = reinterpret_cast<const Chunk*>(chunks) + segment.first_chunk;
  a.done = reinterpret_cast<uint32_t*>(counters) + index;
  a.n_records = static_cast<int32_t>(segment.n_records);
  a.n_block_chunks = static_cast<int32_t>(segment.n_block_chunks);
  a.n_small_chunks = static_cast<int32_t>(segment.n_small_chunks);
  a.found_inf = call.found_inf;
  a.grads_become = grads_become(call);
  a.average_weight = call.average_weight;
  std::copy(std::begin(call.hyper), std::end(call.hyper), a.hyper);
  std::copy_n(call.grads + segment.first_record, segment.n_records, a.grads);

  constexpr int kWarps = kThreads / kWarp;
  const int64_t items = segment.n_block_chunks + (segment.n_small_chunks + kWarps - 1) / kWarps;
  const int64_t resident = int64_t{kMinBlocks} * multiprocessors(call.device);
  // At least one block, for the step counters of a group of empty tensors.
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(items, 1, resident));
  step_kernel<Rule, kCapacity><<<blocks, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(a);
  check(cudaGetLastError(), "launching the step kernel");
}

}  // namespace

int step(const Call& call, RuleId id, const Table& table) {
  const OnDevice on_device(call.device);
  int launches = 0;
  for (size_t i = 0; i < table.segments.size(); ++i) {
    const Segment& segment = table.segments[i];
    if (!takes_part(call, segment)) continue;
    visit_rule(id, [&](auto rule) {
      using Rule = decltype(rule);
      if (segment.n_records <= kFewTensors)
        launch<Rule, kFewTensors>(call, table, i);
      else
        launch<Rule, kMaxTensorsPerLaunch>(call, table, i);
    });
    ++launches;
  }
  return launches;
}

void advance_schedules(double* values, const double* table, int n, const float* found_inf, int device, void* stream) {
  const OnDevice on_device(device);
  constexpr int kGroupsPerBlock = 32;
  const int blocks = (n + kGroupsPerBlock - 1) / kGroupsPerBlock;
  schedule_kernel<<<blocks, kGroupsPerBlock, 0, static_cast<cudaStream_t>(stream)>>>(values, table, n, found_inf);
  check(cudaGetLastError(), "launching the schedule kernel");
}

int device_count(std::string* why_none) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return count;
  if (why_none != nullptr) *why_none = cudaGetErrorString(status);
  cudaGetLastError();  // clears it
  return 0;
}

std::string why_not(int device) {
  cudaFuncAttributes attributes;
  try {
    const OnDevice on_device(device);
    visit_rule(RuleId{}, [&](auto rule) {  // any of them: they are compiled together
      check(cudaFuncGetAttributes(&attributes, step_kernel<decltype(rule), kFewTensors>), "loading the step kernel");
    });
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // clears it
    return error.what();
  }
  return "";
}

std::vector<int> compiled_archs() {
  std::vector<int> archs{__CUDA_ARCH_LIST__};  // nvcc's, in tenths
  for (int& arch : archs) arch /= 10;
  return archs;
}

int multiprocessors(int device) {
  static thread_local std::vector<int> known;
  if (device >= static_cast<int>(known.size())) known.resize(device + 1, 0);
  if (known[device] == 0)
    check(cudaDeviceGetAttribute(&known[device], cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return known[device];
}

}  // namespace fusedstep::cuda
