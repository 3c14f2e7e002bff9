// Chunks: how the elements of a group are dealt out to blocks and warps. Plain C++, so that it can be tested anywhere.
#include <algorithm>
#include <cstring>

#include "cuda/engine.h"

namespace fusedstep::cuda {
namespace {

constexpr int64_t kSmallTensor = 1024;  // elements; below it a warp takes the whole tensor
constexpr int64_t kMinChunk = 2048, kMaxChunk = 65536;
// Enough pieces for every resident block to take several: the last ones then finish at about the same time.
constexpr int64_t kChunksPerBlock = 8, kBlocksPerMultiprocessor = 4;

int64_t chunk_size(int64_t numel, int multiprocessors) {
  const int64_t pieces = kChunksPerBlock * kBlocksPerMultiprocessor * std::max(multiprocessors, 1);
  int64_t size = kMinChunk;
  while (size < kMaxChunk && size * pieces < numel) size *= 2;
  return size;
}

}  // namespace

Table build_table(const std::vector<Record>& records, int multiprocessors) {
  Table table;
  table.records = records;
  int64_t numel = 0;
  for (const Record& record : records) numel += record.numel;
  const int64_t size = chunk_size(numel, multiprocessors);
  const int64_t n = static_cast<int64_t>(records.size());
  for (int64_t first = 0; first < n; first += kMaxTensorsPerLaunch) {
    Segment segment{first, std::min(kMaxTensorsPerLaunch, n - first), static_cast<int64_t>(table.chunks.size()), 0, 0};
    for (const bool small : {false, true}) {
      for (int64_t i = 0; i < segment.n_records; ++i) {
        const int64_t elements = records[first + i].numel;
        if (elements == 0 || (elements < kSmallTensor) != small) continue;
        for (int64_t offset = 0; offset < elements; offset += size) {
          const int64_t length = std::min(size, elements - offset);
          table.chunks.push_back(Chunk{static_cast<int32_t>(i), static_cast<int32_t>(length), offset});
          ++(small ? segment.n_small_chunks : segment.n_block_chunks);
        }
      }
    }
    const auto begin = records.begin() + first;
    segment.is_plain = std::all_of(begin, begin + segment.n_records, [](const Record& r) { return is_plain(r); });
    table.segments.push_back(segment);
  }
  return table;
}

std::vector<char> Table::bytes() const {
  const size_t n_records = records.size() * sizeof(Record), n_chunks = chunks.size() * sizeof(Chunk);
  std::vector<char> bytes(size_in_bytes(), 0);
  if (n_records != 0) std::memcpy(bytes.data(), records.data(), n_records);
  if (n_chunks != 0) std::memcpy(bytes.data() + n_records, chunks.data(), n_chunks);
  return bytes;
}

}  // namespace fusedstep::cuda
