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
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;

// torch's entry points, looked up once. Never freed: they live as long as the interpreter.
struct Torch {
  PyObject* tensor_type = nullptr;
  const DLExchangeApi* api = nullptr;
  getter grad = nullptr;
  void* grad_closure = nullptr;
  PyObject* increment_version = nullptr;
};

const Torch& torch() {
  static const Torch found = [] {
    Torch t;
    const py::module_ module = py::module_::import("torch");
    py::object tensor_type = module.attr("Tensor");
    t.tensor_type = py::object(tensor_type).release().ptr();
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
    t.increment_version =
        py::object(module.attr("autograd").attr("graph").attr("increment_version")).release().ptr();
    return t;
  }();
  return found;
}

bool set_dtype(uint8_t code, uint8_t bits, TensorView* view) {
  if (code == kDLFloat && bits == 32) {
    view->dtype = Dtype::kF32;
  } else if (code == kDLBfloat && bits == 16) {
    view->dtype = Dtype::kBF16;
  } else if (code == kDLFloat && bits == 16) {
    view->dtype = Dtype::kF16;
  } else if (code == kDLFloat && bits == 64) {
    view->dtype = Dtype::kF64;
  } else {
    view->dtype = Dtype::kF32;
    return false;
  }
  return true;
}

void set_numel(TensorView* view) {
  view->numel = 1;
  for (int32_t i = 0; i < view->ndim; ++i) view->numel *= view->shape[i];
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
  set_numel(view);
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
                                                    : set_dtype(0, 0, view);
    shape = t.attr("shape").cast<std::vector<int64_t>>();
    strides = t.attr("stride")().cast<std::vector<int64_t>>();
  } catch (py::error_already_set&) {
    return false;  // the exception object is released with it
  }
  view->ndim = static_cast<int32_t>(shape.size());
  view->shape = shape.data();
  view->strides = strides.data();
  set_numel(view);
  return true;
}

// Where a tensor's C++ object (its `_cdata`) and its storage's keep their pointers, in words; -1: not known.
struct Slots {
  int storage = -1, data = -1;
};

struct Addresses {
  explicit Addresses(const py::handle& tensor) {
    const py::object untyped = tensor.attr("untyped_storage")();
    impl = reinterpret_cast<const void* const*>(tensor.attr("_cdata").cast<uintptr_t>());
    storage = reinterpret_cast<const void* const*>(untyped.attr("_cdata").cast<uintptr_t>());
    data = reinterpret_cast<const void*>(untyped.attr("data_ptr")().cast<uintptr_t>());
  }
  const void* const* impl;
  const void* const* storage;
  const void* data;
};

int find_word(const void* const* object, int words, const void* value) {
  for (int i = 0; i < words; ++i) {
    if (object[i] == value) return i;
  }
  return -1;
}

// Searched: the first 48 bytes. Both classes are larger in every torch that has these attributes.
constexpr int kSearchedWords = 6;

Slots find_slots() {
  Slots slots;
  try {
    const py::object empty = py::module_::import("torch").attr("empty");
    py::object tensor = empty(3);
    const Addresses before(tensor);
    slots.storage = find_word(before.impl, kSearchedWords, before.storage);
    slots.data = find_word(before.storage, kSearchedWords, before.data);
    const py::object untyped = tensor.attr("untyped_storage")();
    untyped.attr("resize_")(1 << 16);
    const Addresses resized(tensor);
    tensor.attr("data") = empty(5);
    const Addresses moved(tensor);
    const bool proved = slots.storage >= 0 && slots.data >= 0 && resized.data != before.data &&
                        resized.storage == before.storage && resized.storage[slots.data] == resized.data &&
                        moved.impl == before.impl && moved.storage != before.storage &&
                        moved.impl[slots.storage] == moved.storage && moved.storage[slots.data] == moved.data;
    if (!proved) slots = Slots{};
  } catch (py::error_already_set&) {
    slots = Slots{};
  }
  return slots;
}

}  // namespace

MemoryWatch::MemoryWatch(PyObject* tensor, const TensorView& view) : tensor_(tensor), data_(view.data) {
  static const Slots slots = find_slots();
  if (slots.storage < 0) return;
  try {
    const Addresses at{py::handle(tensor)};
    if (at.impl[slots.storage] != at.storage || at.storage[slots.data] != at.data) return;
    storage_slot_ = at.impl + slots.storage;
    storage_ = at.storage;
    data_slot_ = at.storage + slots.data;
    storage_data_ = at.data;
  } catch (py::error_already_set&) {
    return;  // a tensor without a storage is asked through torch
  }
}

bool view_tensor(PyObject* tensor, TensorView* view) {
  const Torch& t = torch();
  return t.api != nullptr ? view_by_exchange_api(*t.api, tensor, view) : view_by_attributes(tensor, view);
}

bool same_layout(const TensorView& a, int32_t ndim, const int64_t* shape, const int64_t* strides) {
  if (a.ndim != ndim) return false;
  for (int32_t i = 0; i < ndim; ++i) {
    if (a.shape[i] != shape[i] || (shape[i] > 1 && a.strides[i] != strides[i])) return false;
  }
  return true;
}

Holds::~Holds() {
  for (void* held : managed_) {
    auto* managed = static_cast<DLManagedTensorVersioned*>(held);
    if (managed->deleter != nullptr) managed->deleter(managed);
  }
}

void Holds::add(PyObject* tensor) {
  const Torch& t = torch();
  if (t.api == nullptr) return;
  DLManagedTensorVersioned* managed = nullptr;
  if (t.api->managed_tensor_from_py_object_no_sync(tensor, &managed) != 0) {
    PyErr_Clear();  // only slower without it
    return;
  }
  managed_.push_back(managed);
}

PyObject* grad_of(PyObject* param) {
  const Torch& t = torch();
  if (t.grad != nullptr) return t.grad(param, t.grad_closure);
  return PyObject_GetAttrString(param, "grad");
}

void increment_versions(const py::list& tensors) {
  if (tensors.empty()) return;
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
