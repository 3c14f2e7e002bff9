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

// Where a tensor's C++ object (its `_cdata`) keeps the pointer to its storage, the offset in it, its layout and dtype
// (sizes, strides, number of elements, dtype, device and dispatch keys: all words from `layout` to `layout_end`) and
// the pointer to what autograd knows of it; where that has the gradient; where a storage has the pointer to its data; and
// where a tensor's version is. In words; -1: not known.
struct Slots {
  int storage = -1, data = -1, offset = -1;
  int layout = -1, layout_end = -1;
  int kind = -1;  // the word with dtype, device and flags: what lies behind them is padding, never written
  uintptr_t kind_mask = 0;
  int autograd = -1, grad = -1;
  const void* no_grad = nullptr;   // what stands for "no gradient"
  int version = -1, counter = -1;  // the pointer to the version counter, and the 32-bit number in that

  bool layout_known() const { return storage >= 0 && layout >= 0; }
  bool grad_known() const { return layout_known() && grad >= 0; }
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

// How far is searched for pointers, in a tensor for all else, and in a Python object for the pointer to its tensor. The
// classes are at least as large in every torch that has these attributes.
constexpr int kSearchedWords = 6, kTensorWords = 24, kObjectWords = 4, kAutogradWords = 8;
constexpr int kCounterNumbers = 6;  // of 32 bits

const void* as_word(uint64_t number) {
  return reinterpret_cast<const void*>(static_cast<uintptr_t>(number));
}

void find_memory(Slots* found) {
  Slots& slots = *found;
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
    const py::object part = tensor.attr("new_empty")(90001).attr("narrow")(0, 60013, 3);
    const Addresses first(part);
    slots.offset = find_word(first.impl, kTensorWords, as_word(60013));
    part.attr("data") = part.attr("new_empty")(90001).attr("narrow")(0, 50021, 3);
    const Addresses second(part);
    const bool proved = slots.storage >= 0 && slots.data >= 0 && slots.offset >= 0 && first.impl == second.impl &&
                        second.impl[slots.offset] == as_word(50021) && resized.data != before.data &&
                        resized.storage == before.storage && resized.storage[slots.data] == resized.data &&
                        moved.impl == before.impl && moved.storage != before.storage &&
                        moved.impl[slots.storage] == moved.storage && moved.storage[slots.data] == moved.data;
    if (!proved) slots = Slots{};
  } catch (py::error_already_set&) {
    slots = Slots{};
  }
}

// Tells whether a tensor's numbers are those in memory with the sign turned around, as in the imaginary part of a
// conjugate. DLPack does not tell; torch keeps it in one bit of the tensor, found like the slots above.
class Negation {
 public:
  Negation() {
    try {
      const py::module_ torch = py::module_::import("torch");
      const py::object plain = torch.attr("empty")(3), negated = torch.attr("_neg_view")(plain);
      const auto keys = [&](const py::object& tensor) {
        return torch.attr("_C").attr("_dispatch_keys")(tensor).attr("raw_repr")().cast<uint64_t>();
      };
      const auto words = [](const py::object& object) { return reinterpret_cast<const void* const*>(object.ptr()); };
      const Addresses a(plain), b(negated);
      object_slot_ = find_word(words(plain), kObjectWords, a.impl);
      keys_slot_ = find_word(a.impl, kTensorWords, as_word(keys(plain)));
      mask_ = keys(plain) ^ keys(negated);
      known_ = object_slot_ >= 0 && keys_slot_ >= 0 && (mask_ & keys(negated)) != 0 && (mask_ & (mask_ - 1)) == 0 &&
               words(negated)[object_slot_] == b.impl && b.impl[keys_slot_] == as_word(keys(negated));
    } catch (py::error_already_set&) {
      known_ = false;
    }
  }
  bool of(PyObject* tensor) const {
    if (!known_) {
      const py::object result = py::handle(tensor).attr("is_neg")();
      return result.cast<bool>();
    }
    return (reinterpret_cast<uintptr_t>(impl_of(tensor)[keys_slot_]) & mask_) != 0;
  }
  bool known() const { return known_; }
  int keys_slot() const { return keys_slot_; }
  // The C++ object behind a Python tensor, and where that keeps it; only if known().
  const void* const* impl_slot_of(PyObject* tensor) const {
    return reinterpret_cast<const void* const*>(tensor) + object_slot_;
  }
  const void* const* impl_of(PyObject* tensor) const {
    return static_cast<const void* const*>(*impl_slot_of(tensor));
  }

 private:
  int object_slot_ = -1, keys_slot_ = -1;
  uint64_t mask_ = 0;
  bool known_ = false;
};

const Negation& negation() {
  static const Negation found;
  return found;
}

uintptr_t bits_that_differ(const void* a, const void* b) {
  return reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b);
}

// `layout` holds the words from at.layout on of some tensor.
bool same_layout_words(const Slots& at, const std::vector<const void*>& layout, const void* const* impl) {
  const auto kind = layout.begin() + (at.kind - at.layout);
  return (bits_that_differ(*kind, impl[at.kind]) & at.kind_mask) == 0 &&
         std::equal(layout.begin(), kind, impl + at.layout) && std::equal(kind + 1, layout.end(), impl + at.kind + 1);
}

// All bytes up to the last one in which a bit is set.
uintptr_t bytes_to_last(uintptr_t bits) {
  uintptr_t mask = 0;
  for (; bits != 0; bits >>= 8) mask = mask << 8 | 0xff;
  return mask;
}

// The dispatch keys are the last of the words that describe a tensor.
void find_layout(Slots* slots) {
  if (slots->storage < 0 || !negation().known()) return;
  try {
    const py::object torch = py::module_::import("torch"), empty = torch.attr("empty");
    py::object tensor = empty(50021, 3);
    const auto words = [](const py::object& t) { return Addresses(t).impl; };
    const void* const* impl = words(tensor);
    const int end = negation().keys_slot() + 1;
    int begin = find_word(impl, end, as_word(50021)) - 1;  // the number of dimensions comes before the sizes
    if (begin <= slots->storage || slots->offset < begin || slots->offset >= end || impl[begin] != as_word(2)) return;
    using namespace py::literals;
    const auto of_dtype = [&](const char* dtype) { return empty(50021, 3, "dtype"_a = torch.attr(dtype)); };
    const py::object integers = of_dtype("int32");
    const std::vector<const void*> before(impl + begin, impl + end);
    tensor.attr("t_")();  // changes a flag of the same object, and no padding
    if (words(tensor) != impl) return;
    Slots found = *slots;
    found.layout = begin;
    found.layout_end = end;
    found.kind = begin;
    while (found.kind < end && before[found.kind - begin] == words(integers)[found.kind]) ++found.kind;
    if (found.kind == end) return;
    found.kind_mask = bytes_to_last(bits_that_differ(before[found.kind - begin], impl[found.kind]));
    const auto differs = [&](const py::object& other) { return !same_layout_words(found, before, words(other)); };
    bool proved = !differs(empty(50021, 3)) && differs(tensor) && differs(empty(50021, 4).attr("narrow")(1, 0, 3));
    for (const char* dtype : {"bfloat16", "int32", "float64"}) proved = proved && differs(of_dtype(dtype));
    proved =
        proved && differs(empty(50021, 3, "device"_a = "meta")) && differs(torch.attr("_neg_view")(empty(50021, 3)));
    if (proved) *slots = found;
  } catch (py::error_already_set&) {
    return;
  }
}

void find_grad(Slots* slots) {
  if (!slots->layout_known()) return;
  try {
    const py::object empty = py::module_::import("torch").attr("empty");
    py::object tensor = empty(3), other = empty(3);
    const void* const* impl = Addresses(tensor).impl;
    const std::vector<const void*> before(impl, impl + kSearchedWords);
    tensor.attr("requires_grad_")();
    other.attr("requires_grad_")();
    int autograd = -1;
    for (int i = 0; i < kSearchedWords; ++i) {
      if (impl[i] == before[i]) continue;
      if (before[i] != nullptr || autograd >= 0) return;
      autograd = i;
    }
    if (autograd < 0) return;
    const auto known_of = [&](const py::object& t) {
      return static_cast<const void* const*>(Addresses(t).impl[autograd]);
    };
    const py::object first = empty(3), second = empty(3);
    tensor.attr("grad") = first;
    const int grad = find_word(known_of(tensor), kAutogradWords, Addresses(first).impl);
    if (grad < 0) return;
    tensor.attr("grad") = second;
    bool proved = known_of(tensor)[grad] == Addresses(second).impl;
    tensor.attr("grad") = py::none();
    const void* no_grad = known_of(tensor)[grad];
    proved = proved && no_grad == known_of(other)[grad] && no_grad != Addresses(second).impl;
    if (!proved) return;
    slots->autograd = autograd;
    slots->grad = grad;
    slots->no_grad = no_grad;
  } catch (py::error_already_set&) {
    return;
  }
}

// A tensor shares its version counter with what detach() makes of it, not with its `.data`; an inference tensor has none.
void find_version(Slots* slots) {
  if (!negation().known()) return;
  try {
    const py::module_ torch = py::module_::import("torch");
    const py::object empty = torch.attr("empty"), bump = torch.attr("autograd").attr("graph").attr("increment_version");
    const py::object base = empty(3), detached = base.attr("detach")(), data = base.attr("data"), other = empty(3);
    const auto words = [](const py::object& t) { return Addresses(t).impl; };
    int version = -1;
    for (int i = 0; i < kTensorWords; ++i) {
      const void* word = words(base)[i];
      const bool shared = word != nullptr && word == words(detached)[i] && word != words(data)[i];
      if (!shared || words(data)[i] == nullptr) continue;
      if (version >= 0) return;
      version = i;
    }
    if (version < 0 || reinterpret_cast<uintptr_t>(words(base)[version]) % alignof(void*) != 0) return;
    const auto number = [&](const py::object& t, int at) { return static_cast<const uint32_t*>(words(t)[version])[at]; };
    for (int i = 0; i < 1000; ++i) bump(base);
    int counter = -1;
    for (int at = 0; at < kCounterNumbers; ++at) {
      if (number(base, at) == 1000) counter = at;
    }
    if (counter < 0) return;
    bool proved = base.attr("_version").cast<uint32_t>() == 1000 && number(data, counter) == 0;
    for (uint32_t i = 0; i < 3; ++i) {
      proved = proved && number(other, counter) == i && other.attr("_version").cast<uint32_t>() == i;
      other.attr("zero_")();
    }
    const py::object mode = torch.attr("inference_mode")();
    mode.attr("__enter__")();
    const py::object inference = empty(3);
    mode.attr("__exit__")(py::none(), py::none(), py::none());
    proved = proved && words(inference)[version] == nullptr;
    if (!proved) return;
    slots->version = version;
    slots->counter = counter;
  } catch (py::error_already_set&) {
    return;
  }
}

Slots find_slots() {
  Slots slots;
  find_memory(&slots);
  find_layout(&slots);
  find_grad(&slots);
  find_version(&slots);
  return slots;
}

const Slots& slots() {
  static const Slots found = find_slots();
  return found;
}

// Whether torch's words of a tensor hold its sizes and strides themselves, which tensors of many dimensions keep
// elsewhere.
bool describes(const void* const* impl, const TensorView& view) {
  const Slots& at = slots();
  if (!at.layout_known() || !view.dtype_known) return false;
  const auto inside = [&](const int64_t* dims) {
    const auto address = reinterpret_cast<uintptr_t>(dims);
    return address >= reinterpret_cast<uintptr_t>(impl + at.layout) &&
           address + view.ndim * sizeof(int64_t) <= reinterpret_cast<uintptr_t>(impl + at.layout_end);
  };
  return view.ndim == 0 || (inside(view.shape) && inside(view.strides));
}

}  // namespace

void look_up_torch() {
  torch();
  negation();
  slots();
}

MemoryWatch::MemoryWatch(PyObject* tensor, const TensorView& view, bool with_layout)
    : tensor_(tensor), data_(view.data), dtype_(view.dtype) {
  if (with_layout) {
    dims_.assign(view.shape, view.shape + view.ndim);
    dims_.insert(dims_.end(), view.strides, view.strides + view.ndim);
  }
  const Slots& at_word = slots();
  if (at_word.storage < 0 || !negation().known()) return;
  try {
    const Addresses at{py::handle(tensor)};
    if (negation().impl_of(tensor) != at.impl) return;
    if (at.impl[at_word.storage] != at.storage || at.storage[at_word.data] != at.data) return;
    if (with_layout) {
      if (!describes(at.impl, view)) return;
      layout_slots_ = at.impl + at_word.layout;
      layout_.assign(layout_slots_, at.impl + at_word.layout_end);
    }
    impl_slot_ = negation().impl_slot_of(tensor);
    impl_ = at.impl;
    storage_slot_ = at.impl + at_word.storage;
    storage_ = at.storage;
    offset_slot_ = at.impl + at_word.offset;
    offset_ = *offset_slot_;
    data_slot_ = at.storage + at_word.data;
    storage_data_ = at.data;
  } catch (py::error_already_set&) {
    return;  // a tensor without a storage is asked through torch
  }
}

bool MemoryWatch::unchanged_by_view() const {
  TensorView view;
  if (!view_tensor(tensor_, &view) || view.data != data_ || view.dtype != dtype_) return false;
  if (!view.dtype_known && !view.is_code) return false;
  const size_t ndim = dims_.size() / 2;
  return dims_.empty() || same_layout(view, static_cast<int32_t>(ndim), dims_.data(), dims_.data() + ndim);
}

void GradWatch::remember(PyObject* grad, const TensorView& view) {
  layout_.clear();
  const Slots& at = slots();
  if (!at.grad_known()) return;
  const void* const* impl = negation().impl_of(grad);
  const auto* storage = static_cast<const void* const*>(impl[at.storage]);
  if (!describes(impl, view) || storage == nullptr) return;
  const auto* base = static_cast<const char*>(storage[at.data]);
  offset_ = static_cast<int64_t>(reinterpret_cast<uintptr_t>(impl[at.offset])) * size_of(view.dtype);
  empty_ = view.numel() == 0;
  if (!empty_ && (base == nullptr || base + offset_ != view.data)) return;
  dtype_ = view.dtype;
  layout_.assign(impl + at.layout, impl + at.layout_end);
}

GradWatch::Seen GradWatch::look(PyObject* param, const void** data) const {
  if (layout_.empty()) return Seen::kUnknown;
  const Slots& at = slots();
  const auto* autograd = static_cast<const void* const*>(negation().impl_of(param)[at.autograd]);
  if (autograd == nullptr) return Seen::kNone;
  const auto* grad = static_cast<const void* const*>(autograd[at.grad]);
  if (grad == at.no_grad) return Seen::kNone;
  if (!same_layout_words(at, layout_, grad)) return Seen::kUnknown;
  const auto* storage = static_cast<const void* const*>(grad[at.storage]);
  const auto* base = static_cast<const char*>(storage[at.data]);
  if (base == nullptr && !empty_) return Seen::kUnknown;
  *data = empty_ ? nullptr : base + offset_;
  return Seen::kLikeBefore;
}

namespace {

// Whether a tensor's storage holds memory. The storage of a wrapper subclass does not, nor does one that was resized to
// nothing: torch then gives the tensor's offset in it as the address.
bool storage_has_memory(PyObject* tensor) {
  const Slots& at = slots();
  if (at.storage < 0 || !negation().known()) {
    try {
      return py::handle(tensor).attr("untyped_storage")().attr("data_ptr")().cast<uintptr_t>() != 0;
    } catch (py::error_already_set&) {
      return false;
    }
  }
  const auto* storage = static_cast<const void* const*>(negation().impl_of(tensor)[at.storage]);
  return storage != nullptr && storage[at.data] != nullptr;
}

}  // namespace

bool view_tensor(PyObject* tensor, TensorView* view) {
  const Torch& t = torch();
  const bool found = t.api != nullptr ? view_by_exchange_api(*t.api, tensor, view) : view_by_attributes(tensor, view);
  return found && (view->numel() == 0 || storage_has_memory(tensor)) && !negation().of(tensor);
}

PyObject* grad_of(PyObject* param) {
  const Torch& t = torch();
  if (t.grad != nullptr) return t.grad(param, t.grad_closure);
  return PyObject_GetAttrString(param, "grad");
}

void increment_versions(const py::list& tensors) {
  if (tensors.empty()) return;
  if (const Slots& at = slots(); at.version >= 0) {
    for (const py::handle tensor : tensors) {
      const void* counter = negation().impl_of(tensor.ptr())[at.version];
      if (counter == nullptr) continue;  // an inference tensor
      auto* version = const_cast<uint32_t*>(static_cast<const uint32_t*>(counter) + at.counter);
      __atomic_fetch_add(version, 1, __ATOMIC_SEQ_CST);
    }
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
