// Steps of a group, and what there is to know about the devices.
#include "launch.cuh"
#include "schedule.cuh"

namespace fusedstep::cuda {
namespace {

bool is_in(int format, FormatRange family) {
  return format >= family.first && format < family.end;
}

}  // namespace

int step(const Call& call, RuleId rule, const Table& table) {
  const OnDevice on_device(call.device);
  int launches = 0;
  for (size_t i = 0; i < table.segments.size(); ++i) {
    if (!takes_part(call, table, i)) continue;
    const int format = table.segments[i].format;
    if (is_in(format, kFP32Weights))
      step_fp32_weights(call, rule, table, i);
    else if (is_in(format, k16BitWeights))
      step_16_bit_weights(call, rule, table, i);
    else if (is_in(format, kFullWeights))
      step_full_weights(call, rule, table, i);
    else if (is_in(format, kRoundedWeights))
      step_rounded_weights(call, rule, table, i);
    else
      step_general(call, rule, table, i);
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
    check(cudaFuncGetAttributes(&attributes, schedule_kernel), "loading a kernel");  // all are compiled for the same
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // clears it
    return error.what();
  }
  return "";
}

std::vector<int> compiled_archs() {
  return {FUSEDSTEP_CUDA_ARCHS};
}

int multiprocessors(int device) {
  static thread_local std::vector<int> known;
  if (device >= static_cast<int>(known.size())) known.resize(device + 1, 0);
  if (known[device] == 0)
    check(cudaDeviceGetAttribute(&known[device], cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return known[device];
}

}  // namespace fusedstep::cuda
