// Compiled as one: each alone would compile all of pybind11 anew, which takes longer than the rest of it.
#include "change_detector.cpp"
#include "overlaps.cpp"
#include "plan.cpp"
#include "plan_records.cpp"
#include "tensor.cpp"
#include "words.cpp"
