// Sums over gradients, compiled once per instruction set (FUSEDSTEP_ISA). No threads, no rules.
#include "norm.h"

#include "lanes.h"

namespace fusedstep::cpu {
inline namespace FUSEDSTEP_ISA {
namespace {

constexpr int64_t kRun = 1024;  // numbers whose squares are added up in the arithmetic type

template <class T>
struct Bits;
template <>
struct Bits<float> {
  typedef int32_t Word;
  typedef Word Pack __attribute__((vector_size(kPackBytes)));
};
template <>
struct Bits<double> {
  typedef int64_t Word;
  typedef Word Pack __attribute__((vector_size(kPackBytes)));
};

// Sizes compare as their bits do; infinity and NaN are the largest.
template <class T, class S>
BufferSums sum_stored(const S* data, int64_t n, T grad_scale) {
  using Word = typename Bits<T>::Word;
  using WordPack = typename Bits<T>::Pack;
  constexpr Word kNoSign = ~(Word{1} << (sizeof(Word) * 8 - 1));
  const Stored<T, S> numbers{const_cast<S*>(data)};
  const T inverse = static_cast<T>(1.0 / static_cast<double>(grad_scale));
  double sum = 0.0;
  WordPack max_abs[kSplit<T>] = {};
  for (int64_t done = 0; done < n; done += kRun) {
    Lanes<T> lanes;
    for_packs<T>(n - done < kRun ? n - done : kRun, [&](int64_t i, int w, auto size) FUSEDSTEP_INLINE {
      const Pack<T> x = load_at(numbers, done + i, size);
      const WordPack bits = (WordPack)x & kNoSign;
      max_abs[w] = bits > max_abs[w] ? bits : max_abs[w];
      const Pack<T> unscaled = x * inverse;
      lanes.packs[w] += unscaled * unscaled;
    });
    sum += lanes.total();
  }
  Word most = 0;
  for (const WordPack& pack : max_abs) {
    for (int64_t i = 0; i < kLanes<T>; ++i) most = pack[i] > most ? pack[i] : most;
  }
  return {sum, static_cast<double>(bit_cast<T>(most))};
}

template <class T, class S>
void scale_stored(S* data, int64_t n, T factor) {
  const Stored<T, S> numbers{data};
  for_packs<T>(n, [&](int64_t i, int, auto size)
                      FUSEDSTEP_INLINE { store_at(numbers, i, load_at(numbers, i, size) * factor, size); });
}

template <class Visit>
auto visit_buffer(const Buffer& buffer, int64_t begin, Visit&& visit) {
  return visit_number(buffer.dtype, [&](auto stored) {
    using S = decltype(stored);
    using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
    return visit(static_cast<S*>(buffer.data) + begin, T{1});
  });
}

}  // namespace

BufferSums sum_buffer(const Buffer& buffer, int64_t begin, int64_t n, double grad_scale) {
  return visit_buffer(buffer, begin, [&](const auto* data, auto one) {
    return sum_stored(data, n, static_cast<decltype(one)>(grad_scale));
  });
}

void scale_buffer(const Buffer& buffer, int64_t begin, int64_t n, double factor) {
  visit_buffer(buffer, begin, [&](auto* data, auto one) { scale_stored(data, n, static_cast<decltype(one)>(factor)); });
}

}  // namespace FUSEDSTEP_ISA
}  // namespace fusedstep::cpu
