#include "change_detector.h"

#include <algorithm>

namespace fusedstep {
namespace {

// Calls visit(object) for all that is watched in `state`, in a fixed order, until it returns false.
template <class Visit>
bool walk_state(const py::dict& state, const Visit& visit) {
  if (!visit(state.ptr())) return false;
  PyObject *param, *param_state, *key, *value;
  Py_ssize_t outer = 0;
  while (PyDict_Next(state.ptr(), &outer, &param, &param_state)) {
    if (!visit(param) || !visit(param_state)) return false;
    if (!PyDict_Check(param_state)) continue;
    Py_ssize_t inner = 0;
    while (PyDict_Next(param_state, &inner, &key, &value)) {
      if (!visit(value)) return false;
    }
  }
  return true;
}

// Calls visit(objects, n) for the groups, their lists and what these hold, in a fixed order, until it returns false.
template <class Visit>
bool walk_params(const py::list& param_groups, const Visit& visit) {
  const Py_ssize_t n_groups = PyList_GET_SIZE(param_groups.ptr());
  for (Py_ssize_t i = 0; i < n_groups; ++i) {
    PyObject* group = PyList_GET_ITEM(param_groups.ptr(), i);
    PyObject* params = PyDict_Check(group) ? PyDict_GetItemString(group, "params") : nullptr;
    if (params == nullptr || !PyList_Check(params) || !visit(&group, 1) || !visit(&params, 1)) return false;
    if (!visit(reinterpret_cast<PyListObject*>(params)->ob_item, static_cast<size_t>(PyList_GET_SIZE(params))))
      return false;
  }
  return true;
}

#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // deprecated in 3.12, kept up to there
uint64_t version_of(PyObject* dict) {
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
}
#pragma GCC diagnostic pop
constexpr bool kVersions = true;
#else
uint64_t version_of(PyObject*) {
  return 0;
}
constexpr bool kVersions = false;
#endif

}  // namespace

ChangeDetector::ChangeDetector(const py::dict& state, const py::list& param_groups) {
  const auto keep = [&](PyObject* object) {
    objects_.push_back(py::reinterpret_borrow<py::object>(object));
    return true;
  };
  walk_state(state, keep);
  walk_params(param_groups, [&](PyObject* const* objects, size_t n) {
    params_.insert(params_.end(), objects, objects + n);
    return std::all_of(objects, objects + n, keep);
  });
  remember_versions(state);
}

void ChangeDetector::remember_versions(const py::dict& state) {
  versions_.clear();
  if (!kVersions) return;
  walk_state(state, [&](PyObject* object) {
    if (PyDict_Check(object)) versions_.emplace_back(object, version_of(object));
    return true;
  });
}

bool ChangeDetector::same_versions(const py::dict& state) const {
  if (versions_.empty() || versions_[0].first != state.ptr()) return false;
  for (const auto& [dict, version] : versions_) {
    if (version_of(dict) != version) return false;
  }
  return true;
}

bool ChangeDetector::unchanged(const py::dict& state, const py::list& param_groups) {
  size_t next = 0;
  const bool same_params = walk_params(param_groups, [&](PyObject* const* objects, size_t n) {
    const bool same = n <= params_.size() - next && std::equal(objects, objects + n, params_.data() + next);
    next += n;
    return same;
  });
  if (!same_params || next != params_.size()) return false;
  if (same_versions(state)) return true;
  next = 0;
  const size_t n_state = objects_.size() - params_.size();
  const bool same_state =
      walk_state(state, [&](PyObject* object) { return next < n_state && objects_[next++].ptr() == object; });
  if (!same_state || next != n_state) return false;
  remember_versions(state);  // something else in a dict changed
  return true;
}

}  // namespace fusedstep
