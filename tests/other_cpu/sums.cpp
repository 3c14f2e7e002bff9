// The sums of lanes.h against plain loops that add in the same order, to the bit; on numbers of every size.
#include <cstdio>
#include <cstring>

#include "../../csrc/cpu/lanes.h"
#include "tensors.h"

using namespace fusedstep;
using namespace fusedstep::cpu;

namespace {

int different = 0;

template <class T>
void compare(const char* what, T got, T expected) {
  if (std::memcmp(&got, &expected, sizeof(T)) == 0 || (got != got && expected != expected)) return;
  ++different;
  std::printf("%s: %a, expected %a\n", what, static_cast<double>(got), static_cast<double>(expected));
}

template <class T>
T halved(T* lanes, int64_t n) {
  for (int64_t half = n / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Squares of numbers whose exponents are spread so far.
struct Squares {
  Random random;
  float square(int spread) {
    const uint32_t shift = spread == 0 ? 0 : random.bits() % static_cast<uint32_t>(spread);
    const float number = random.number() * bit_cast<float>((127u - shift) << 23);
    return random.bits() % 31 == 0 ? 0.0f : number * number;
  }
};

template <class T>
void check_total(Squares& squares) {
  Lanes<T> lanes;
  T numbers[kStep<T>];
  for (T& number : numbers) number = static_cast<T>(squares.square(4));
  std::memcpy(lanes.packs, numbers, sizeof(numbers));
  compare("total", lanes.total(), halved(numbers, kStep<T>));
}

template <int kRows>
void check_totals(Squares& squares) {
  constexpr int kSize = kLanes<float>, kColumns = kSize / kRows;
  float rows[kSize][kColumns], got[kSize];
  for (auto& row : rows)
    for (float& number : row) number = squares.square(4);
  const FloatPack totals = Totals<kRows>::of([&](auto first) {
    FloatPack pack;
    std::memcpy(&pack, rows[first], sizeof(pack));
    return pack;
  });
  std::memcpy(got, &totals, sizeof(got));
  for (int r = 0; r < kSize; ++r) compare("totals of rows", got[r], halved(rows[r], kColumns));
}

void check_sum_in_order(Squares& squares, int spread) {
  SumInOrder sum;
  double expected = 0.0;
  for (const int64_t n : {64, 64, 1, 512, 64, 37}) {
    alignas(64) float numbers[512];
    for (int64_t i = 0; i < n; ++i) expected += static_cast<double>(numbers[i] = squares.square(spread));
    sum.add(numbers, n);
    compare("sum in order", sum.total(), expected);
  }
}

}  // namespace

int main() {
  Squares squares;
  for (int turn = 0; turn < 500; ++turn) {
    check_total<float>(squares);
    check_total<double>(squares);
    check_totals<1>(squares);
    if constexpr (kLanes<float> >= 8) check_totals<2>(squares);
    if constexpr (kLanes<float> >= 16) check_totals<4>(squares);
    for (const int spread : {0, 3, 7, 9, 12, 60}) check_sum_in_order(squares, spread);
  }
  std::printf("%d differ\n", different);
  return different != 0;
}
