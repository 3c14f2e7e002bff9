#include "words.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

namespace fusedstep {
namespace {

namespace py = pybind11;
using namespace py::literals;

struct Addresses {
  explicit Addresses(const py::handle& tensor) {
    const py::object untyped = tensor.attr("untyped_storage")();
    impl = reinterpret_cast<Impl>(tensor.attr("_cdata").cast<uintptr_t>());
    storage = reinterpret_cast<Impl>(untyped.attr("_cdata").cast<uintptr_t>());
    data = reinterpret_cast<const void*>(untyped.attr("data_ptr")().cast<uintptr_t>());
  }
  Impl impl;
  Impl storage;
  const void* data;
};

// How far is searched for pointers, in a tensor for all else, and in a Python object for the pointer to its tensor. The
// classes are at least as large in every torch that has these attributes.
constexpr int kSearchedWords = 6, kTensorWords = 24, kObjectWords = 4, kAutogradWords = 8;
constexpr int kCounterNumbers = 6;  // of 32 bits

int64_t find_word(Impl object, int words, const void* value) {
  for (int64_t i = 0; i < words; ++i) {
    if (object[i] == value) return i;
  }
  return -1;
}

const void* as_word(uint64_t number) {
  return reinterpret_cast<const void*>(static_cast<uintptr_t>(number));
}

py::object torch_module() {
  return py::module_::import("torch");
}

Impl impl_of(const py::object& tensor) {
  return Addresses(tensor).impl;
}

void find_object(Words* found) {
  const py::object torch = torch_module();
  const py::object plain = torch.attr("empty")(3), negated = torch.attr("_neg_view")(plain);
  const auto keys = [&](const py::object& tensor) {
    return torch.attr("_C").attr("_dispatch_keys")(tensor).attr("raw_repr")().cast<uint64_t>();
  };
  const auto object = [](const py::object& tensor) { return reinterpret_cast<Impl>(tensor.ptr()); };
  const Addresses a(plain), b(negated);
  const int64_t slot = find_word(object(plain), kObjectWords, a.impl);
  const int64_t keys_slot = find_word(a.impl, kTensorWords, as_word(keys(plain)));
  const uint64_t bit = keys(plain) ^ keys(negated);
  const bool proved = slot >= 0 && keys_slot >= 0 && (bit & keys(negated)) != 0 && (bit & (bit - 1)) == 0 &&
                      object(negated)[slot] == b.impl && b.impl[keys_slot] == as_word(keys(negated));
  if (!proved) return;
  found->object = slot;
  found->keys = keys_slot;
  found->negation = bit;
}

void find_memory(Words* found) {
  const py::object empty = torch_module().attr("empty");
  py::object tensor = empty(3);
  const Addresses before(tensor);
  const int64_t storage = find_word(before.impl, kSearchedWords, before.storage);
  const int64_t data = find_word(before.storage, kSearchedWords, before.data);
  const py::object untyped = tensor.attr("untyped_storage")();
  untyped.attr("resize_")(1 << 16);
  const Addresses resized(tensor);
  tensor.attr("data") = empty(5);
  const Addresses moved(tensor);
  const py::object part = tensor.attr("new_empty")(90001).attr("narrow")(0, 60013, 3);
  const Addresses first(part);
  const int64_t offset = find_word(first.impl, kTensorWords, as_word(60013));
  part.attr("data") = part.attr("new_empty")(90001).attr("narrow")(0, 50021, 3);
  const Addresses second(part);
  const bool proved = storage >= 0 && data >= 0 && offset >= 0 && first.impl == second.impl &&
                      second.impl[offset] == as_word(50021) && resized.data != before.data &&
                      resized.storage == before.storage && resized.storage[data] == resized.data &&
                      moved.impl == before.impl && moved.storage != before.storage &&
                      moved.impl[storage] == moved.storage && moved.storage[data] == moved.data;
  if (!proved) return;
  found->storage = storage;
  found->data = data;
  found->offset = offset;
}

uintptr_t bits_that_differ(const void* a, const void* b) {
  return reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b);
}

// All bytes up to the last one in which a bit is set.
uintptr_t bytes_to_last(uintptr_t bits) {
  uintptr_t mask = 0;
  for (; bits != 0; bits >>= 8) mask = mask << 8 | 0xff;
  return mask;
}

// The dispatch keys are the last of the words that describe a tensor.
void find_layout(Words* found) {
  if (!found->memory_known()) return;
  const py::object torch = torch_module(), empty = torch.attr("empty");
  const int64_t end = found->keys + 1;
  py::object tensor = empty(50021, 3);
  Impl impl = impl_of(tensor);
  Words at = *found;
  at.sizes = find_word(impl, end, as_word(50021));
  if (at.sizes - 1 <= at.storage || impl[at.sizes - 1] != as_word(2)) return;
  const py::object columns = empty(3, 40009).attr("narrow")(1, 0, 5);
  at.strides = find_word(impl_of(columns), end, as_word(40009));
  at.max_dims = at.strides - at.sizes;
  if (at.max_dims < 2 || at.strides + at.max_dims > end) return;
  py::list shape;
  std::vector<int64_t> dims(2 * at.max_dims, 1);
  for (int64_t d = 0; d < at.max_dims; ++d) shape.append(dims[d] = d + 2);
  for (int64_t d = at.max_dims - 1; d > 0; --d) dims[at.max_dims + d - 1] = dims[at.max_dims + d] * dims[d];
  if (!at.has_dims(impl_of(empty(shape)), static_cast<int32_t>(at.max_dims), dims.data())) return;
  shape.append(7);
  if (impl_of(empty(shape))[at.sizes - 1] != as_word(at.max_dims + 1)) return;

  const auto of_dtype = [&](const char* dtype) { return empty(50021, 3, "dtype"_a = torch.attr(dtype)); };
  const py::object integers = of_dtype("int32");
  const std::vector<const void*> before(impl, impl + end);
  tensor.attr("t_")();  // changes a flag of the same object, and no padding
  if (impl_of(tensor) != impl) return;
  at.kind = at.strides + at.max_dims;
  while (at.kind < end && before[at.kind] == impl_of(integers)[at.kind]) ++at.kind;
  if (at.kind == end) return;
  at.kind_mask = bytes_to_last(bits_that_differ(before[at.kind], impl[at.kind]));
  const Kind kind = Kind::of(at, before.data());
  const int64_t given[] = {50021, 3, 3, 1};
  const auto differs = [&](const py::object& other) {
    return !at.has_dims(impl_of(other), 2, given) || !kind.is_of(at, impl_of(other));
  };
  bool proved = !differs(empty(50021, 3)) && differs(tensor) && differs(empty(50021, 4).attr("narrow")(1, 0, 3)) &&
                differs(empty(50021)) && differs(empty(50021, 3, 1));
  for (const char* dtype : {"bfloat16", "int32", "float64"}) proved = proved && differs(of_dtype(dtype));
  proved = proved && differs(empty(50021, 3, "device"_a = "meta")) && differs(torch.attr("_neg_view")(empty(50021, 3)));
  if (proved) *found = at;
}

void find_grad(Words* found) {
  if (!found->layout_known()) return;
  const py::object empty = torch_module().attr("empty");
  py::object tensor = empty(3), other = empty(3);
  Impl impl = impl_of(tensor);
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
  const auto known_of = [&](const py::object& t) { return static_cast<Impl>(impl_of(t)[autograd]); };
  const py::object first = empty(3), second = empty(3);
  tensor.attr("grad") = first;
  const int64_t grad = find_word(known_of(tensor), kAutogradWords, impl_of(first));
  if (grad < 0) return;
  tensor.attr("grad") = second;
  bool proved = known_of(tensor)[grad] == impl_of(second);
  tensor.attr("grad") = py::none();
  const void* no_grad = known_of(tensor)[grad];
  proved = proved && no_grad == known_of(other)[grad] && no_grad != impl_of(second);
  if (!proved) return;
  found->autograd = autograd;
  found->grad = grad;
  found->no_grad = no_grad;
}

// Also of a gradient that nothing but its parameter holds, whose Python object is then the C++ one's.
void find_python(Words* found) {
  if (!found->grad_known()) return;
  const py::object empty = torch_module().attr("empty"), first = empty(3), second = empty(5);
  int64_t slot = -1;
  for (int i = 0; i < kTensorWords && slot < 0; ++i) {
    if (Words::untagged(impl_of(first)[i]) == first.ptr()) slot = i;
  }
  if (slot < 0) return;
  Words at = *found;
  at.python = slot;
  py::object holder = empty(3);
  holder.attr("requires_grad_")();
  holder.attr("grad") = empty(3);
  const Impl grad = at.grad_of(impl_of(holder));
  if (grad == nullptr) return;
  const PyObject* const seen = at.python_of(grad);
  const py::object asked = holder.attr("grad");
  if (at.python_of(impl_of(second)) == second.ptr() && seen == asked.ptr()) *found = at;
}

// A tensor shares its version counter with what detach() makes of it, not with its `.data`; an inference tensor has
// none. Some words have padding, in which anything may stand: several tensors are asked, each of which has a counter of
// its own.
void find_version(Words* found) {
  if (!found->objects_known()) return;
  constexpr size_t kAsked = 8;
  const py::object torch = torch_module();
  const py::object empty = torch.attr("empty"), bump = torch.attr("autograd").attr("graph").attr("increment_version");
  std::vector<py::object> bases, sharing, others;
  for (size_t k = 0; k < kAsked; ++k) {
    bases.push_back(empty(3));
    sharing.push_back(bases[k].attr("detach")());
    others.push_back(bases[k].attr("data"));
  }
  const auto may_be = [&](int i) {
    std::vector<const void*> seen;
    for (size_t k = 0; k < kAsked; ++k) {
      const void* const word = impl_of(bases[k])[i];
      const void* const other = impl_of(others[k])[i];
      if (word == nullptr || other == nullptr || word == other || word != impl_of(sharing[k])[i]) return false;
      for (const void* const each : {word, other}) {
        if (reinterpret_cast<uintptr_t>(each) % alignof(void*) != 0) return false;
        if (std::find(seen.begin(), seen.end(), each) != seen.end()) return false;
        seen.push_back(each);
      }
    }
    return true;
  };
  int version = -1;
  for (int i = 0; i < kTensorWords; ++i) {
    if (!may_be(i)) continue;
    if (version >= 0) return;
    version = i;
  }
  if (version < 0) return;
  const py::object &base = bases[0], &data = others[0], &other = bases[1];
  const auto number = [&](const py::object& t, int at) {
    return static_cast<const uint32_t*>(impl_of(t)[version])[at];
  };
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
  proved = proved && impl_of(inference)[version] == nullptr;
  if (!proved) return;
  found->version = version;
  found->counter = counter;
}

}  // namespace

Words find_words() {
  Words found;
  for (const auto find : {find_object, find_memory, find_layout, find_grad, find_python, find_version}) {
    try {
      find(&found);
    } catch (py::error_already_set&) {
      continue;  // a torch without these attributes is asked
    }
  }
  return found;
}

const Words& words() {
  static const Words found = find_words();
  return found;
}

}  // namespace fusedstep
