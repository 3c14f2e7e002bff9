// What of a plan's tensors is updated after the parameters.
#include <stdexcept>
#include <string>

#include "plan.h"

namespace fusedstep {

void Plan::follow(const py::list& averages, const py::list& copies) {
  if (averages.size() != size() || copies.size() != size())
    throw std::invalid_argument("a plan needs an average and a copy, or None, for each parameter");
  for (size_t i = 0; i < size(); ++i) {
    Record& record = records_[i];
    const int64_t* const shape = dims_.data() + layouts_[i].begin;
    const Dtype wide = record.param_dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32;
    const auto take = [&](const py::object& tensor, const char* what, TensorView* view) {
      if (tensor.is_none() || py::object(tensors_[i]).is_none()) return false;
      if (!view_tensor(tensor.ptr(), view) || !view->dtype_known || view->device != device_ ||
          view->device_index != device_index_ || !same_layout(*view, layouts_[i].ndim, shape, shape + layouts_[i].ndim))
        throw std::invalid_argument("tensor " + std::to_string(i) + " of the plan: its " + what +
                                    " is not laid out as the parameter");
      watch_state(tensor.ptr(), *view);
      return true;
    };
    TensorView view;
    if (take(averages[i], "average", &view)) {
      if (view.dtype != wide)
        throw std::invalid_argument("tensor " + std::to_string(i) + " of the plan: its average has a narrow dtype");
      record.average = view.data;
    }
    if (take(copies[i], "copy", &view)) {
      record.copy = view.data;
      record.copy_dtype = view.dtype;
    }
  }
  followers_ = py::make_tuple(averages, copies);
}

}  // namespace fusedstep
