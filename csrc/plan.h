// A plan: the tensors of one parameter group on one device, looked up once and checked at every step.
#pragma once

#include <memory>

#include "reducing_rules.h"
#include "rules.h"
#include "table.h"
#include "tensor.h"

namespace fusedstep {

enum class Gathered : int {
  kStale = 0,  // a tensor moved, changed or joined: the plan must be built anew
  kReady = 1,  // every pointer is known to be right
  kMoved = 2,  // so it is, and the gradients are not all where they were last
};

// The elementwise rule of that name with these states. Throws std::invalid_argument if there is none.
RuleId find_rule(const std::string& name, const std::vector<std::string>& state_names);

// What a plan needs to know of a rule of either kind.
struct Variant {
  bool reduces;
  int rule;  // a RuleId, or a ReducingRuleId
  int n_hyper;
  std::vector<int> state_indices;  // of the states that it has, among all that it names
  std::vector<Span> spans;         // of these; all kElement for an elementwise rule
  std::vector<Code> codes;         // of these; all kNone for a rule that reduces
};

class Plan {
 public:
  // records: a list of python/fusedstep/record.py's, in the order of this plan. state_names: which of the rule's states
  // there are, in the order of each record's.
  Plan(const std::string& rule, const std::vector<std::string>& state_names, const py::list& records);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Reads and checks every pointer of this step. Nothing is written. A gradient that cannot be used as it is (other
  // layout, sparse, unknown dtype) lands in unconverted_grads(), for set_grad().
  // borrow: gradients may be read without holding them. The caller keeps the interpreter lock from
  // check_borrowed() to the end of the step's work on the host; a plan with much work holds them all the same.
  // grads: a list with a gradient or None for each owner, to read in place of the owners' (not with borrow); or None.
  // Only without borrow is kMoved told from kReady.
  Gathered gather(bool borrow, const py::object& grads);
  bool borrowed() const { return borrowed_; }
  // Throws if a borrowed gradient was replaced since gather().
  void check_borrowed() const;
  // Whether gather() found everything in torch's own words and ran no code but ours: as long as the caller has not
  // returned to the interpreter nor let its lock go, all is still as it was seen.
  bool undisturbed() const { return in_place_ && !holds_grads_; }
  const std::vector<int64_t>& unconverted_grads() const { return unconverted_grads_; }
  // Leaves tensor i out of this step.
  void drop_grad(int64_t i);
  // Uses `grad`, laid out as tensor i, in place of the owner's gradient in this step.
  void set_grad(int64_t i, const py::object& grad);

  // From now on owner i is asked what it wraps in every step: it is a DTensor around the parameter's memory, and so is
  // its gradient, around a part of the same kind.
  void watch_part(int64_t i);

  // Drops the references to this step's gradients.
  void release_grads();
  // Bumps the version counters of what a step wrote; of gradients, those that are held.
  void increment_written(bool grads_too) const;
  // The same for parameters alone, where gather() has seen the counters; only while undisturbed() holds.
  void increment_seen() const;

  bool reduces() const { return variant_.reduces; }
  // Throw std::invalid_argument if the plan is for a rule of the other kind.
  RuleId rule() const;
  ReducingRuleId reducing_rule() const;
  int n_hyper() const { return variant_.n_hyper; }
  size_t size() const { return records_.size(); }
  const std::vector<Record>& records() const { return records_; }
  bool has_memory() const { return !state_memory_.empty(); }  // false: no parameter has had a gradient yet
  bool any_active() const { return any_active_; }
  bool active(size_t i) const { return grads_[i].active; }
  const void* grad(size_t i) const { return grads_[i].data; }
  // Another one after each change of a gradient's dtype.
  uint64_t grad_dtypes_version() const { return grad_dtypes_version_; }
  Device device() const { return device_; }
  int32_t device_index() const { return device_index_; }

 private:
  // Which of kinds_ a tensor is of.
  using KindIndex = uint8_t;
  static constexpr KindIndex kUnknown = 255;
  struct SeenKind {
    Kind kind;
    int64_t size;  // of a number
  };
  struct Layout {
    size_t begin;  // of shape and then strides in dims_
    int32_t ndim;
    int32_t watch = -1;  // in param_memory_; -1: the parameter has no state yet
    KindIndex kind = kUnknown;
  };
  // What a parameter's gradient is now; null: there is none.
  struct Sight {
    Impl grad, storage;
  };
  // A DTensor whose memory a record has: how it is shared out to processes.
  struct Part {
    py::object spec, mesh, placements, shape;
    py::object seen;  // another description of the same, which a gradient had
  };
  struct Grad {
    PyObject* tensor;  // a reference of ours; null: none, or borrowed
    const void* data;
    bool active;  // takes part in this step
  };

  bool is_part(size_t i) const { return !parts_.empty() && parts_[i] != nullptr; }
  bool wraps_param(size_t i) const;
  bool is_such_part(Part& part, PyObject* tensor);
  // The memory inside a gradient of a part, as a new reference; null without an error: it is odd.
  PyObject* part_of(PyObject* grad, size_t i);
  bool take_part(const Words& at, size_t i, PyObject* wrapper);
  bool grads_moved();
  KindIndex kind_of(PyObject* tensor, const TensorView& view);
  void set_grad_dtype(size_t i, Dtype dtype);
  void look(const Words& at, size_t first, size_t end, Sight* sights) const;
  bool looks_like_before(const Words& at, size_t i, const Sight& sight, const void** data) const;
  bool param_unchanged(const Words& at, size_t i) const;
  bool is_on_device(const TensorView& view) const {
    return view.device == device_ && view.device_index == device_index_;
  }
  bool has_layout_of_param(const TensorView& view, size_t i) const {
    const int64_t* const shape = dims_.data() + layouts_[i].begin;
    return same_layout(view, layouts_[i].ndim, shape, shape + layouts_[i].ndim);
  }
  bool has_packed_param(const TensorView& view, size_t i, int64_t count) const;
  // Whether a kernel can take these numbers beside parameter i.
  bool fits_param(const TensorView& view, size_t i) const {
    return view.dtype_known && is_on_device(view) && has_layout_of_param(view, i);
  }

  // plan_records.cpp: what Python's records say, checked.
  void add_records();
  void add_param(size_t i, const py::object& param);
  void add_step(size_t i, const py::object& step);
  void add_matrices(size_t i, const py::object& matrices);
  void add_states(size_t i, const py::tuple& states);
  void add_weight(size_t i, int weight_format, const py::object& aux);
  void add_scales(size_t i, const py::tuple& scales);
  void* add_follower(size_t i, const py::object& tensor, const char* what, Dtype* dtype);
  TensorView watched(size_t i, const py::object& tensor, const char* what);

  Variant variant_;
  Device device_ = Device::kOther;
  int32_t device_index_ = 0;
  py::list given_;                         // Python's records, which hold every tensor
  py::list owners_, params_;               // of each of them
  std::vector<MemoryWatch> state_memory_;  // of the steps and states of all tensors
  std::vector<MemoryWatch> param_memory_;  // of the tensors that have states, in their order
  // The kinds of parameters, and of gradients that can be used as they are: hardly ever more than two.
  std::vector<SeenKind> kinds_;
  // Each gradient's kind when torch was last asked for it, if it had the parameter's sizes and strides. Its record then
  // has its dtype.
  std::vector<KindIndex> grad_kinds_;
  std::vector<const void*> counters_;  // of each tensor's version, as gather() saw it
  std::vector<Record> records_;
  std::vector<Layout> layouts_;
  std::vector<int64_t> dims_;
  std::vector<Grad> grads_;
  std::vector<std::pair<const void*, Dtype>> last_grads_;  // where each was when that was asked for last
  std::vector<int64_t> unconverted_grads_;
  uint64_t grad_dtypes_version_ = 0;
  bool any_active_ = false, borrowed_ = false, holds_grads_ = false, brief_ = true;
  bool in_place_ = true;  // the memory of no tensor is asked for through torch
  py::list all_written_;
  std::vector<std::unique_ptr<Part>> parts_;  // of each record; empty: there are none
};

}  // namespace fusedstep
