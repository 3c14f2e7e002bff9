// How a plan takes Python's records: each tensor checked, and its address noted in a Record.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "plan.h"

namespace fusedstep {
namespace {

[[noreturn]] void reject(size_t i, const char* what, const char* why) {
  throw std::invalid_argument("record " + std::to_string(i) + " of the plan: its " + what + " " + why);
}

// Numbers in logical order without gaps.
bool contiguous(int32_t ndim, const int64_t* shape, const int64_t* strides) {
  if (std::find(shape, shape + ndim, 0) != shape + ndim) return true;
  int64_t expected = 1;
  for (int32_t i = ndim - 1; i >= 0; --i) {
    if (shape[i] > 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

// How many numbers a state has for a tensor; -1: the tensor does not have the state.
int64_t state_numel(Span span, const Matrices& matrices, int64_t numel) {
  switch (span) {
    case Span::kRow:
      return matrices.factored ? matrices.batch * matrices.rows : -1;
    case Span::kColumn:
      return matrices.factored ? matrices.batch * matrices.columns : -1;
    case Span::kFlat:
      return matrices.factored ? -1 : numel;
    case Span::kTensor:
      return 1;
    case Span::kElement:
      return numel;
  }
  return numel;
}

// The dtype of what a form keeps beside the weight.
Dtype aux_dtype(WeightFormat weight_format, Dtype param) {
  return weight_format == WeightFormat::kMaster  ? Dtype::kF32
         : weight_format == WeightFormat::kSplit ? Dtype::kI16
                                                 : param;
}

}  // namespace

void Plan::add_records() {
  // The names of python/fusedstep/record.py's Record.
  const py::str owner("owner"), param("param"), step("step"), states("states"), matrices("matrices"),
      average("average"), copy("copy"), weight_format("weight_format"), aux("aux"), scales("scales"), seed("seed"),
      index("index"), element_map("element_map");
  for (size_t i = 0; i < records_.size(); ++i) {
    const py::handle given = given_[i];
    Record& record = records_[i];
    std::memset(&record, 0, sizeof(record));
    owners_.append(given.attr(owner));
    params_.append(given.attr(param));
    const py::object tensor = params_[i];
    if (tensor.is_none()) continue;  // no gradient so far
    add_param(i, tensor);
    add_step(i, given.attr(step));
    add_matrices(i, given.attr(matrices));
    add_states(i, given.attr(states));
    add_weight(i, py::cast<int>(given.attr(weight_format).attr("number")), given.attr(aux));
    add_scales(i, given.attr(scales));
    record.precision.seed = py::cast<uint64_t>(given.attr(seed));
    record.precision.index = py::cast<uint32_t>(given.attr(index));
    const auto [first, run, runs, stride, outer] =
        given.attr(element_map).cast<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>>();
    if (first < 0 || run < 0 || runs < 1) reject(i, "element_map", "is none");
    record.precision.element_map = ElementMap{first, run, runs, stride, outer};
    Dtype dtype = Dtype::kF32;
    record.average = add_follower(i, given.attr(average), "average", &dtype);
    if (record.average != nullptr && dtype != (record.param_dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32))
      reject(i, "average", "has a narrow dtype");
    record.copy = add_follower(i, given.attr(copy), "copy", &record.copy_dtype);
    // A stand-in is copied back by torch, which bumps the owner's counter itself. A wrapper's own memory is a tensor
    // with a counter of its own.
    all_written_.append(tensor);
  }
}

void Plan::add_param(size_t i, const py::object& tensor) {
  TensorView param;
  if (!view_tensor(tensor.ptr(), &param)) reject(i, "param", "has no memory");
  if (!param.dtype_known) reject(i, "param", "has a dtype that no kernel knows");
  if (param_memory_.empty()) {
    device_ = param.device;
    device_index_ = param.device_index;
  }
  if (!is_on_device(param)) reject(i, "param", "is on another device than the first one");
  Record& record = records_[i];
  record.param = param.data;
  record.param_dtype = param.dtype;
  record.grad_dtype = param.dtype;  // until a gradient says otherwise
  record.numel = param.numel();
  const KindIndex kind = kind_of(tensor.ptr(), param);
  layouts_[i] = Layout{dims_.size(), param.ndim, static_cast<int32_t>(param_memory_.size()), kind};
  param_memory_.emplace_back(tensor.ptr(), param, kind != kUnknown);
  if (param_memory_.back().impl() == nullptr) {
    in_place_ = false;
    layouts_[i].kind = kUnknown;
  }
  dims_.insert(dims_.end(), param.shape, param.shape + param.ndim);
  dims_.insert(dims_.end(), param.strides, param.strides + param.ndim);
}

TensorView Plan::watched(size_t i, const py::object& tensor, const char* what) {
  TensorView view;
  if (!view_tensor(tensor.ptr(), &view) || !is_on_device(view)) reject(i, what, "has no memory on its device");
  state_memory_.emplace_back(tensor.ptr(), view, true);
  in_place_ = in_place_ && state_memory_.back().impl() != nullptr;
  return view;
}

void Plan::add_step(size_t i, const py::object& tensor) {
  const TensorView step = watched(i, tensor, "step");
  if (!step.dtype_known || step.dtype != Dtype::kF32 || step.numel() != 1) reject(i, "step", "is not one fp32 number");
  records_[i].step = static_cast<float*>(step.data);
}

void Plan::add_matrices(size_t i, const py::object& given) {
  Record& record = records_[i];
  if (!variant_.reduces) {
    if (!given.is_none()) reject(i, "matrices", "are for rules that reduce");
    return;
  }
  Matrices& matrices = record.matrices;
  matrices = Matrices{1, 1, record.numel, false};
  if (!given.is_none()) {
    const auto [batch, rows, columns] = given.cast<std::tuple<int64_t, int64_t, int64_t>>();
    matrices = Matrices{batch, rows, columns, true};
  }
  if (matrices.batch * matrices.rows * matrices.columns != record.numel)
    reject(i, "param", "is not made of these matrices");
  const int64_t* const shape = dims_.data() + layouts_[i].begin;
  if (!contiguous(layouts_[i].ndim, shape, shape + layouts_[i].ndim)) reject(i, "param", "is not contiguous");
}

// Whether bytes lie as `count` elements of the parameter each do: along its memory in a flat tensor if that is
// contiguous, or else along its innermost dimension, in a tensor that has as many times less of that.
bool Plan::has_packed_param(const TensorView& view, size_t i, int64_t count) const {
  const int64_t numel = records_[i].numel;
  const int32_t ndim = layouts_[i].ndim;
  const int64_t *const shape = dims_.data() + layouts_[i].begin, *const strides = shape + ndim;
  if (numel < 2 || view.numel() != (numel + count - 1) / count) return false;
  if (view.ndim == 1) return view.strides[0] == 1 && contiguous(ndim, shape, strides);
  if (view.ndim != ndim) return false;
  for (int32_t d = 0; d < ndim; ++d) {
    if (shape[d] == 1) continue;
    const bool innermost = strides[d] == 1;
    if (view.shape[d] * (innermost ? count : 1) != shape[d]) return false;
    if (view.shape[d] > 1 && view.strides[d] * (innermost ? 1 : count) != strides[d]) return false;
  }
  return true;
}

void Plan::add_states(size_t i, const py::tuple& states) {
  Record& record = records_[i];
  if (states.size() != variant_.state_indices.size()) reject(i, "states", "are not as many as the rule needs");
  for (size_t n = 0; n < states.size(); ++n) {
    const py::object tensor = states[n];
    const int64_t numel = state_numel(variant_.spans[n], record.matrices, record.numel);
    if (tensor.is_none() != (numel < 0)) reject(i, "states", "are not those that the rule needs for it");
    if (numel < 0) continue;
    TensorView state = watched(i, tensor, "state");
    if (!(state.dtype_known || (state.is_code && state.dtype != Dtype::kI16)))
      reject(i, "state", "has a dtype that no kernel knows");
    bool fits = variant_.reduces ? state.numel() == numel && contiguous(state.ndim, state.shape, state.strides)
                                 : has_layout_of_param(state, i);
    for (const int bits : kPackedBits) {
      if (fits || variant_.reduces || state.dtype != Dtype::kU8 || !has_packed_param(state, i, 8 / bits)) continue;
      state.dtype = code_dtype(bits, variant_.codes[n] == Code::kSigned);
      fits = true;
    }
    if (!fits) reject(i, "state", "is laid out differently");
    record.states[variant_.state_indices[n]] = state.data;
    record.state_dtypes[variant_.state_indices[n]] = state.dtype;
  }
}

void Plan::add_weight(size_t i, int given, const py::object& tensor) {
  Record& record = records_[i];
  if (given < 0 || given > static_cast<int>(WeightFormat::kStochastic))
    reject(i, "weight_format", "is none that a kernel knows");
  const WeightFormat weight_format = static_cast<WeightFormat>(given);
  record.precision.weight_format = weight_format;
  if (weight_format != WeightFormat::kPlain &&
      (variant_.reduces || (record.param_dtype != Dtype::kBF16 &&
                            (record.param_dtype != Dtype::kF16 || weight_format == WeightFormat::kSplit))))
    reject(i, "weight_format", "is none that its rule and dtype can have");
  const bool alone = weight_format == WeightFormat::kPlain || weight_format == WeightFormat::kStochastic;
  if (tensor.is_none() != alone) reject(i, "aux", "is missing, or its form takes none");
  if (alone) return;
  const TensorView aux = watched(i, tensor, "aux");
  if (aux.dtype != aux_dtype(weight_format, record.param_dtype) || !(aux.dtype_known || aux.is_code))
    reject(i, "aux", "has another dtype than its form says");
  if (!has_layout_of_param(aux, i)) reject(i, "aux", "is laid out differently");
  record.precision.aux = aux.data;
}

void Plan::add_scales(size_t i, const py::tuple& scales) {
  Record& record = records_[i];
  if (!scales.empty() && scales.size() != variant_.state_indices.size())
    reject(i, "scales", "are not one for each state");
  for (size_t n = 0; n < variant_.state_indices.size(); ++n) {
    const int k = variant_.state_indices[n];
    const py::object tensor = scales.empty() ? py::object(py::none()) : py::object(scales[n]);
    const bool quantized = is_quantized(record.state_dtypes[k]);
    if (tensor.is_none() == quantized)
      reject(i, "scales", "are there for a state that is not quantized, or are missing");
    if (!quantized) continue;
    const TensorView seen = watched(i, tensor, "scales");
    const bool fits = seen.dtype_known && seen.dtype == Dtype::kF32 && seen.ndim == 1 &&
                      (seen.shape[0] <= 1 || seen.strides[0] == 1) &&
                      seen.shape[0] == (record.numel + kBlock - 1) / kBlock;
    if (!fits) reject(i, "scales", "are not one fp32 number for each block");
    if (variant_.reduces || record.param_dtype == Dtype::kF64) reject(i, "states", "cannot be quantized");
    const auto bits = static_cast<uint8_t>(bits_of(record.state_dtypes[k]));
    if (record.precision.state_bits != 0 && record.precision.state_bits != bits)
      reject(i, "states", "are quantized in several ways");
    record.precision.scales[k] = static_cast<float*>(seen.data);
    record.precision.state_bits = bits;
  }
}

void* Plan::add_follower(size_t i, const py::object& tensor, const char* what, Dtype* dtype) {
  if (tensor.is_none()) return nullptr;
  const TensorView view = watched(i, tensor, what);
  if (!fits_param(view, i)) reject(i, what, "is not laid out as the parameter");
  *dtype = view.dtype;
  return view.data;
}

}  // namespace fusedstep
