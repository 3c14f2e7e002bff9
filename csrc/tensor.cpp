#include "tensor.h"

#include <stdexcept>
#include <string>

namespace fusedstep {
namespace {

// The parts of DLPack 1.3's C ABI that are used here (dmlc/dlpack, dlpack.h).
struct DLVersion {
  uint32_t major, minor;
};
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensorVersioned {
  DLVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};
struct DLExchangeApi {
  DLVersion version;
  void* previous_api;
  void* managed_tensor_allocator;
  int (*managed_tensor_from_py_object_no_sync)(void* object, DLManagedTensorVersioned** out);
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};
constexpr uint8_t kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4;

// torch's entry points, looked up once. Never freed: they live as long as the interpreter.
struct Torch {
  const DLExchangeApi* api = nullptr;
  getter grad = nullptr;
  void* grad_closure = nullptr;
  PyObject* increment_version = nullptr;
};

Torch find_torch() {
  Torch t;
  const py::module_ module = py::module_::import("torch");
  const py::object tensor_type = module.attr("Tensor");
  if (py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) {
    const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
    const auto* api = static_cast<const DLExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->version.major == 1) t.api = api;
  }
  // A direct call of the C getter skips the attribute lookup along Tensor's classes.
  const py::object base = module.attr("_C").attr("TensorBase");
  PyObject* descriptor = PyDict_GetItemString(reinterpret_cast<PyTypeObject*>(base.ptr())->tp_dict, "grad");
  if (descriptor != nullptr && Py_TYPE(descriptor) == &PyGetSetDescr_Type) {
    const PyGetSetDef* getset = reinterpret_cast<PyGetSetDescrObject*>(descriptor)->d_getset;
    t.grad = getset->get;
    t.grad_closure = getset->closure;
  }
  t.increment_version = py::object(module.attr("autograd").attr("graph").attr("increment_version")).release().ptr();
  return t;
}

const Torch& torch() {
  static const Torch found = find_torch();
  return found;
}

bool set_dtype(uint8_t code, uint8_t bits, TensorView* view) {
  const int kind = code << 8 | bits;
  view->dtype = kind == (kDLBfloat << 8 | 16)  ? Dtype::kBF16
                : kind == (kDLFloat << 8 | 16) ? Dtype::kF16
                : kind == (kDLFloat << 8 | 64) ? Dtype::kF64
                : kind == (kDLInt << 8 | 8)    ? Dtype::kI8
                : kind == (kDLUInt << 8 | 8)   ? Dtype::kU8
                : kind == (kDLInt << 8 | 16)   ? Dtype::kI16
                                               : Dtype::kF32;
  view->is_code = view->dtype >= Dtype::kI8;
  return !view->is_code && (view->dtype != Dtype::kF32 || kind == (kDLFloat << 8 | 32));
}

bool view_by_exchange_api(const DLExchangeApi& api, PyObject* tensor, TensorView* view) {
  DLTensor t;
  if (api.dltensor_from_py_object_no_sync(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  view->data = static_cast<char*>(t.data) + t.byte_offset;
  view->device = t.device_type == 1 ? Device::kCpu : t.device_type == 2 ? Device::kCuda : Device::kOther;
  view->device_index = t.device_id;
  view->dtype_known = t.lanes == 1 && set_dtype(t.code, t.bits, view);
  view->ndim = t.ndim;
  view->shape = t.shape;
  view->strides = t.strides;
  return true;
}

bool view_by_attributes(PyObject* tensor, TensorView* view) {
  // The views of one thread share this memory: each is used before the next is made.
  static thread_local std::vector<int64_t> shape, strides;
  try {
    const py::handle t(tensor);
    view->data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<uintptr_t>());
    const std::string device = py::str(t.attr("device").attr("type"));
    view->device = device == "cpu" ? Device::kCpu : device == "cuda" ? Device::kCuda : Device::kOther;
    const py::object index = t.attr("device").attr("index");
    view->device_index = index.is_none() ? 0 : index.cast<int32_t>();
    const std::string dtype = py::str(t.attr("dtype"));
    view->dtype_known = dtype == "torch.float32"    ? set_dtype(kDLFloat, 32, view)
                        : dtype == "torch.bfloat16" ? set_dtype(kDLBfloat, 16, view)
                        : dtype == "torch.float16"  ? set_dtype(kDLFloat, 16, view)
                        : dtype == "torch.float64"  ? set_dtype(kDLFloat, 64, view)
                        : dtype == "torch.int8"     ? set_dtype(kDLInt, 8, view)
                        : dtype == "torch.uint8"    ? set_dtype(kDLUInt, 8, view)
                        : dtype == "torch.int16"    ? set_dtype(kDLInt, 16, view)
                                                    : set_dtype(0, 0, view);
    shape = t.attr("shape").cast<std::vector<int64_t>>();
    strides = t.attr("stride")().cast<std::vector<int64_t>>();
  } catch (py::error_already_set&) {
    return false;  // the exception object is released with it
  }
  view->ndim = static_cast<int32_t>(shape.size());
  view->shape = shape.data();
  view->strides = strides.data();
  return true;
}

}  // namespace

void look_up_torch() {
  torch();
  words();
}

MemoryWatch::MemoryWatch(PyObject* tensor, const TensorView& view, bool in_place)
    : tensor_(tensor), data_(view.data), dtype_(view.dtype) {
  const Words& at = words();
  if (!in_place || !at.memory_known()) return;
  try {
    const Impl impl = at.impl_of(tensor);
    const py::object untyped = py::handle(tensor).attr("untyped_storage")();
    const auto storage = reinterpret_cast<Impl>(untyped.attr("_cdata").cast<uintptr_t>());
    const auto data = reinterpret_cast<const void*>(untyped.attr("data_ptr")().cast<uintptr_t>());
    const bool found = reinterpret_cast<uintptr_t>(impl) == py::handle(tensor).attr("_cdata").cast<uintptr_t>();
    if (!found || impl[at.storage] != storage || storage[at.data] != data) return;
    impl_ = impl;
    storage_ = storage;
    offset_ = impl[at.offset];
    data_ = data;
  } catch (py::error_already_set&) {
    return;  // a tensor without a storage is asked through torch
  }
}

bool MemoryWatch::unchanged_by_view(int32_t ndim, const int64_t* dims) const {
  TensorView view;
  if (!view_tensor(tensor_, &view) || view.data != data_ || view.dtype != dtype_) return false;
  if (!view.dtype_known && !view.is_code) return false;
  return dims == nullptr || same_layout(view, ndim, dims, dims + ndim);
}

bool describes(Impl impl, const TensorView& view) {
  const Words& at = words();
  if (!at.layout_known() || !view.dtype_known || view.ndim > at.max_dims) return false;
  const auto* const numbers = reinterpret_cast<const int64_t*>(impl);
  return view.ndim == 0 || (view.shape == numbers + at.sizes && view.strides == numbers + at.strides);
}

namespace {

// Whether a tensor's storage holds memory. The storage of a wrapper subclass does not, nor does one that was resized to
// nothing: torch then gives the tensor's offset in it as the address.
bool storage_has_memory(PyObject* tensor) {
  const Words& at = words();
  if (!at.memory_known()) {
    try {
      return py::handle(tensor).attr("untyped_storage")().attr("data_ptr")().cast<uintptr_t>() != 0;
    } catch (py::error_already_set&) {
      return false;
    }
  }
  const auto* storage = static_cast<Impl>(at.impl_of(tensor)[at.storage]);
  return storage != nullptr && storage[at.data] != nullptr;
}

// Whether a tensor's numbers are those in memory with the sign turned around, as in the imaginary part of a conjugate.
bool is_negated(PyObject* tensor) {
  const Words& at = words();
  if (at.objects_known()) return at.is_negated(at.impl_of(tensor));
  const py::object result = py::handle(tensor).attr("is_neg")();
  return result.cast<bool>();
}

}  // namespace

bool view_tensor(PyObject* tensor, TensorView* view) {
  const Torch& t = torch();
  const bool found = t.api != nullptr ? view_by_exchange_api(*t.api, tensor, view) : view_by_attributes(tensor, view);
  return found && (view->numel() == 0 || storage_has_memory(tensor)) && !is_negated(tensor);
}

PyObject* grad_of(PyObject* param) {
  const Torch& t = torch();
  if (t.grad != nullptr) return t.grad(param, t.grad_closure);
  return PyObject_GetAttrString(param, "grad");
}

void increment_versions(const py::list& tensors) {
  if (tensors.empty()) return;
  if (const Words& at = words(); at.version_known()) {
    for (const py::handle tensor : tensors) increment_counter(at, at.impl_of(tensor.ptr())[at.version]);
    return;
  }
  const py::object result =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch().increment_version, tensors.ptr()));
  if (!result) throw py::error_already_set();
}

void* current_stream(int32_t device_index) {
  const Torch& t = torch();
  if (t.api != nullptr) {
    void* stream = nullptr;
    if (t.api->current_work_stream(static_cast<int32_t>(Device::kCuda), device_index, &stream) != 0)
      throw py::error_already_set();
    return stream;
  }
  const py::object stream = py::module_::import("torch").attr("cuda").attr("current_stream")(device_index);
  return reinterpret_cast<void*>(stream.attr("cuda_stream").cast<uintptr_t>());
}

double to_double(PyObject* number) {
  const double value = PyFloat_AsDouble(number);  // calls __float__ of a tensor
  if (value == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

bool has_exchange_api() {
  return torch().api != nullptr;
}

}  // namespace fusedstep
