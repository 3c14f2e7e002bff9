// The Python side of the CUDA engine; empty where the extension is built without CUDA.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedstep {

void bind_cuda(pybind11::module_& m);

}  // namespace fusedstep
