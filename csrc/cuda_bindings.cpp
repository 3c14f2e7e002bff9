#include "cuda_bindings.h"

#include <pybind11/stl.h>

#include <array>

#include "cuda/formats.h"
#include "cuda/norm.h"
#include "cuda/reducing.h"
#include "given_step.h"
#include "norm_bindings.h"
#include "plan.h"

namespace fusedstep {
namespace {

// (format, the rules that have a kernel for it as (name, states), those that have one with averages and copies), for
// each format of the CUDA engine. Whatever is not in it takes the general kernel.
py::list cuda_formats() {
  py::list formats;
  for (int format = 0; format < cuda::kNumFormats; ++format) {
    py::list rules[2];
    for (int id = 0; id < static_cast<int>(RuleId::kCount); ++id) {
      visit_rule(static_cast<RuleId>(id), [&](auto rule) {
        using Rule = decltype(rule);
        py::list states;
        for (int k = 0; k < kNumNamed<Rule>; ++k) {
          if (has_state<Rule>(k)) states.append(Rule::kStateNames[k]);
        }
        for (const bool followed : {false, true}) {
          // A rule without states has one kernel for formats that differ in those alone.
          bool compiled = false;
          for (int other = 0; other < cuda::kNumFormats; ++other) {
            compiled = compiled || (cuda::is_compiled<Rule>(other, followed) &&
                                    cuda::same_format<Rule>(cuda::kFormats[other], cuda::kFormats[format]));
          }
          if (compiled) rules[followed].append(py::make_tuple(Rule::kName, states));
        }
      });
    }
    formats.append(py::make_tuple(cuda::kFormats[format].name, rules[false], rules[true]));
  }
  return formats;
}

}  // namespace

#if FUSEDSTEP_WITH_CUDA
namespace {

using Wholes = std::vector<std::array<int64_t, 3>>;  // (rows, columns, elements) each
using Numbers = std::array<uintptr_t, cuda::kSumStages>;

// The table of a plan as it was uploaded, for either kind of rule.
class DeviceTable {
 public:
  // wholes: of the tensors of which the records are parts; empty: they are whole.
  DeviceTable(const Plan& plan, int multiprocessors, const Wholes& wholes)
      : reduces_(plan.reduces()), fitting_version_(plan.grad_dtypes_version()) {
    if (!wholes.empty() && (!reduces_ || wholes.size() != plan.size()))
      throw std::invalid_argument("there must be as many wholes as records, of a rule that reduces");
    if (!reduces_) {
      elementwise_ = cuda::build_table(plan.records(), plan.rule(), multiprocessors);
      return;
    }
    const cuda::ReducingTraits traits =
        visit_reducing_rule(plan.reducing_rule(), [](auto rule) { return cuda::kReducingTraits<decltype(rule)>; });
    std::vector<cuda::WholeTensor> tensors;
    for (const auto& [rows, columns, numel] : wholes) tensors.push_back({rows, columns, numel});
    reducing_ = cuda::build_reducing_table(plan.records(), traits, tensors);
  }

  std::vector<char> bytes() const { return reduces_ ? reducing_.bytes() : elementwise_.bytes(); }
  int64_t work_bytes() const { return reducing_.work_bytes; }
  const auto& sums() const { return reducing_.sums; }
  // It no longer fits when a gradient has changed its dtype.
  bool fits(const Plan& plan) const {
    if (plan.grad_dtypes_version() == fitting_version_) return true;
    const std::vector<Record>& records = reduces_ ? reducing_.records : elementwise_.records;
    bool all = true;
    for (size_t k = 0; k < plan.size(); ++k) {
      const size_t i = reduces_ ? k : elementwise_.order[k];
      if (plan.records()[i].grad_dtype == records[k].grad_dtype) continue;
      if (plan.active(i)) return false;
      all = false;
    }
    if (all) fitting_version_ = plan.grad_dtypes_version();
    return true;
  }
  int step(const cuda::Call& call, const Plan& plan, char* work) const {
    return reduces_ ? cuda::step(call, plan.reducing_rule(), reducing_, work)
                    : cuda::step(call, plan.rule(), elementwise_);
  }
  int step_stage(const cuda::Call& call, const Plan& plan, char* work, const Numbers& numbers, int stage) const {
    if (stage < 0 || stage > cuda::kSumStages || reducing_.parts.size() != plan.size())
      throw std::invalid_argument("the table is not one of parts, or has no such stage");
    std::array<double*, cuda::kSumStages> addresses;
    for (size_t i = 0; i < numbers.size(); ++i) addresses[i] = reinterpret_cast<double*>(numbers[i]);
    return cuda::step_stage(call, plan.reducing_rule(), reducing_, work, addresses, stage);
  }

 private:
  bool reduces_;
  cuda::Table elementwise_;
  cuda::ReducingTable reducing_;
  mutable uint64_t fitting_version_;  // of the plan's dtypes, at which all of them are the table's
};

cuda::Scalar to_scalar(PyObject* value, const Plan& plan) {
  if (PyFloat_Check(value) || PyLong_Check(value)) return cuda::Scalar{to_double(value), nullptr, Dtype::kF64};
  TensorView view;
  const bool readable = view_tensor(value, &view) && view.dtype_known && view.numel() == 1 &&
                        view.device == Device::kCuda && view.device_index == plan.device_index();
  if (readable) return cuda::Scalar{0.0, view.data, view.dtype};
  return cuda::Scalar{to_double(value), nullptr, Dtype::kF64};
}

const double* to_coefficient(const py::object& tensor, const Plan& plan) {
  if (tensor.is_none()) return nullptr;
  TensorView view;
  if (!view_tensor(tensor.ptr(), &view) || !view.dtype_known || view.dtype != Dtype::kF64 || view.numel() != 1 ||
      view.device != Device::kCuda || view.device_index != plan.device_index())
    throw std::invalid_argument("coefficient must be one fp64 number on the parameters' device");
  return static_cast<const double*>(view.data);
}

const float* to_flag(const py::object& tensor, const Plan& plan, const char* name) {
  if (tensor.is_none()) return nullptr;
  TensorView view;
  if (!view_tensor(tensor.ptr(), &view) || !view.dtype_known || view.dtype != Dtype::kF32 || view.numel() != 1 ||
      view.device != Device::kCuda || view.device_index != plan.device_index())
    throw std::invalid_argument(std::string(name) + " must be one fp32 number on the parameters' device");
  return static_cast<const float*>(view.data);
}

// An empty tensor has no address, and takes part all the same: its step counts.
std::vector<const void*> addresses_of_grads(const Plan& plan) {
  alignas(16) static const char kNowhere = 0;
  std::vector<const void*> grads(plan.size(), nullptr);
  for (size_t i = 0; i < plan.size(); ++i) {
    if (plan.active(i)) grads[i] = plan.grad(i) != nullptr ? plan.grad(i) : &kNowhere;
  }
  return grads;
}

// How a plan's gradients are dealt out to be summed.
class NormTable {
 public:
  explicit NormTable(const Plan& plan) : table_(cuda::build_norm_table(plan.records())) {}

  std::vector<char> bytes() const { return table_.bytes(); }
  bool fits(const Plan& plan) const {
    for (size_t i = 0; i < plan.size(); ++i) {
      if (plan.active(i) && plan.records()[i].grad_dtype != table_.dtypes[i]) return false;
    }
    return true;
  }

  // Adds this plan's sums to those in `norm`, or replaces them if it is the first of several; the last one finishes.
  int launch(const Plan& plan, uintptr_t memory, uintptr_t norm, const py::object& grad_scale,
             const py::object& found_inf_before, const py::object& limits, uintptr_t found_inf, bool first) const {
    plan.check_borrowed();
    const std::vector<const void*> grads = addresses_of_grads(plan);
    cuda::NormCall call{};
    call.memory = reinterpret_cast<char*>(memory);
    call.grads = grads.data();
    call.grad_scale = to_flag(grad_scale, plan, "grad_scale");
    call.found_inf_before = to_flag(found_inf_before, plan, "found_inf");
    call.found_inf = reinterpret_cast<float*>(found_inf);
    call.norm = reinterpret_cast<Norm*>(norm);
    call.first = first;
    call.last = !limits.is_none();
    if (call.last) call.limits = to_limits(limits);
    call.device = plan.device_index();
    call.stream = current_stream(plan.device_index());
    return cuda::add_to_norm(call, table_);
  }

 private:
  cuda::NormTable table_;
};

// A call for what a plan has gathered; `grads` is the memory behind it.
cuda::Call to_call(const Plan& plan, uintptr_t device_table, const py::object& step, std::vector<const void*>* grads) {
  if (plan.size() != 0 && plan.device() != Device::kCuda) throw std::invalid_argument("the plan is not on a GPU");
  const GivenStep given(step);
  if (static_cast<int>(given.hyper.size()) != plan.n_hyper())
    throw std::invalid_argument("wrong number of hyperparameters");
  cuda::Call call{};
  for (size_t k = 0; k < given.hyper.size(); ++k)
    call.hyper[k] = to_scalar(PyTuple_GET_ITEM(given.hyper.ptr(), k), plan);
  call.maximize = given.maximize;
  call.grad_scale = to_flag(given.grad_scale, plan, "grad_scale");
  call.found_inf = to_flag(given.found_inf, plan, "found_inf");
  call.coefficient = to_coefficient(given.coefficient, plan);
  call.zero_grads = given.zero_grads;
  call.write_grads = given.write_grads;
  call.average_weight = given.average_weight;
  call.device_table = reinterpret_cast<char*>(device_table);
  call.device = plan.device_index();
  call.stream = current_stream(plan.device_index());
  plan.check_borrowed();
  *grads = addresses_of_grads(plan);
  call.grads = grads->data();
  return call;
}

int cuda_step(Plan& plan, const DeviceTable& table, uintptr_t device_table, uintptr_t work, const py::object& step) {
  std::vector<const void*> grads;
  const cuda::Call call = to_call(plan, device_table, step, &grads);
  const int launches = table.step(call, plan, reinterpret_cast<char*>(work));
  plan.increment_written(call.zero_grads || call.write_grads);
  plan.release_grads();
  return launches;
}

int cuda_stage(Plan& plan, const DeviceTable& table, uintptr_t device_table, uintptr_t work, const Numbers& numbers,
               int stage, const py::object& step) {
  std::vector<const void*> grads;
  const cuda::Call call = to_call(plan, device_table, step, &grads);
  const int launches = table.step_stage(call, plan, reinterpret_cast<char*>(work), numbers, stage);
  if (stage < cuda::kSumStages) return launches;
  plan.increment_written(call.zero_grads || call.write_grads);
  plan.release_grads();
  return launches;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_formats", &cuda_formats);
  py::class_<DeviceTable>(m, "CudaTable")
      .def(py::init<const Plan&, int, const Wholes&>(), py::arg("plan"), py::arg("multiprocessors"),
           py::arg("wholes") = Wholes())
      .def("bytes",
           [](const DeviceTable& table) {
             const std::vector<char> bytes = table.bytes();
             return py::bytearray(bytes.data(), bytes.size());
           })
      .def_property_readonly("work_bytes", &DeviceTable::work_bytes)
      .def_property_readonly("sums", &DeviceTable::sums,
                             "of parts: for each stage that leaves sums, the sizes of those of each record")
      .def("fits", &DeviceTable::fits);
  m.def("cuda_step", &cuda_step);
  m.def("cuda_stage", &cuda_stage, py::arg("plan"), py::arg("table"), py::arg("memory"), py::arg("work"),
        py::arg("numbers"), py::arg("stage"), py::arg("step"), "make stage 0, 1, 2 or 3 of cuda/reducing.h");
  py::class_<NormTable>(m, "CudaNormTable")
      .def(py::init<const Plan&>(), py::arg("plan"))
      .def("bytes",
           [](const NormTable& table) {
             const std::vector<char> bytes = table.bytes();
             return py::bytearray(bytes.data(), bytes.size());
           })
      .def("fits", &NormTable::fits)
      .def("launch", &NormTable::launch, py::arg("plan"), py::arg("memory"), py::arg("norm"), py::arg("grad_scale"),
           py::arg("found_inf_before"), py::arg("limits"), py::arg("found_inf"), py::arg("first"));
  m.def(
      "cuda_advance_schedules",
      [](uintptr_t values, uintptr_t table, int n, uintptr_t found_inf, int device) {
        cuda::advance_schedules(reinterpret_cast<double*>(values), reinterpret_cast<const double*>(table), n,
                                reinterpret_cast<const float*>(found_inf), device, current_stream(device));
      },
      py::arg("values"), py::arg("table"), py::arg("n"), py::arg("found_inf"), py::arg("device"));
  m.def("cuda_multiprocessors", &cuda::multiprocessors);
  m.def("cuda_why_not", &cuda::why_not);
  m.def("cuda_device_count", [] {
    std::string why;
    const int count = cuda::device_count(&why);
    return py::make_tuple(count, why);
  });
  m.attr("cuda_archs") = cuda::compiled_archs();
  m.attr("with_cuda") = true;
}
#else
void bind_cuda(py::module_& m) {
  m.def("cuda_formats", &cuda_formats);
  m.attr("with_cuda") = false;
}
#endif

}  // namespace fusedstep
