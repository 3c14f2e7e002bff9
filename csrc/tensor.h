// What this extension needs of torch tensors: address, dtype, device, layout, gradient, version counter.
// It goes through the DLPack C exchange API (torch >= 2.10), or through Python attributes where that is missing;
// libtorch is neither included nor linked, so one binary serves every torch version.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "numeric.h"

namespace fusedstep {

namespace py = pybind11;

enum class Device : int32_t { kCpu = 1, kCuda = 2, kOther = 0 };

struct TensorView {
  void* data;
  Device device;
  int32_t device_index;
  bool dtype_known;  // one of Dtype, and a number by itself
  bool is_code;      // one of Dtype, but no number by itself
  Dtype dtype;
  int32_t ndim;
  const int64_t* shape;
  const int64_t* strides;  // in elements; shape and strides are the tensor's own memory

  int64_t numel() const {
    int64_t product = 1;
    for (int32_t i = 0; i < ndim; ++i) product *= shape[i];
    return product;
  }
};

// Learns what the functions below need of torch. To be called once, while the package is imported: the interpreter may
// switch threads in it, and the lock around a static variable's first use would then never be released.
void look_up_torch();

// False (and no Python error) for what has no plain memory: sparse, meta, wrapper subclasses, storages without memory,
// lazily negated tensors and lazy zeros.
bool view_tensor(PyObject* tensor, TensorView* view);

// Same elements at the same offsets: strides of dimensions with one element do not count.
inline bool same_layout(const TensorView& a, int32_t ndim, const int64_t* shape, const int64_t* strides) {
  if (a.ndim != ndim) return false;
  for (int32_t i = 0; i < ndim; ++i) {
    if (a.shape[i] != shape[i] || (shape[i] > 1 && a.strides[i] != strides[i])) return false;
  }
  return true;
}

// The three classes below read torch's own words - a tensor's pointer to its storage, its offset in it, its sizes,
// dtype and so on, and the storage's pointer to its data - because asking torch costs 20 to 100 ns a tensor. Where
// these words lie is found by their values when the package is imported, and proved by changing tensors; where that
// fails, torch is asked. So is where a tensor's version is counted: torch would take a reference to each tensor for
// that, which it hands to and fro between Python and C++.

// Tells at the cost of some loads whether a tensor still has the memory, and if asked the layout and dtype, that it had
// when this was made, as parameters and states nearly always do. The Python object must be kept alive, and no more: a
// reference to its C++ object would be counted by torch.utils.swap_tensors, which exchanges these between two Python
// objects. Nothing behind a C++ object is read before it is known to be still this Python object's.
class MemoryWatch {
 public:
  MemoryWatch(PyObject* tensor, const TensorView& view, bool with_layout);
  bool unchanged() const {
    if (impl_slot_ == nullptr) return unchanged_by_view();
    return *impl_slot_ == impl_ && *storage_slot_ == storage_ && *offset_slot_ == offset_ &&
           *data_slot_ == storage_data_ && std::equal(layout_.begin(), layout_.end(), layout_slots_);
  }

 private:
  bool unchanged_by_view() const;

  PyObject* tensor_;
  const void* data_;
  const void* const* impl_slot_ = nullptr;
  const void* const* storage_slot_ = nullptr;
  const void* const* offset_slot_ = nullptr;
  const void* const* data_slot_ = nullptr;
  const void* const* layout_slots_ = nullptr;
  const void* impl_ = nullptr;
  const void* storage_ = nullptr;
  const void* offset_ = nullptr;
  const void* storage_data_ = nullptr;
  std::vector<const void*> layout_;  // torch's words for it
  Dtype dtype_;
  std::vector<int64_t> dims_;  // shape and strides, where torch's words are not known
};

// Finds the gradient of a parameter without making the Python object for it that `.grad` makes, if it has the layout
// and dtype of one seen before.
class GradWatch {
 public:
  enum class Seen { kNone, kLikeBefore, kUnknown };

  // Remembers how a gradient looks, if torch's words for that are known.
  void remember(PyObject* grad, const TensorView& view);
  // What `.grad` is now; `data` is set if it looks as the remembered one. The gradient is not held: whoever keeps the
  // address must keep the interpreter lock too.
  Seen look(PyObject* param, const void** data) const;
  Dtype dtype() const { return dtype_; }

 private:
  std::vector<const void*> layout_;
  int64_t offset_ = 0;  // of the first number from the storage's data, in bytes
  bool empty_ = false;
  Dtype dtype_ = Dtype::kF32;
};

// `.grad` as a new reference: None, or a tensor. Null with a Python error set if reading it failed.
PyObject* grad_of(PyObject* param);

// Adds one to the version counter of each tensor of a list, as an in-place operation would.
void increment_versions(const py::list& tensors);

// The stream that torch works on for a CUDA device, as an address.
void* current_stream(int32_t device_index);

// A hyperparameter from a Python number, or from a one-element CPU tensor.
double to_double(PyObject* number);

bool has_exchange_api();

}  // namespace fusedstep
