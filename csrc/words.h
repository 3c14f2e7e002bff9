// Where torch keeps what a plan looks at in every step, found by value. libtorch is neither included nor linked.
#pragma once

#include <Python.h>

#include <cstdint>

namespace fusedstep {

// Torch's own words: a tensor's pointer to its storage, its offset in it, its sizes and so on, and the storage's
// pointer to its data. They are read in place because asking torch costs 20 to 100 ns a tensor. Where they lie is found
// by their values when the package is imported, and proved by changing tensors; where that fails, torch is asked. So is
// where a tensor's version is counted: torch would take a reference to each tensor for that, which it hands to and fro
// between Python and C++.
using Impl = const void* const*;  // a C++ object of torch's, word by word

// In words; -1: not known.
struct Words {
  int64_t object = -1;                 // in a Python tensor, the pointer to its C++ object (its `_cdata`)
  int64_t keys = -1;                   // in that, the dispatch keys
  uint64_t negation = 0;               // the key of a tensor that is negated when it is read, which DLPack keeps quiet
  int64_t storage = -1, data = -1;     // the pointer to the storage, and in that the pointer to the memory
  int64_t offset = -1;                 // of the first number in the storage
  int64_t sizes = -1, strides = -1;    // of tensors with up to max_dims; the number of dimensions is before the sizes
  int64_t max_dims = 0;                // the others keep theirs elsewhere
  int64_t kind = -1;                   // the word with dtype, device and flags
  uintptr_t kind_mask = 0;             // what lies behind them is padding, never written
  int64_t autograd = -1, grad = -1;    // the pointer to what autograd knows, and in that the one to the gradient
  const void* no_grad = nullptr;       // what stands for "no gradient"
  int64_t python = -1;                 // the pointer to the Python object, whose lowest bit says who owns whom
  int64_t version = -1, counter = -1;  // the pointer to the version counter, and the 32-bit number in that

  bool objects_known() const { return object >= 0; }
  bool memory_known() const { return storage >= 0 && objects_known(); }
  bool layout_known() const { return memory_known() && kind >= 0; }
  bool grad_known() const { return layout_known() && grad >= 0; }
  bool python_known() const { return grad_known() && python >= 0; }
  bool version_known() const { return objects_known() && version >= 0; }

  // The C++ object behind a Python tensor; only if it is known where that is.
  Impl impl_of(const void* tensor) const { return static_cast<Impl>(static_cast<Impl>(tensor)[object]); }
  // The Python object of a C++ one, which may be owned by it: not to be kept. Null: it has none.
  PyObject* python_of(Impl impl) const { return untagged(impl[python]); }
  static PyObject* untagged(const void* word) {
    return reinterpret_cast<PyObject*>(reinterpret_cast<uintptr_t>(word) & ~uintptr_t{1});
  }
  // The C++ object of a tensor's gradient; null: there is none. Only if grad_known().
  Impl grad_of(Impl impl) const {
    const auto* const known = static_cast<Impl>(impl[autograd]);
    const void* const found = known == nullptr ? nullptr : known[grad];
    return found == no_grad ? nullptr : static_cast<Impl>(found);
  }
  bool is_negated(Impl impl) const { return (reinterpret_cast<uintptr_t>(impl[keys]) & negation) != 0; }

  // Whether a tensor has these sizes and these strides.
  bool has_dims(Impl impl, int32_t ndim, const int64_t* dims) const {
    const auto* const words = reinterpret_cast<const int64_t*>(impl);
    if (words[sizes - 1] != ndim) return false;
    for (int32_t d = 0; d < ndim; ++d)  // one or two: vectors would take longer to begin than this does to end
      if (words[sizes + d] != dims[d] || words[strides + d] != dims[ndim + d]) return false;
    return true;
  }
};

// What else than sizes and strides tells how a tensor is stored.
struct Kind {
  uintptr_t kind = 0, keys = 0;

  static Kind of(const Words& at, Impl impl) {
    return Kind{reinterpret_cast<uintptr_t>(impl[at.kind]) & at.kind_mask, reinterpret_cast<uintptr_t>(impl[at.keys])};
  }
  bool is_of(const Words& at, Impl impl) const {
    const Kind other = of(at, impl);
    return ((kind ^ other.kind) | (keys ^ other.keys)) == 0;
  }
};

// Found by the first call, which must be that of look_up_torch().
const Words& words();
// The same, looked for anew.
Words find_words();

}  // namespace fusedstep
