#include "plan.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>

namespace fusedstep {
namespace {

template <class Rule>
bool matches(const std::string& name, const std::vector<std::string>& state_names, Variant* variant) {
  if (name != Rule::kName) return false;
  variant->n_hyper = static_cast<int>(std::size(Rule::kHyper));
  for (int k = 0; k < kNamed<Rule>; ++k) {
    if (has_state<Rule>(k)) variant->places.push_back(k);
  }
  return std::equal(state_names.begin(), state_names.end(), variant->places.begin(), variant->places.end(),
                    [](const std::string& given, int k) { return given == Rule::kStateNames[k]; });
}

Variant find_variant(const std::string& name, const std::vector<std::string>& state_names) {
  for (int id = 0; id < static_cast<int>(RuleId::kCount); ++id) {
    Variant variant{false, id, 0, {}, {}};
    const bool found = visit_rule(static_cast<RuleId>(id),
                                  [&](auto rule) { return matches<decltype(rule)>(name, state_names, &variant); });
    variant.spans.assign(variant.places.size(), Span::kElement);
    if (found) return variant;
  }
  for (int id = 0; id < static_cast<int>(ReducingRuleId::kCount); ++id) {
    Variant variant{true, id, 0, {}, {}};
    const bool found = visit_reducing_rule(static_cast<ReducingRuleId>(id), [&](auto rule) {
      if (!matches<decltype(rule)>(name, state_names, &variant)) return false;
      for (const int k : variant.places) variant.spans.push_back(decltype(rule)::kSpans[k]);
      return true;
    });
    if (found) return variant;
  }
  std::string states;
  for (const std::string& state : state_names) states += " " + state;
  throw std::invalid_argument("no rule '" + name + "' with these states:" + states);
}

// A step over so few elements keeps the interpreter lock, for a millisecond at most.
constexpr int64_t kBriefElements = 1 << 22;

[[noreturn]] void reject(size_t i, const char* what, const char* why) {
  throw std::invalid_argument("tensor " + std::to_string(i) + " of the plan: its " + what + " " + why);
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
    default:
      return numel;
  }
}

}  // namespace

RuleId find_rule(const std::string& name, const std::vector<std::string>& state_names) {
  const Variant variant = find_variant(name, state_names);
  if (variant.reduces) throw std::invalid_argument("the rule '" + name + "' reduces");
  return static_cast<RuleId>(variant.rule);
}

RuleId Plan::rule() const {
  if (variant_.reduces) throw std::invalid_argument("the plan is for a rule that reduces");
  return static_cast<RuleId>(variant_.rule);
}

ReducingRuleId Plan::reducing_rule() const {
  if (!variant_.reduces) throw std::invalid_argument("the plan is for an elementwise rule");
  return static_cast<ReducingRuleId>(variant_.rule);
}

Plan::Plan(const std::string& rule, const std::vector<std::string>& state_names, const py::list& owners,
           const py::list& tensors, const py::list& steps, const py::list& states, const py::list& matrices,
           const py::list& precision)
    : variant_(find_variant(rule, state_names)),
      owners_(owners),
      tensors_(tensors),
      steps_(steps),
      states_(states),
      precision_(precision),
      grad_kinds_(owners.size(), kUnknown),
      counters_(owners.size(), nullptr),
      records_(owners.size()),
      matrices_(variant_.reduces ? owners.size() : 0),
      layouts_(owners.size(), Layout{0, 0, -1, kUnknown}),
      grads_(owners.size(), Grad{nullptr, nullptr, false}) {
  if (tensors.size() != owners.size() || steps.size() != owners.size() || states.size() != owners.size())
    throw std::invalid_argument("a plan needs one tensor, step and tuple of states for each parameter");
  if (matrices.size() != matrices_.size())
    throw std::invalid_argument("a plan needs the matrices of each parameter for a rule that reduces, else none");
  if (!precision.empty() && (variant_.reduces || precision.size() != owners.size()))
    throw std::invalid_argument("a plan takes the precision of each parameter, or none, for an elementwise rule");
  bool device_known = false;
  int64_t numel = 0;
  for (size_t i = 0; i < owners.size(); ++i) {
    Record& record = records_[i];
    std::memset(&record, 0, sizeof(record));
    const py::object tensor = tensors[i];
    if (tensor.is_none()) continue;

    TensorView param;
    if (!view_tensor(tensor.ptr(), &param)) reject(i, "param", "has no memory");
    if (!param.dtype_known) reject(i, "param", "has a dtype that no kernel knows");
    if (!device_known) {
      device_ = param.device;
      device_index_ = param.device_index;
      device_known = true;
    }
    const auto on_device = [&](const TensorView& view) {
      return view.device == device_ && view.device_index == device_index_;
    };
    if (!on_device(param)) reject(i, "param", "is on another device than the first one");
    record.param = param.data;
    record.param_dtype = param.dtype;
    record.grad_dtype = param.dtype;  // until a gradient says otherwise
    record.numel = param.numel();
    numel += record.numel;
    const KindIndex kind = kind_of(tensor.ptr(), param);
    layouts_[i] = Layout{dims_.size(), param.ndim, static_cast<int32_t>(param_memory_.size()), kind};
    param_memory_.emplace_back(tensor.ptr(), param, kind != kUnknown);
    if (param_memory_.back().impl() == nullptr) {
      in_place_ = false;
      layouts_[i].kind = kUnknown;
    }
    dims_.insert(dims_.end(), param.shape, param.shape + param.ndim);
    dims_.insert(dims_.end(), param.strides, param.strides + param.ndim);
    const int64_t* shape = dims_.data() + layouts_[i].begin;

    TensorView step;
    const py::object step_tensor = steps[i];
    if (!view_tensor(step_tensor.ptr(), &step)) reject(i, "step", "has no memory");
    if (!on_device(step) || !step.dtype_known || step.dtype != Dtype::kF32 || step.numel() != 1)
      reject(i, "step", "is not one fp32 number on the parameter's device");
    record.step = static_cast<float*>(step.data);
    watch_state(step_tensor.ptr(), step);

    if (variant_.reduces) {
      Matrices& seen = matrices_[i];
      seen = Matrices{1, 1, record.numel, false};
      if (!matrices[i].is_none()) {
        const auto [batch, rows, columns] = matrices[i].cast<std::tuple<int64_t, int64_t, int64_t>>();
        seen = Matrices{batch, rows, columns, true};
      }
      if (seen.batch * seen.rows * seen.columns != record.numel) reject(i, "param", "is not made of these matrices");
      if (!contiguous(layouts_[i].ndim, shape, shape + layouts_[i].ndim)) reject(i, "param", "is not contiguous");
    }
    add_states(i, states[i]);
    add_precision(i, precision.empty() ? py::object(py::none()) : py::object(precision[i]));
    // A stand-in is copied back by torch, which bumps the owner's counter itself. A wrapper's own memory is a tensor
    // with a counter of its own.
    all_written_.append(tensor);
  }
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

void Plan::watch_state(PyObject* tensor, const TensorView& view) {
  state_memory_.emplace_back(tensor, view, true);
  in_place_ = in_place_ && state_memory_.back().impl() != nullptr;
}

void Plan::add_states(size_t i, const py::tuple& states) {
  Record& record = records_[i];
  const int32_t ndim = layouts_[i].ndim;
  const int64_t* shape = dims_.data() + layouts_[i].begin;
  if (states.size() != variant_.places.size()) reject(i, "states", "are not as many as the rule needs");
  for (size_t n = 0; n < states.size(); ++n) {
    const py::object tensor = states[n];
    const int k = variant_.places[n];
    const int64_t numel = variant_.reduces ? state_numel(variant_.spans[n], matrices_[i], record.numel) : record.numel;
    if (tensor.is_none() != (numel < 0)) reject(i, "states", "are not those that the rule needs for it");
    if (numel < 0) continue;
    TensorView state;
    if (!view_tensor(tensor.ptr(), &state)) reject(i, "state", "has no memory");
    if (state.device != device_ || state.device_index != device_index_ || !(state.dtype_known || state.is_code))
      reject(i, "state", "has another device or an unknown dtype");
    const bool fits = variant_.reduces ? state.numel() == numel && contiguous(state.ndim, state.shape, state.strides)
                                       : same_layout(state, ndim, shape, shape + ndim);
    if (!fits) reject(i, "state", "is laid out differently");
    record.states[k] = state.data;
    record.state_dtypes[k] = state.dtype;
    watch_state(tensor.ptr(), state);
  }
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

inline bool Plan::looks_like_before(const Words& at, size_t i, const Sight& sight, const void** data) const {
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

inline bool Plan::param_unchanged(const Words& at, size_t i) const {
  const Layout& layout = layouts_[i];
  if (layout.watch < 0) return false;
  const MemoryWatch& memory = param_memory_[layout.watch];
  if (layout.kind == kUnknown) return memory.unchanged_by_view(layout.ndim, dims_.data() + layout.begin);
  return memory.unchanged(at, layout.ndim, dims_.data() + layout.begin, kinds_[layout.kind].kind);
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
  odd_grads_.clear();
  any_active_ = borrowed_ = false;
  const Words& at = words();
  for (const MemoryWatch& memory : state_memory_) {
    if (!memory.unchanged(at)) return Gathered::kStale;
  }
  const bool borrows = borrow && brief_, looks = borrows && at.grad_known(), counts = in_place_ && at.version_known();
  Sight sights[kTogether];
  for (size_t i = 0; i < records_.size(); ++i) {
    if (looks && i % kTogether == 0) look(at, i, std::min(i + kTogether, size()), sights);
    Grad& grad = grads_[i];
    if (looks) {
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
    grad.tensor = grads.is_none() ? grad_of(owner) : Py_NewRef(PyList_GET_ITEM(grads.ptr(), i));
    if (grad.tensor == nullptr) throw py::error_already_set();
    holds_grads_ = true;
    if (grad.tensor == Py_None) {
      Py_CLEAR(grad.tensor);
      continue;
    }
    grad.active = any_active_ = true;
    if (!param_unchanged(at, i)) return Gathered::kStale;
    TensorView view;
    const int64_t* shape = dims_.data() + layouts_[i].begin;
    if (!view_tensor(grad.tensor, &view) || !view.dtype_known || view.device != device_ ||
        view.device_index != device_index_ || !same_layout(view, layouts_[i].ndim, shape, shape + layouts_[i].ndim)) {
      odd_grads_.push_back(static_cast<int64_t>(i));
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
  const int64_t* shape = dims_.data() + layouts_.at(i).begin;
  if (!view_tensor(grad.ptr(), &view) || !view.dtype_known || view.device != device_ ||
      view.device_index != device_index_ || !same_layout(view, layouts_[i].ndim, shape, shape + layouts_[i].ndim))
    reject(i, "gradient", "is not laid out as the parameter");
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
      if (active(i)) written.append(tensors_[i]);
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
