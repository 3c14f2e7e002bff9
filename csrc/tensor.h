// What this extension needs of torch tensors: address, dtype, device, layout, gradient, version counter.
// It goes through the DLPack C exchange API (torch >= 2.10), or through Python attributes where that is missing;
// libtorch is neither included nor linked, so one binary serves every torch version.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "numeric.h"
#include "words.h"

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

// Tells at the cost of some loads whether a tensor still has the memory that it had when this was made, as parameters
// and states nearly always do. The Python object must be kept alive, and no more: a reference to its C++ object would
// be counted by torch.utils.swap_tensors, which exchanges these between two Python objects. Nothing behind a C++ object
// is read before it is known to be still this Python object's.
class MemoryWatch {
 public:
  // in_place: torch's words may be read, else torch is asked.
  MemoryWatch(PyObject* tensor, const TensorView& view, bool in_place);
  bool unchanged(const Words& at) const {
    if (impl_ == nullptr) return unchanged_by_view(0, nullptr);
    return at.impl_of(tensor_) == impl_ && impl_[at.storage] == storage_ && impl_[at.offset] == offset_ &&
           storage_[at.data] == data_;
  }
  // The same, and whether it still has this layout and is of this kind; only where impl() is known.
  bool unchanged(const Words& at, int32_t ndim, const int64_t* dims, const Kind& kind) const {
    return unchanged(at) && kind.is_of(at, impl_) && at.has_dims(impl_, ndim, dims);
  }
  // What torch itself says; dims: null, or the layout that it must have.
  bool unchanged_by_view(int32_t ndim, const int64_t* dims) const;
  Impl impl() const { return impl_; }  // null: not known

 private:
  PyObject* tensor_;
  Impl impl_ = nullptr;
  Impl storage_ = nullptr;
  const void* offset_ = nullptr;
  const void* data_;  // the storage's; of a tensor that torch is asked about, its own
  Dtype dtype_;
};

// Whether torch's words for a tensor hold its sizes and strides themselves, and these are the view's.
bool describes(Impl impl, const TensorView& view);

// `.grad` as a new reference: None, or a tensor. Null with a Python error set if reading it failed.
PyObject* grad_of(PyObject* param);

// Adds one to the version that Words::version points to; an inference tensor has none.
inline void increment_counter(const Words& at, const void* version) {
  if (version == nullptr) return;
  auto* number = const_cast<uint32_t*>(static_cast<const uint32_t*>(version) + at.counter);
  __atomic_fetch_add(number, 1, __ATOMIC_SEQ_CST);
}

// Adds one to the version counter of each tensor of a list, as an in-place operation would.
void increment_versions(const py::list& tensors);

// The stream that torch works on for a CUDA device, as an address.
void* current_stream(int32_t device_index);

// A hyperparameter from a Python number, or from a one-element CPU tensor.
double to_double(PyObject* number);

bool has_exchange_api();

}  // namespace fusedstep
