// Sums over numbers, a pack at a time, in an order that does not depend on the instruction set.
#pragma once

#include <cstddef>
#include <utility>

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

template <int64_t kNumbers, class S>
FUSEDSTEP_FN void store_piece(S** to, const S** from, int64_t n) {
  if constexpr (kNumbers > 0) {
    if (n & kNumbers) {
      __builtin_memcpy(*to, *from, kNumbers * sizeof(S));
      *to += kNumbers, *from += kNumbers;
    }
    store_piece<kNumbers / 2>(to, from, n);
  }
}

// Formats known only now, and parts of packs that take more than an instruction, stay out of line: with a copy in every
// loop the engine would take minutes to compile.
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
// In pieces of 8, 4, 2 and 1: a load of the next row would wait for the end of a store under a mask beside it.
template <class T, class S>
FUSEDSTEP_OUT_OF_LINE void store_at(Stored<T, S> numbers, int64_t i, Pack<T> pack, Part part) {
  alignas(64) S stored[kLanes<T>];
  store_pack<T, S>(stored, pack);
  const S* from = stored;
  S* to = numbers.data + i;
  store_piece<kLanes<T> / 2>(&to, &from, part.n);
}

#if defined(__AVX2__)
FUSEDSTEP_FN FloatPack load_at(Stored<float, float> numbers, int64_t i, Part part) {
  return numbers.load_part(i, part.n);
}
#endif

// Zeros in place of what is behind a part.
template <class T>
FUSEDSTEP_FN Pack<T> kept(Pack<T> pack, Whole) {
  return pack;
}
template <class T>
FUSEDSTEP_FN Pack<T> kept(Pack<T> pack, Part part) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Lane LanePack __attribute__((vector_size(kPackBytes)));
  LanePack lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return (Pack<T>)((LanePack)pack & (lane < static_cast<Lane>(part.n)));
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

// Calls visit(i, size) for each pack of n numbers, for what is done with each number alone. Fewer copies of what it
// does than for_packs makes.
template <class T, class Visit>
FUSEDSTEP_FN void for_each_pack(int64_t n, Visit&& visit) {
  constexpr int64_t kAtOnce = kSplit<T> > 1 ? 2 * kLanes<T> : kLanes<T>;
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) {
    FUSEDSTEP_UNROLL
    for (int64_t j = 0; j < kAtOnce; j += kLanes<T>) visit(i + j, Whole{});
  }
  if (kAtOnce > kLanes<T> && i + kLanes<T> <= n) {
    visit(i, Whole{});
    i += kLanes<T>;
  }
  if (i < n) visit(i, Part{n - i});
}

template <class T>
struct Lanes {
  Pack<T> packs[kSplit<T>] = {};

  FUSEDSTEP_FN T total() const { return total_of(folded(packs)); }
  FUSEDSTEP_FN static T total_of(Pack<T> pack) { return halved(pack, std::make_index_sequence<kLanes<T>>{}); }

  // The lanes of the first kPacks, where all others are zeros, in one pack: what total() begins with.
  template <int kPacks>
  FUSEDSTEP_FN static Pack<T> folded(const Pack<T> (&given)[kPacks]) {
    if constexpr (kPacks == 1) {
      return given[0];
    } else {
      static_assert(kPacks % 2 == 0, "the first half and the second");
      Pack<T> sums[kPacks / 2];
      for (int w = 0; w < kPacks / 2; ++w) sums[w] = given[w] + given[w + kPacks / 2];
      return folded(sums);
    }
  }

 private:
  template <int64_t kHalf = kLanes<T> / 2, size_t... i>
  FUSEDSTEP_FN static T halved(Pack<T> sums, std::index_sequence<i...> lanes) {
    sums += __builtin_shufflevector(sums, sums, (i % kHalf + kHalf)...);
    if constexpr (kHalf > 1)
      return halved<kHalf / 2>(sums, lanes);
    else
      return sums[0];
  }
};

// The totals of as many rows as a pack has lanes, each in the order of Lanes::total: half of one pack's lanes beside
// half of another's, so that both are added at once. pack(a constant i) gives what is in the lanes from the i-th row
// on: a row, or kRows, each of 4 lanes or more. It is called in order.
template <int kRows = 1>
class Totals {
 public:
  template <class Pack>
  FUSEDSTEP_FN static FloatPack of(const Pack& pack) {
    return in_order(added<0, kSize>(pack), AllLanes{});
  }

 private:
  static constexpr int kSize = kLanes<float>;
  static_assert(kSize / kRows >= 4, "these lie in another order");
  using AllLanes = std::make_index_sequence<kSize>;

  // The sums of kCount rows, each of which has the same number of lanes left.
  template <int kFirst, int kCount, class Pack>
  FUSEDSTEP_FN static FloatPack added(const Pack& pack) {
    if constexpr (kCount == kRows) {
      return pack(std::integral_constant<int, kFirst>{});
    } else {
      const FloatPack a = added<kFirst, kCount / 2>(pack), b = added<kFirst + kCount / 2, kCount / 2>(pack);
      constexpr int kLeft = kSize / kCount;  // lanes of each
      return halves<kLeft, 0>(a, b, AllLanes{}) + halves<kLeft, kLeft>(a, b, AllLanes{});
    }
  }
  // The first (kFrom = 0) or the second half of the lanes of each of a's and b's, which has twice kLeft. Processors mix
  // two packs most easily by fours of lanes, and within each four.
  template <int kLeft, int kFrom, size_t... i>
  FUSEDSTEP_FN static FloatPack halves(FloatPack a, FloatPack b, std::index_sequence<i...>) {
    constexpr int kWindow = kLeft < 4 ? 4 : kSize, kOfEach = kWindow / 2;
    return __builtin_shufflevector(a, b,
                                   (i % kWindow / kOfEach * kSize + i / kWindow * kWindow +
                                    i % kOfEach / kLeft * (2 * kLeft) + i % kLeft + kFrom)...);
  }
  template <size_t... i>
  FUSEDSTEP_FN static FloatPack in_order(FloatPack x, std::index_sequence<i...>) {
    return __builtin_shufflevector(x, x, (i % (kSize / 4) * 4 + i / (kSize / 4))...);
  }
};

// A sum, in fp64, of fp32 numbers without a sign, one after the other. While their sizes differ so little that no
// addition rounds, they are added in any order, which takes a fraction of the time.
class SumInOrder {
 public:
  // n numbers; behind them, up to a whole pack, zeros are written.
  FUSEDSTEP_FN void add(float* numbers, int64_t n) {
    typedef float HalfPack __attribute__((vector_size(kPackBytes / 2)));
    for (int64_t i = n; i % kLanes<float> != 0; ++i) numbers[i] = 0.0f;
    DoublePack sums[2] = {};
    for (int64_t i = 0; i < n; i += kLanes<float>) {
      const FloatPack pack = load_pack<float, float>(numbers + i);
      HalfPack halves[2];
      __builtin_memcpy(halves, &pack, sizeof(halves));
      for (int h = 0; h < 2; ++h) sums[h] += __builtin_convertvector(halves[h], DoublePack);
      // The smaller a number, the larger this is, but zeros count for nothing.
      const WordPack smallness = WordPack{} - (WordPack)pack;
      smallness_ = smallness > smallness_ ? smallness : smallness_;
    }
    const double sum = sum_ + Lanes<double>::total_of(sums[0] + sums[1]);
    // Each number is a multiple of 2^-23 times its leading bit, and 53 bits hold what is less than 2^53 of these.
    if (sum <= static_cast<double>(bit_cast<float>(0u - largest_of(smallness_))) * 0x1p28)
      sum_ = sum;
    else
      for (int64_t i = 0; i < n; ++i) sum_ += static_cast<double>(numbers[i]);
  }
  FUSEDSTEP_FN double total() const { return sum_; }

 private:
  double sum_ = 0.0;
  WordPack smallness_{};
};

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
