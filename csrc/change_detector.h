// Notices that a user replaced something inside `optimizer.state` or `optimizer.param_groups`.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace fusedstep {

namespace py = pybind11;

// Remembers which objects the two hold, and compares by identity: no hashing, a few nanoseconds an object. Values
// inside a tensor may change freely; a plan checks addresses itself.
class ChangeDetector {
 public:
  ChangeDetector(const py::dict& state, const py::list& param_groups);
  bool unchanged(const py::dict& state, const py::list& param_groups);

 private:
  bool same_versions(const py::dict& state) const;
  void remember_versions(const py::dict& state);

  std::vector<py::object> objects_;  // references, so that no address can be used anew
  std::vector<PyObject*> params_;    // of all groups, with the lists that hold them: among objects_
  // Every dict in `state` with the interpreter's own version number of it, which is one load to compare. Empty where
  // the interpreter keeps none (CPython 3.13 and later).
  std::vector<std::pair<PyObject*, uint64_t>> versions_;
};

}  // namespace fusedstep
