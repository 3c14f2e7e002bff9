// Items: how the tensors of a group are cut up for the kernels of rules that reduce. Plain C++, so that it can be
// tested anywhere. Nothing here may look at more than one tensor or at the GPU: the order of sums would depend on it.
#include <algorithm>
#include <cstring>

#include "cuda/reducing.h"

namespace fusedstep::cuda {
namespace {

constexpr int64_t kSmallMatrix = 1024;  // elements; up to here a warp takes a whole matrix
constexpr int64_t kTinyMatrix = 32;     // elements; up to here a thread does
constexpr int64_t kItemElements = 32768;
constexpr int64_t kManyRowBlocks = 128;  // whose column sums one block adds up in little time
constexpr int64_t kBlockThreads = 256;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

void cut_tiles(Partition* p) {
  // Strips of about equal width; a multiple of what a warp reads at once.
  const int64_t strips = divide_up(p->columns, kStrip);
  const int64_t width =
      strips == 1 ? p->columns : std::min<int64_t>(kStrip, divide_up(p->columns / strips + 1, 128) * 128);
  p->strip = static_cast<int32_t>(width);
  p->n_strips = static_cast<int32_t>(divide_up(p->columns, width));
  int64_t rows =
      std::max(power_of_two_from(divide_up(p->rows, kManyRowBlocks)), kItemElements / power_of_two_from(width));
  rows = std::min(rows, p->rows);
  p->item_rows = static_cast<int32_t>(rows);
  const int64_t strips_per_item = std::clamp<int64_t>(kItemElements / (rows * width), 1, p->n_strips);
  p->item_columns = static_cast<int32_t>(strips_per_item * width);
  p->n_row_blocks = static_cast<int32_t>(divide_up(p->rows, rows));
  p->n_groups = static_cast<int32_t>(divide_up(p->columns, p->item_columns));
}

// Every tensor has an item, an empty one too: it has an RMS, and perhaps lines, that are not a number.
Partition cut(const Record& record, const Matrices& matrices) {
  Partition p{};
  p.batch = matrices.batch;
  p.rows = matrices.rows;
  p.columns = matrices.columns;
  const int64_t elements = p.rows * p.columns;  // of a matrix
  p.item_rows = p.item_columns = p.strip = p.team = 1;
  if (!matrices.factored) {
    p.cut = Cut::kFlat;
    p.item_columns = kItemElements / 4;
    p.n_items = static_cast<int32_t>(std::max<int64_t>(divide_up(record.numel, p.item_columns), 1));
  } else if (elements <= kSmallMatrix) {
    p.cut = Cut::kSmall;
    p.team = elements <= kTinyMatrix ? 1 : 32;
    const int64_t teams = kBlockThreads / p.team;
    p.item_rows =
        static_cast<int32_t>(std::max<int64_t>(kItemElements / 4 / std::max<int64_t>(elements, 1) / teams, 1) * teams);
    p.n_items = static_cast<int32_t>(std::max<int64_t>(divide_up(p.batch, p.item_rows), 1));
  } else {
    p.cut = Cut::kTiles;
    cut_tiles(&p);
    p.n_items = static_cast<int32_t>(p.batch * p.n_row_blocks * p.n_groups);
  }
  return p;
}

// Gives every array of a partition its place in the work memory and among the counters.
void place(Partition* p, const Record& record, LineFactors factors, int64_t* work, int64_t* counters) {
  const int64_t number = record.param_dtype == Dtype::kF64 ? 8 : 4;
  const auto take = [&](int64_t* offset, int64_t n, int64_t size) {
    *offset = *work;
    *work += divide_up(n * size, 16) * 16;
  };
  const bool tiles = p->cut == Cut::kTiles;
  if (p->cut != Cut::kFlat) {
    take(&p->row_factors, p->batch * p->rows * factors.of_row, number);
    take(&p->column_factors, p->batch * p->columns * factors.of_column, number);
    take(&p->matrix_factors, p->batch, number);
  }
  take(&p->row_sums, tiles && factors.of_row > 0 ? p->batch * p->rows * p->n_strips : 0, number);
  take(&p->column_sums, tiles && factors.of_column > 0 ? p->batch * p->n_row_blocks * p->columns : 0, number);
  take(&p->state_sums, tiles ? p->batch * p->n_row_blocks : 0, 8);
  take(&p->sums, 2 * int64_t{p->n_items}, 8);
  take(&p->totals, 2, 8);
  p->counters = *counters;
  *counters += 2 + (tiles ? p->batch * (p->n_row_blocks + p->n_groups + 1) : 0);
}

void add_items(const Partition& p, const Record& record, int32_t index, std::vector<Item>* items) {
  Item item{};
  item.record = index;
  const auto add = [&] {
    items->push_back(item);
    ++item.index;
  };
  if (p.cut == Cut::kFlat) {
    for (; item.index < p.n_items; item.column += p.item_columns) {
      item.n_columns = static_cast<int32_t>(std::min<int64_t>(p.item_columns, record.numel - item.column));
      add();
    }
  } else if (p.cut == Cut::kSmall) {
    for (; item.index < p.n_items; item.matrix += p.item_rows) {
      item.n_rows = static_cast<int32_t>(std::min<int64_t>(p.item_rows, p.batch - item.matrix));
      add();
    }
  } else {
    for (item.matrix = 0; item.matrix < p.batch; ++item.matrix) {
      for (item.row = 0; item.row < p.rows; item.row += p.item_rows) {
        item.n_rows = static_cast<int32_t>(std::min<int64_t>(p.item_rows, p.rows - item.row));
        for (item.column = 0; item.column < p.columns; item.column += p.item_columns) {
          item.n_columns = static_cast<int32_t>(std::min<int64_t>(p.item_columns, p.columns - item.column));
          add();
        }
      }
    }
  }
}

template <class T>
void append(std::vector<char>* bytes, const std::vector<T>& values) {
  static_assert(sizeof(T) % 8 == 0, "what follows stays aligned");
  const char* data = reinterpret_cast<const char*>(values.data());
  bytes->insert(bytes->end(), data, data + values.size() * sizeof(T));
}

}  // namespace

ReducingTable build_reducing_table(const std::vector<Record>& records, const std::vector<Matrices>& matrices,
                                   LineFactors factors) {
  ReducingTable table;
  table.records = records;
  const int64_t n = static_cast<int64_t>(records.size());
  table.n_counters = divide_up(n, kMaxTensorsPerLaunch);  // of the blocks that have finished
  for (int64_t first = 0; first < n; first += kMaxTensorsPerLaunch) {
    const int64_t first_item = static_cast<int64_t>(table.items.size());
    const int64_t n_records = std::min(kMaxTensorsPerLaunch, n - first);
    for (int64_t i = 0; i < n_records; ++i) {
      const Record& record = records[first + i];
      Partition partition = cut(record, matrices[first + i]);
      place(&partition, record, factors, &table.work_bytes, &table.n_counters);
      add_items(partition, record, static_cast<int32_t>(i), &table.items);
      table.partitions.push_back(partition);
    }
    table.segments.push_back(
        Segment{first, n_records, first_item, static_cast<int64_t>(table.items.size()) - first_item, 0});
  }
  return table;
}

std::vector<char> ReducingTable::bytes() const {
  std::vector<char> bytes;
  append(&bytes, records);
  append(&bytes, partitions);
  append(&bytes, items);
  bytes.resize(bytes.size() + n_counters * sizeof(uint32_t), 0);
  return bytes;
}

}  // namespace fusedstep::cuda
