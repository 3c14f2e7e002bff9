// How the gradients of a group are dealt out to blocks and warps to be summed. Plain C++, so that it can be tested
// anywhere. Nothing here may look at the GPU: the order of sums would depend on it.
#include <algorithm>
#include <cstring>

#include "cuda/norm.h"

namespace fusedstep::cuda {
namespace {

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

NormTable build_norm_table(const std::vector<Record>& records) {
  NormTable table;
  const int64_t n = static_cast<int64_t>(records.size());
  for (const Record& record : records) table.dtypes.push_back(record.grad_dtype);
  for (int64_t first = 0; first < n; first += kMaxTensorsPerLaunch) {
    NormSegment segment{first,
                        std::min(kMaxTensorsPerLaunch, n - first),
                        static_cast<int64_t>(table.chunks.size()),
                        0,
                        0,
                        table.n_sums,
                        table.n_counters};
    for (const bool small : {false, true}) {
      for (int64_t i = 0; i < segment.n_records; ++i) {
        const Record& record = records[first + i];
        const int64_t width = size_of(record.grad_dtype), size = norm_chunk_bytes(record.numel * width) / width;
        if (record.numel == 0 || (record.numel * width <= kNormSmallBytes) != small) continue;
        for (int64_t offset = 0; offset < record.numel; offset += size) {
          table.chunks.push_back(NormChunk{offset, static_cast<int32_t>(std::min(size, record.numel - offset)),
                                           static_cast<uint16_t>(i), record.grad_dtype});
          ++(small ? segment.n_small_chunks : segment.n_block_chunks);
        }
      }
    }
    const int64_t blocks = norm_blocks(segment), groups = divide_up(blocks, kNormGroup);
    table.n_sums += blocks + groups;
    table.n_counters += groups + 1;
    table.segments.push_back(segment);
  }
  return table;
}

std::vector<char> NormTable::bytes() const {
  static_assert(sizeof(NormChunk) == 16 && sizeof(ChunkSums) == 16, "what follows stays aligned");
  const size_t n_chunks = chunks.size() * sizeof(NormChunk);
  std::vector<char> bytes(n_chunks + n_sums * sizeof(ChunkSums) + n_counters * sizeof(uint32_t), 0);
  if (n_chunks != 0) std::memcpy(bytes.data(), chunks.data(), n_chunks);
  return bytes;
}

}  // namespace fusedstep::cuda
