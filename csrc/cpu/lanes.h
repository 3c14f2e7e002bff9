// Sums over numbers, a pack at a time, in an order that does not depend on the instruction set.
#pragma once

#include "stored.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {

// Sums are kept in 64 bytes of lanes, in one pack or several: the order of additions is then the same on every
// instruction set.
template <class T>
constexpr int kSplit = 64 / kPackBytes;
template <class T>
constexpr int64_t kStep = kSplit<T> * kLanes<T>;

struct Whole {};  // pack
struct Part {     // of a pack
  int64_t n;
};

// Parts of packs, and formats known only now, stay out of line: with a copy in every loop this file would take minutes
// to compile.
template <class Numbers>
FUSEDSTEP_FN auto load_at(Numbers numbers, int64_t i, Whole) {
  return numbers.load(i);
}
template <class T>
FUSEDSTEP_OUT_OF_LINE Pack<T> load_at(AnyStored<T> numbers, int64_t i, Whole) {
  return numbers.load(i);
}
template <class Numbers>
FUSEDSTEP_OUT_OF_LINE auto load_at(Numbers numbers, int64_t i, Part part) {
  return numbers.load_part(i, part.n);
}
template <class Numbers, class P>
FUSEDSTEP_FN void store_at(Numbers numbers, int64_t i, P pack, Whole) {
  numbers.store(i, pack);
}
template <class T>
FUSEDSTEP_OUT_OF_LINE void store_at(AnyStored<T> numbers, int64_t i, Pack<T> pack, Whole) {
  numbers.store(i, pack);
}
template <class Numbers, class P>
FUSEDSTEP_OUT_OF_LINE void store_at(Numbers numbers, int64_t i, P pack, Part part) {
  numbers.store_part(i, part.n, pack);
}

// Zeros in place of what is behind a part.
template <class T>
FUSEDSTEP_FN Pack<T> kept(Pack<T> pack, Whole) {
  return pack;
}
template <class T>
FUSEDSTEP_FN Pack<T> kept(Pack<T> pack, Part part) {
  for (int64_t i = part.n; i < kLanes<T>; ++i) pack[i] = 0;
  return pack;
}

// Calls visit(i, w, size) for the pack of n numbers that begins with the i-th; w numbers the packs of a step.
template <class T, class Visit>
FUSEDSTEP_FN void for_packs(int64_t n, Visit&& visit) {
  int64_t i = 0;
  for (; i + kStep<T> <= n; i += kStep<T>) {
    FUSEDSTEP_UNROLL
    for (int w = 0; w < kSplit<T>; ++w) visit(i + w * kLanes<T>, w, Whole{});
  }
  FUSEDSTEP_UNROLL
  for (int w = 0; w < kSplit<T>; ++w, i += kLanes<T>) {
    if (i + kLanes<T> <= n)
      visit(i, w, Whole{});
    else if (i < n)
      visit(i, w, Part{n - i});
  }
}

template <class T>
struct Lanes {
  Pack<T> packs[kSplit<T>] = {};

  FUSEDSTEP_FN T total() const {
    T lanes[kStep<T>];
    __builtin_memcpy(lanes, packs, sizeof(lanes));
    for (int64_t half = kStep<T> / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }
};

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
