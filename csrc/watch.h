// Notices that a user replaced something inside `optimizer.state` or `optimizer.param_groups`.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace fusedstep {

namespace py = pybind11;

// Remembers which objects the two hold, and compares by identity: no hashing, a few nanoseconds an object. Values
// inside a tensor may change freely; a plan checks addresses itself.
class Watch {
 public:
  Watch(const py::dict& state, const py::list& param_groups);
  bool unchanged(const py::dict& state, const py::list& param_groups) const;

 private:
  // Calls visit(object) for everything watched, in a fixed order, until it returns false.
  template <class Visit>
  static bool walk(const py::dict& state, const py::list& param_groups, const Visit& visit);

  std::vector<py::object> objects_;  // references, so that no address can be used anew
};

}  // namespace fusedstep
