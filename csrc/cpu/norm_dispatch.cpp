// How passes over gradients alone are cut and dealt out to threads; the arithmetic is in norm.cpp.
#include <algorithm>

#include "team.h"

namespace fusedstep::cpu {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements

struct Piece {
  const Buffer* buffer;
  int64_t begin, n;
  int64_t before;  // elements of all pieces before it
};

struct Pieces {
  std::vector<Piece> list;
  int64_t numel = 0;

  explicit Pieces(const std::vector<Buffer>& buffers) {
    list.reserve(buffers.size());
    for (const Buffer& buffer : buffers) {
      for (int64_t begin = 0; begin < buffer.numel; begin += kPiece) {
        const int64_t n = std::min(kPiece, buffer.numel - begin);
        list.push_back(Piece{&buffer, begin, n, numel});
        numel += n;
      }
    }
  }

  // Calls visit(i) for each piece.
  template <class Visit>
  void for_all(int threads, const Visit& visit) const {
    parallel_for(threads, numel, [&](int64_t first, int64_t last) {
      const auto first_from = [&](int64_t element) {
        const auto before = [](const Piece& piece, int64_t at) { return piece.before < at; };
        return std::lower_bound(list.begin(), list.end(), element, before) - list.begin();
      };
      for (auto i = first_from(first), end = first_from(last); i < end; ++i) visit(static_cast<size_t>(i));
    });
  }
};

}  // namespace

BufferSums sum_buffers(const std::vector<Buffer>& buffers, double grad_scale, int threads) {
  const SumFunction sum = current().sum;
  const Pieces pieces(buffers);
  std::vector<BufferSums> sums(pieces.list.size());
  pieces.for_all(threads, [&](size_t i) {
    const Piece& piece = pieces.list[i];
    sums[i] = sum(*piece.buffer, piece.begin, piece.n, grad_scale);
  });
  BufferSums total{0.0, 0.0};
  for (const BufferSums& part : sums) {
    total.sum_of_squares += part.sum_of_squares;
    total.max_abs = maximum(total.max_abs, part.max_abs);
  }
  return total;
}

void scale_buffers(const std::vector<Buffer>& buffers, double factor, int threads) {
  const ScaleFunction scale = current().scale;
  const Pieces pieces(buffers);
  pieces.for_all(threads, [&](size_t i) {
    const Piece& piece = pieces.list[i];
    scale(*piece.buffer, piece.begin, piece.n, factor);
  });
}

}  // namespace fusedstep::cpu
