// python/fusedstep/record.py's Step, as every engine is given it.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedstep {

namespace py = pybind11;

struct GivenStep {
  py::tuple hyper;
  py::object grad_scale, found_inf, coefficient;  // None: there is none
  bool maximize, zero_grads, write_grads;
  double average_weight;

  explicit GivenStep(const py::handle& step) {
    const Names& names = Names::all();
    hyper = step.attr(names.hyper);
    grad_scale = step.attr(names.grad_scale);
    found_inf = step.attr(names.found_inf);
    coefficient = step.attr(names.coefficient);
    maximize = step.attr(names.maximize).cast<bool>();
    zero_grads = step.attr(names.zero_grads).cast<bool>();
    write_grads = step.attr(names.write_grads).cast<bool>();
    average_weight = step.attr(names.average_weight).cast<double>();
  }

 private:
  // Made once: names of attributes are found faster by the very string.
  struct Names {
    py::object hyper = name("hyper"), maximize = name("maximize"), grad_scale = name("grad_scale"),
               found_inf = name("found_inf"), coefficient = name("coefficient"), zero_grads = name("zero_grads"),
               write_grads = name("write_grads"), average_weight = name("average_weight");

    static py::object name(const char* text) {
      return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
    }
    static const Names& all() {
      static const Names* const names = new Names;  // never deleted: the interpreter may have ended by then
      return *names;
    }
  };
};

}  // namespace fusedstep
