#include "watch.h"

namespace fusedstep {

template <class Visit>
bool Watch::walk(const py::dict& state, const py::list& param_groups, const Visit& visit) {
  if (!visit(state.ptr())) return false;
  PyObject *param, *param_state, *key, *value;
  Py_ssize_t outer = 0;
  while (PyDict_Next(state.ptr(), &outer, &param, &param_state)) {
    if (!visit(param) || !visit(param_state)) return false;
    Py_ssize_t inner = 0;
    if (!PyDict_Check(param_state)) continue;
    while (PyDict_Next(param_state, &inner, &key, &value)) {
      if (!visit(value)) return false;
    }
  }
  const Py_ssize_t n_groups = PyList_GET_SIZE(param_groups.ptr());
  for (Py_ssize_t i = 0; i < n_groups; ++i) {
    PyObject* group = PyList_GET_ITEM(param_groups.ptr(), i);
    PyObject* params = PyDict_Check(group) ? PyDict_GetItemString(group, "params") : nullptr;
    if (!visit(group) || params == nullptr || !visit(params) || !PyList_Check(params)) return false;
    const Py_ssize_t n_params = PyList_GET_SIZE(params);
    for (Py_ssize_t j = 0; j < n_params; ++j) {
      if (!visit(PyList_GET_ITEM(params, j))) return false;
    }
  }
  return true;
}

Watch::Watch(const py::dict& state, const py::list& param_groups) {
  walk(state, param_groups, [&](PyObject* object) {
    objects_.push_back(py::reinterpret_borrow<py::object>(object));
    return true;
  });
}

bool Watch::unchanged(const py::dict& state, const py::list& param_groups) const {
  size_t next = 0;
  const bool same = walk(state, param_groups, [&](PyObject* object) {
    return next < objects_.size() && objects_[next++].ptr() == object;
  });
  return same && next == objects_.size();
}

}  // namespace fusedstep
