#include "norm_bindings.h"

#include <pybind11/stl.h>

#include "cpu/norm.h"
#include "norm.h"
#include "plan.h"

namespace fusedstep {
namespace {

// Calls work() without the interpreter lock, unless gradients are borrowed, which only the lock protects.
template <class Work>
void run(bool borrowed, const Work& work) {
  if (borrowed) return work();
  const py::gil_scoped_release release;
  work();
}

// Fills `norm` in from the gradients that the plans have gathered. Nothing is written.
void cpu_norm(const std::vector<Plan*>& plans, double grad_scale, const py::object& limits, bool skipped,
              uintptr_t norm, uintptr_t found_inf, int threads) {
  std::vector<cpu::Buffer> buffers;
  bool borrowed = false;
  for (const Plan* plan : plans) {
    plan->check_borrowed();
    borrowed = borrowed || plan->borrowed();
    for (size_t i = 0; i < plan->size(); ++i) {
      if (!plan->active(i)) continue;
      const Record& record = plan->records()[i];
      buffers.push_back(cpu::Buffer{const_cast<void*>(plan->grad(i)), record.numel, record.grad_dtype});
    }
  }
  Norm& result = *reinterpret_cast<Norm*>(norm);
  run(borrowed, [&] {
    const cpu::BufferSums sums = cpu::sum_buffers(buffers, grad_scale, threads);
    result = Norm{sums.sum_of_squares, sums.max_abs, 0.0, 1.0};
  });
  if (!limits.is_none())
    finish_norm(result, reinterpret_cast<float*>(found_inf), to_limits(limits), grad_scale, skipped);
}

// A tensor's elements, if they lie in memory without gaps or overlaps, in any order of dimensions.
bool is_dense(const TensorView& view) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int32_t i = 0; i < view.ndim; ++i) {
    if (view.shape[i] != 1) dims.emplace_back(view.strides[i], view.shape[i]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return view.numel() == 0;
    expected *= size;
  }
  return true;
}

// The memory of tensors, or nothing if one of them is not plain dense memory on the CPU of a dtype that is known.
bool view_stretches(const py::list& tensors, std::vector<cpu::Buffer>* buffers) {
  for (const py::handle tensor : tensors) {
    TensorView view;
    if (!view_tensor(tensor.ptr(), &view) || !view.dtype_known || view.device != Device::kCpu || !is_dense(view))
      return false;
    buffers->push_back(cpu::Buffer{view.data, view.numel(), view.dtype});
  }
  return true;
}

py::object cpu_sums(const py::list& tensors, double grad_scale, int threads) {
  std::vector<cpu::Buffer> buffers;
  if (!view_stretches(tensors, &buffers)) return py::none();
  cpu::BufferSums sums{};
  run(false, [&] { sums = cpu::sum_buffers(buffers, grad_scale, threads); });
  return py::make_tuple(sums.sum_of_squares, sums.max_abs);
}

bool overlap(std::vector<cpu::Buffer> buffers) {
  const auto begin = [](const cpu::Buffer& s) { return reinterpret_cast<uintptr_t>(s.data); };
  std::sort(buffers.begin(), buffers.end(), [&](const auto& a, const auto& b) { return begin(a) < begin(b); });
  uintptr_t end = 0;
  for (const cpu::Buffer& buffer : buffers) {
    if (buffer.numel == 0) continue;
    if (begin(buffer) < end) return true;
    end = begin(buffer) + static_cast<uintptr_t>(buffer.numel * size_of(buffer.dtype));
  }
  return false;
}

void cpu_scale(const py::list& tensors, double factor, int threads) {
  std::vector<cpu::Buffer> buffers;
  if (!view_stretches(tensors, &buffers)) throw std::invalid_argument("a tensor is not plain dense memory on the CPU");
  // What several of them have is scaled several times, as by torch: one after the other.
  const int team = overlap(buffers) ? 1 : threads;
  run(false, [&] { cpu::scale_buffers(buffers, factor, team); });
  increment_versions(tensors);
}

}  // namespace

NormLimits to_limits(const py::tuple& limits) {
  const auto [max_norm, epsilon, by_max_abs, nan_if_nonfinite, find_nonfinite, skip_nonfinite] =
      limits.cast<std::tuple<double, double, bool, bool, bool, bool>>();
  return {max_norm, epsilon, by_max_abs, nan_if_nonfinite, find_nonfinite, skip_nonfinite};
}

void bind_norm(py::module_& m) {
  m.def("cpu_norm", &cpu_norm, py::arg("plans"), py::arg("grad_scale"), py::arg("limits"), py::arg("skipped"),
        py::arg("norm"), py::arg("found_inf"), py::arg("threads"),
        "sums over the gathered gradients of all plans, and with limits what follows; the addresses are norm.h's");
  m.def("cpu_sums", &cpu_sums, py::arg("tensors"), py::arg("grad_scale"), py::arg("threads"),
        "(sum of squares, largest absolute value), or None if a tensor is not plain dense memory on the CPU");
  m.def("cpu_scale", &cpu_scale, py::arg("tensors"), py::arg("factor"), py::arg("threads"), "multiply in place");
}

}  // namespace fusedstep
