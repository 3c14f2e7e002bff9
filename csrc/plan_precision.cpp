// What a plan takes up beside parameters and plain states: companions of weights and the scales of 8-bit states.
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "plan.h"

namespace fusedstep {
namespace {

[[noreturn]] void reject(size_t i, const char* why) {
  throw std::invalid_argument("tensor " + std::to_string(i) + " of the plan: " + why);
}

// The dtype of a form's companion.
Dtype companion_dtype(Form form, Dtype param) {
  return form == Form::kMaster ? Dtype::kF32 : form == Form::kSplit ? Dtype::kI16 : param;
}

}  // namespace

void Plan::add_precision(size_t i, const py::object& precision) {
  Record& record = records_[i];
  const auto in_8_bits = [&](int k) {
    return record.state_dtypes[k] == Dtype::kI8 || record.state_dtypes[k] == Dtype::kU8;
  };
  const auto view = [&](const py::object& tensor, const char* why) {
    TensorView seen;
    if (!view_tensor(tensor.ptr(), &seen) || seen.device != device_ || seen.device_index != device_index_)
      reject(i, why);
    watch_state(tensor.ptr(), seen);
    return seen;
  };
  using Given = std::tuple<int, py::object, py::tuple, uint64_t, uint32_t>;
  Given given{0, py::none(), py::tuple(), 0, 0};
  if (!precision.is_none()) given = precision.cast<Given>();
  const auto& [form, companion, scales, seed, index] = given;
  Precision& target = record.precision;
  target.form = static_cast<Form>(form);
  target.seed = seed;
  target.index = index;
  if (form < 0 || form > static_cast<int>(Form::kStochastic)) reject(i, "there is no such form");
  if (target.form != Form::kPlain && record.param_dtype != Dtype::kBF16 &&
      (record.param_dtype != Dtype::kF16 || target.form == Form::kSplit))
    reject(i, "its dtype cannot have this form");
  const bool alone = target.form == Form::kPlain || target.form == Form::kStochastic;
  if (companion.is_none() != alone) reject(i, "its form needs a companion, or takes none");
  if (!alone) {
    const TensorView seen = view(companion, "its companion has no memory on its device");
    const int32_t ndim = layouts_[i].ndim;
    const int64_t* shape = dims_.data() + layouts_[i].begin;
    if (seen.dtype != companion_dtype(target.form, record.param_dtype) || !(seen.dtype_known || seen.is_code))
      reject(i, "its companion has another dtype than the form");
    if (!same_layout(seen, ndim, shape, shape + ndim)) reject(i, "its companion is laid out differently");
    target.companion = seen.data;
  }
  if (!scales.empty() && scales.size() != variant_.places.size()) reject(i, "its scales are not one for each state");
  for (size_t n = 0; n < variant_.places.size(); ++n) {
    const int k = variant_.places[n];
    const py::object tensor = scales.empty() ? py::object(py::none()) : py::object(scales[n]);
    if (tensor.is_none() == in_8_bits(k)) reject(i, "8-bit states, and no others, have scales");
    if (tensor.is_none()) {
      if (record.state_dtypes[k] == Dtype::kI16) reject(i, "its state has an unknown dtype");
      continue;
    }
    const TensorView seen = view(tensor, "its scales have no memory on its device");
    const bool fits = seen.dtype_known && seen.dtype == Dtype::kF32 && seen.ndim == 1 &&
                      (seen.shape[0] <= 1 || seen.strides[0] == 1) &&
                      seen.shape[0] == (record.numel + kBlock - 1) / kBlock;
    if (!fits) reject(i, "its scales are not one fp32 number for each block");
    if (record.param_dtype == Dtype::kF64) reject(i, "fp64 parameters have no 8-bit states");
    target.scales[k] = static_cast<float*>(seen.data);
    target.in_blocks = true;
  }
}

}  // namespace fusedstep
