// Chunks: how the elements of a group are dealt out to blocks and warps. Plain C++, so that it can be tested anywhere.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "cuda/engine.h"
#include "cuda/formats.h"

namespace fusedstep::cuda {
namespace {

// The elements of a chunk: of as many tiles as leave every multiprocessor enough blocks.
int64_t chunk_size(int format, int64_t numel, int multiprocessors) {
  const int64_t tile =
      int64_t{kStepThreads} * (format == kGeneral ? kGeneralNumbers : numbers_per_thread(kFormats[format]));
  int64_t tiles = most_tiles(format);
  while (tiles > 1 && numel < tiles * tile * kBlocksToFill * std::max(multiprocessors, 1)) tiles /= 2;
  return tiles * tile;
}

// The chunks of a segment: first those of whole blocks, then those of warps.
void add_chunks(Table* table, Segment* segment, int64_t size) {
  segment->first_chunk = static_cast<int64_t>(table->chunks.size());
  for (const bool small : {false, true}) {
    for (int64_t i = 0; i < segment->n_records; ++i) {
      const int64_t elements = table->records[segment->first_record + i].numel;
      if (elements == 0 || (elements < kSmallTensor) != small) continue;
      for (int64_t offset = 0; offset < elements; offset += size) {
        const int64_t length = std::min(size, elements - offset);
        table->chunks.push_back(Chunk{static_cast<int32_t>(i), static_cast<int32_t>(length), offset});
        ++(small ? segment->n_small_chunks : segment->n_block_chunks);
      }
    }
  }
}

}  // namespace

Table build_table(const std::vector<Record>& records, RuleId rule, int multiprocessors) {
  Table table;
  const int64_t n = static_cast<int64_t>(records.size());
  std::vector<int> kinds(records.size());
  const auto kind_of = [](int format, bool followed) { return 2 * format + (followed && format != kGeneral); };
  visit_rule(rule, [&](auto r) {
    for (int64_t i = 0; i < n; ++i) kinds[i] = kind_of(format_of<decltype(r)>(records[i]), records[i].has_followers());
  });
  table.order.resize(records.size());
  std::iota(table.order.begin(), table.order.end(), 0);
  std::stable_sort(table.order.begin(), table.order.end(), [&](int32_t a, int32_t b) { return kinds[a] < kinds[b]; });
  table.records.reserve(records.size());
  for (const int32_t i : table.order) table.records.push_back(records[i]);
  for (int64_t first = 0; first < n;) {
    const int kind = kinds[table.order[first]];
    int64_t end = first, numel = 0;
    for (; end < n && kinds[table.order[end]] == kind; ++end) numel += table.records[end].numel;
    const int64_t size = chunk_size(kind / 2, numel, multiprocessors);
    for (; first < end; first = std::min(end, first + kMaxTensorsPerLaunch)) {
      Segment segment{first, std::min(kMaxTensorsPerLaunch, end - first), 0, 0, 0, kind / 2, kind % 2 != 0};
      add_chunks(&table, &segment, size);
      table.segments.push_back(segment);
    }
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
