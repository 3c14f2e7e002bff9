#include "plan.h"

#include <structmember.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fusedstep {
namespace {

// A step over so few elements keeps the interpreter lock, for a millisecond at most.
constexpr int64_t kBriefElements = 1 << 22;

}  // namespace

RuleId Plan::rule() const {
  if (variant_.reduces) throw std::invalid_argument("the plan is for a rule that reduces");
  return static_cast<RuleId>(variant_.rule);
}

ReducingRuleId Plan::reducing_rule() const {
  if (!variant_.reduces) throw std::invalid_argument("the plan is for an elementwise rule");
  return static_cast<ReducingRuleId>(variant_.rule);
}

Plan::Plan(const std::string& rule, const std::vector<std::string>& state_names, const py::list& records)
    : variant_(find_variant(rule, state_names)),
      given_(records),
      grad_kinds_(records.size(), kUnknown),
      counters_(records.size(), nullptr),
      records_(records.size()),
      layouts_(records.size(), Layout{0, 0, -1, kUnknown}),
      grads_(records.size(), Grad{nullptr, nullptr, false}) {
  add_records();
  int64_t numel = 0;
  for (const Record& record : records_) numel += record.numel;
  brief_ = device_ == Device::kCuda || numel <= kBriefElements;
}

Plan::KindIndex Plan::kind_of(PyObject* tensor, const TensorView& view) {
  const Words& at = words();
  if (!at.layout_known() || !describes(at.impl_of(tensor), view)) return kUnknown;
  const Impl impl = at.impl_of(tensor);
  const auto same = [&](const SeenKind& seen) { return seen.kind.is_of(at, impl); };
  const auto found = std::find_if(kinds_.begin(), kinds_.end(), same);
  const size_t index = static_cast<size_t>(found - kinds_.begin());
  if (index == kUnknown) return kUnknown;  // so many are not told apart
  if (found == kinds_.end()) kinds_.push_back(SeenKind{Kind::of(at, impl), size_of(view.dtype)});
  return static_cast<KindIndex>(index);
}

Plan::~Plan() {
  release_grads();
}

// How many tensors are looked at together. Torch's objects lie all over the memory and each tells where the next one
// is: parameter, what autograd knows of it, gradient, storage. Of this many the processor asks for the same one at
// once, as long as the loop that reads them does nothing else; to ask ahead in so many words brings nothing beyond
// that.
constexpr size_t kTogether = 16;

void Plan::look(const Words& at, size_t first, size_t end, Sight* sights) const {
  PyObject* const* const owners = reinterpret_cast<PyListObject*>(owners_.ptr())->ob_item;
  const size_t n = end - first;
  Impl known[kTogether];
  for (size_t k = 0; k < n; ++k) {
    const Impl impl = at.impl_of(owners[first + k]);
    known[k] = static_cast<Impl>(impl[at.autograd]);
  }
  for (size_t k = 0; k < n; ++k) {
    const void* const grad = known[k] == nullptr ? nullptr : known[k][at.grad];
    sights[k].grad = grad == at.no_grad ? nullptr : static_cast<Impl>(grad);
  }
  for (size_t k = 0; k < n; ++k)
    sights[k].storage = sights[k].grad == nullptr ? nullptr : static_cast<Impl>(sights[k].grad[at.storage]);
}

FUSEDSTEP_FN bool Plan::looks_like_before(const Words& at, size_t i, const Sight& sight, const void** data) const {
  const KindIndex kind = grad_kinds_[i];
  if (kind == kUnknown || sight.storage == nullptr) return false;
  const SeenKind& seen = kinds_[kind];
  const Layout& layout = layouts_[i];
  if (!seen.kind.is_of(at, sight.grad) || !at.has_dims(sight.grad, layout.ndim, dims_.data() + layout.begin))
    return false;
  const auto* const base = static_cast<const char*>(sight.storage[at.data]);
  if (base == nullptr && records_[i].numel != 0) return false;
  *data = base + static_cast<int64_t>(reinterpret_cast<uintptr_t>(sight.grad[at.offset])) * seen.size;
  return true;
}

FUSEDSTEP_FN bool Plan::param_unchanged(const Words& at, size_t i) const {
  const Layout& layout = layouts_[i];
  if (layout.watch < 0) return false;
  const MemoryWatch& memory = param_memory_[layout.watch];
  if (layout.kind == kUnknown) return memory.unchanged_by_view(layout.ndim, dims_.data() + layout.begin);
  return memory.unchanged(at, layout.ndim, dims_.data() + layout.begin, kinds_[layout.kind].kind);
}

namespace {

// An attribute of DTensors, which are asked for it in every step: read in its slot, if the class has one for it.
class Attribute {
 public:
  explicit Attribute(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  // A borrowed reference: the tensor has it.
  PyObject* of(PyObject* tensor) {
    if (Py_TYPE(tensor) != type_) find_slot(Py_TYPE(tensor));
    if (offset_ >= 0) {
      PyObject* const value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(tensor) + offset_);
      if (value != nullptr) return value;
    }
    PyObject* const value = PyObject_GetAttr(tensor, name_);
    if (value == nullptr) throw py::error_already_set();
    Py_DECREF(value);
    return value;
  }

 private:
  void find_slot(PyTypeObject* type) {
    const py::object slot = py::getattr(reinterpret_cast<PyObject*>(type), name_, py::none());
    const PyMemberDef* const member = Py_TYPE(slot.ptr()) == &PyMemberDescr_Type
                                          ? reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member
                                          : nullptr;
    offset_ = member != nullptr && member->type == T_OBJECT_EX ? member->offset : -1;
    type_ = type;
  }

  PyObject* name_;
  PyTypeObject* type_ = nullptr;
  Py_ssize_t offset_ = -1;
};

struct Attributes {
  Attribute local{"_local_tensor"}, spec{"_spec"};
};

Attributes& attributes() {
  static Attributes found;
  return found;
}

}  // namespace

void Plan::watch_part(int64_t i) {
  const size_t n = static_cast<size_t>(i);
  const py::object owner = owners_[n];
  if (n >= size() || layouts_[n].watch < 0) throw std::invalid_argument("the plan has no memory of this owner");
  const py::object spec = py::reinterpret_borrow<py::object>(attributes().spec.of(owner.ptr()));
  if (!wraps_param(n)) throw std::invalid_argument("the plan's parameter is not what its owner wraps");
  parts_.resize(size());
  parts_[n] = std::make_unique<Part>(
      Part{spec, spec.attr("mesh"), spec.attr("placements"), py::object(owner.attr("shape")), spec});
  all_written_.append(owner);
}

bool Plan::wraps_param(size_t i) const {
  PyObject* const owner = PyList_GET_ITEM(owners_.ptr(), i);
  return attributes().local.of(owner) == PyList_GET_ITEM(params_.ptr(), i);
}

// Nearly always by identity: torch makes one description for all gradients of a parameter, or its very own.
bool Plan::is_such_part(Part& part, PyObject* tensor) {
  PyObject* const found = attributes().spec.of(tensor);
  if (found == part.spec.ptr() || found == part.seen.ptr()) return true;
  const py::object spec = py::reinterpret_borrow<py::object>(found);
  const py::object mesh = spec.attr("mesh"), placements = spec.attr("placements"),
                   shape = py::handle(tensor).attr("shape");
  if (!mesh.is(part.mesh) && !mesh.equal(part.mesh)) return false;
  if (!placements.equal(part.placements) || !shape.equal(part.shape)) return false;
  part.seen = spec;
  return true;
}

PyObject* Plan::part_of(PyObject* grad, size_t i) {
  if (Py_TYPE(grad) != Py_TYPE(PyList_GET_ITEM(owners_.ptr(), i)) || !is_such_part(*parts_[i], grad)) return nullptr;
  PyObject* const local = attributes().local.of(grad);
  const bool plain = Py_TYPE(local) == Py_TYPE(PyList_GET_ITEM(params_.ptr(), i));  // not one still on its way
  return plain ? Py_NewRef(local) : nullptr;
}

// Takes what is inside a DTensor as this step's gradient i, once it was looked at as gather() does. False: it is odd.
bool Plan::take_part(const Words& at, size_t i, PyObject* wrapper) {
  Grad& grad = grads_[i];
  PyObject* const local = part_of(wrapper, i);
  if (local == nullptr) return false;
  if (at.grad_known()) {
    const Impl impl = at.impl_of(local);
    if (looks_like_before(at, i, Sight{impl, static_cast<Impl>(impl[at.storage])}, &grad.data)) {
      Py_XSETREF(grad.tensor, local);
      return true;
    }
  }
  TensorView view;
  if (!view_tensor(local, &view) || !fits_param(view, i)) {
    Py_DECREF(local);
    return false;
  }
  grad.data = view.data;
  set_grad_dtype(i, view.dtype);
  grad_kinds_[i] = kind_of(local, view);
  Py_XSETREF(grad.tensor, local);
  return true;
}

void Plan::set_grad_dtype(size_t i, Dtype dtype) {
  if (records_[i].grad_dtype == dtype) return;
  records_[i].grad_dtype = dtype;
  grad_kinds_[i] = kUnknown;
  ++grad_dtypes_version_;
}

Gathered Plan::gather(bool borrow, const py::object& grads) {
  release_grads();
  if (!grads.is_none() && (borrow || !PyList_Check(grads.ptr()) || py::len(grads) != owners_.size()))
    throw std::invalid_argument("gather() takes a list with one gradient or None for each parameter, to be held");
  unconverted_grads_.clear();
  any_active_ = borrowed_ = false;
  const Words& at = words();
  for (const MemoryWatch& memory : state_memory_) {
    if (!memory.unchanged(at)) return Gathered::kStale;
  }
  const bool borrows = borrow && brief_, looks = borrows && at.grad_known(), counts = in_place_ && at.version_known();
  const bool finds_parts = !parts_.empty() && grads.is_none() && at.python_known();
  Sight sights[kTogether];
  for (size_t i = 0; i < records_.size(); ++i) {
    if (looks && i % kTogether == 0) look(at, i, std::min(i + kTogether, size()), sights);
    Grad& grad = grads_[i];
    if (looks && !is_part(i)) {
      const Sight& sight = sights[i % kTogether];
      if (sight.grad == nullptr) continue;
      if (looks_like_before(at, i, sight, &grad.data)) {
        if (!param_unchanged(at, i)) return Gathered::kStale;
        if (counts) counters_[i] = param_memory_[layouts_[i].watch].impl()[at.version];
        grad.active = any_active_ = borrowed_ = true;
        continue;
      }
    }
    PyObject* const owner = PyList_GET_ITEM(owners_.ptr(), i);
    if (finds_parts && is_part(i)) {  // to ask torch for the gradient of a DTensor takes as long as all the rest
      const Impl found = at.grad_of(at.impl_of(owner));
      if (found == nullptr) continue;
      PyObject* const wrapper = at.python_of(found);
      if (wrapper != nullptr && take_part(at, i, wrapper)) {
        holds_grads_ = grad.active = any_active_ = true;
        if (!param_unchanged(at, i) || !wraps_param(i)) return Gathered::kStale;
        continue;
      }
    }
    grad.tensor = grads.is_none() ? grad_of(owner) : Py_NewRef(PyList_GET_ITEM(grads.ptr(), i));
    if (grad.tensor == nullptr) throw py::error_already_set();
    holds_grads_ = true;
    if (grad.tensor == Py_None) {
      Py_CLEAR(grad.tensor);
      continue;
    }
    grad.active = any_active_ = true;
    if (!param_unchanged(at, i)) return Gathered::kStale;
    if (is_part(i)) {
      if (!wraps_param(i)) return Gathered::kStale;
      if (!take_part(at, i, grad.tensor)) unconverted_grads_.push_back(static_cast<int64_t>(i));
      continue;
    }
    TensorView view;
    if (!view_tensor(grad.tensor, &view) || !fits_param(view, i)) {
      unconverted_grads_.push_back(static_cast<int64_t>(i));
      continue;
    }
    grad.data = view.data;
    set_grad_dtype(i, view.dtype);
    if (borrows) grad_kinds_[i] = kind_of(grad.tensor, view);
  }
  return !borrow && grads_moved() ? Gathered::kMoved : Gathered::kReady;
}

bool Plan::grads_moved() {
  bool moved = false;
  last_grads_.resize(grads_.size());
  for (size_t i = 0; i < grads_.size(); ++i) {
    const std::pair<const void*, Dtype> now{grads_[i].data, records_[i].grad_dtype};
    moved = moved || last_grads_[i] != now;
    last_grads_[i] = now;
  }
  return moved;
}

void Plan::check_borrowed() const {
  if (!borrowed_) return;
  const Words& at = words();
  Sight sights[kTogether];
  for (size_t i = 0; i < grads_.size(); ++i) {
    if (i % kTogether == 0) look(at, i, std::min(i + kTogether, size()), sights);
    if (!grads_[i].active || grads_[i].tensor != nullptr) continue;
    const Sight& sight = sights[i % kTogether];
    const void* data = nullptr;
    if (sight.grad == nullptr || !looks_like_before(at, i, sight, &data) || data != grads_[i].data)
      throw std::runtime_error("a gradient was replaced in another thread during step()");
  }
}

void Plan::drop_grad(int64_t i) {
  Py_CLEAR(grads_.at(i).tensor);
  grads_[i] = Grad{nullptr, nullptr, false};
  any_active_ = std::any_of(grads_.begin(), grads_.end(), [](const Grad& grad) { return grad.active; });
}

void Plan::set_grad(int64_t i, const py::object& grad) {
  TensorView view;
  if (static_cast<size_t>(i) >= size() || !view_tensor(grad.ptr(), &view) || !fits_param(view, i))
    throw std::invalid_argument("gradient " + std::to_string(i) + " is not laid out as the plan's parameter");
  Py_INCREF(grad.ptr());
  Py_XSETREF(grads_[i].tensor, grad.ptr());
  holds_grads_ = true;
  grads_[i].data = view.data;
  grads_[i].active = any_active_ = true;
  set_grad_dtype(i, view.dtype);
}

void Plan::release_grads() {
  for (size_t i = 0; holds_grads_ && i < grads_.size(); ++i) Py_CLEAR(grads_[i].tensor);
  holds_grads_ = false;
  std::fill(grads_.begin(), grads_.end(), Grad{nullptr, nullptr, false});
}

void Plan::increment_written(bool grads_too) const {
  py::list written;
  bool all = true;
  for (size_t i = 0; i < records_.size(); ++i) all = all && active(i);
  if (!all) {
    for (size_t i = 0; i < records_.size(); ++i) {
      if (!active(i)) continue;
      written.append(params_[i]);
      if (is_part(i)) written.append(owners_[i]);
    }
  }
  increment_versions(all ? all_written_ : written);
  if (!grads_too) return;
  py::list grads;
  for (const Grad& grad : grads_) {
    if (grad.tensor != nullptr) grads.append(py::handle(grad.tensor));
  }
  increment_versions(grads);
}

void Plan::increment_seen() const {
  const Words& at = words();
  if (!at.version_known()) return increment_written(false);
  const size_t n = grads_.size();
  const auto prefetch = [&](size_t first) {
    for (size_t i = first; i < std::min(first + kTogether, n); ++i)
      __builtin_prefetch(static_cast<const uint32_t*>(counters_[i]) + at.counter, 1);
  };
  prefetch(0);
  for (size_t i = 0; i < n; ++i) {
    if (i % kTogether == 0) prefetch(i + kTogether);
    if (grads_[i].active) increment_counter(at, counters_[i]);
  }
}

}  // namespace fusedstep
