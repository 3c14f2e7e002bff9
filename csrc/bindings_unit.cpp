// Compiled as one, as host_unit.cpp is.
#include "module.cpp"
#include "norm_bindings.cpp"
