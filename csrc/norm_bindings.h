// The Python side of the passes over gradients alone, on the CPU.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedstep {

// What Python says of the limits: a tuple in the order of NormLimits.
struct NormLimits;
NormLimits to_limits(const pybind11::tuple& limits);

void bind_norm(pybind11::module_& m);

}  // namespace fusedstep
