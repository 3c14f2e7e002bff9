// Items: how the tensors of a group are cut up for the kernels of rules that reduce. Plain C++, so that it can be
// tested anywhere. Nothing here may look at more than one tensor or at the GPU: the order of sums would depend on it.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/reducing.h"
#include "cuda/tuning.h"

namespace fusedstep::cuda {
namespace {

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Threads for a row: as many as leave at most an eighth of them without work, or as few as possible.
int64_t choose_lanes(int64_t packs) {
  if (packs <= 32) return power_of_two_from(packs);
  int64_t best = kReducingThreads, least = divide_up(packs, best) * best;
  for (int64_t lanes = best / 2; lanes >= 32 && least * 8 > packs * 9; lanes /= 2) {
    const int64_t taken = divide_up(packs, lanes) * lanes;
    if (taken < least) least = taken, best = lanes;
  }
  return best;
}

void cut_tiles(Partition* p, const Record& record) {
  const int64_t pack = 16 / size_of(record.grad_dtype), lanes = choose_lanes(divide_up(p->columns, pack));
  const int64_t rows_at_once = kReducingThreads / lanes, strip = lanes * pack;
  // Small tensors get more blocks.
  const int64_t rounds = record.numel >= (1 << 22) ? 8 : record.numel >= (1 << 20) ? 4 : 2;
  p->pack = static_cast<int32_t>(pack);
  p->lanes = static_cast<int32_t>(lanes);
  p->low_rows = static_cast<int32_t>(rows_at_once * kAhead);
  p->tall_rows = static_cast<int32_t>(rows_at_once * kAhead * rounds);
  p->n_strips = static_cast<int32_t>(divide_up(p->columns, strip));
  p->n_parts = static_cast<int32_t>(divide_up(p->columns, std::min<int64_t>(lanes, 32) * pack));
  p->n_row_blocks = static_cast<int32_t>(divide_up(p->rows, p->tall_rows));
  p->n_bands = static_cast<int32_t>(divide_up(p->n_row_blocks, kBand));
  p->n_tall = static_cast<int32_t>(p->batch * p->n_row_blocks * p->n_strips);
  p->n_low = static_cast<int32_t>(p->batch * divide_up(p->rows, p->low_rows) * p->n_strips);
}

// Every tensor has an item, an empty one too: it has an RMS, and perhaps lines, that are not a number.
Partition cut(const Record& record) {
  const Matrices& matrices = record.matrices;
  Partition p{};
  p.batch = matrices.batch;
  p.rows = matrices.rows;
  p.columns = matrices.columns;
  const int64_t elements = p.rows * p.columns;  // of a matrix
  p.team = p.pack = p.lanes = 1;
  if (!matrices.factored) {
    p.cut = Cut::kFlat;
    p.n_tall = p.n_low = static_cast<int32_t>(std::max<int64_t>(divide_up(record.numel, kItemElements), 1));
  } else if (elements <= kSmallMatrix) {
    p.cut = Cut::kSmall;
    // The lines of a part without elements are many, perhaps.
    p.team = elements > 0 && elements <= kTinyMatrix ? 1 : 32;
    const int64_t teams = kReducingThreads / p.team;
    p.tall_rows = p.low_rows =
        static_cast<int32_t>(std::max<int64_t>(kItemElements / std::max<int64_t>(elements, 1) / teams, 1) * teams);
    p.n_tall = p.n_low = static_cast<int32_t>(std::max<int64_t>(divide_up(p.batch, p.tall_rows), 1));
  } else {
    p.cut = Cut::kTiles;
    cut_tiles(&p, record);
  }
  return p;
}

bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

Kind kind_of(const Record& record, const Partition& p, int element_state) {
  const Dtype dtype = record.param_dtype;
  if (p.cut != Cut::kTiles || p.columns % p.pack != 0 || record.grad_dtype != dtype || !is_aligned(record.param) ||
      !is_aligned(record.average) || !is_aligned(record.copy))
    return Kind::kAny;
  if (dtype != Dtype::kF32 && dtype != Dtype::kBF16) return Kind::kAny;
  // The kernels count the bytes from a thread's row to its next one by 32 bits.
  if (p.columns * 4 * (kReducingThreads / p.lanes) > UINT32_MAX) return Kind::kAny;
  const Kind kind = dtype == Dtype::kF32 ? Kind::kF32 : Kind::kBF16;
  if (element_state < 0) return kind;
  const Dtype state = record.state_dtypes[element_state];
  if (!is_aligned(record.states[element_state])) return Kind::kAny;
  if (state == Dtype::kF32) return kind;
  return dtype == Dtype::kBF16 && state == Dtype::kBF16 ? Kind::kBF16WithBF16State : Kind::kAny;
}

// Assigns every array of a partition its part of the work memory and of the counters.
void assign_memory(Partition* p, const Record& record, LineFactors factors, int64_t* work, int64_t* counters) {
  const int64_t number = record.param_dtype == Dtype::kF64 ? 8 : 4;
  const auto take = [&](int64_t* offset, int64_t n, int64_t size) {
    *offset = *work;
    *work += divide_up(n * size, 16) * 16;
  };
  const bool tiles = p->cut == Cut::kTiles, rows = tiles && factors.of_row > 0,
             columns = tiles && factors.of_column > 0;
  if (p->cut != Cut::kFlat) {
    take(&p->row_factors, p->batch * p->rows * factors.of_row, number);
    take(&p->column_factors, p->batch * p->columns * factors.of_column, number);
    take(&p->matrix_factors, p->batch, number);
  }
  take(&p->row_sums, rows ? p->batch * p->rows * p->n_parts : 0, number);
  take(&p->column_sums, columns ? p->batch * p->n_row_blocks * p->columns : 0, number);
  take(&p->band_sums, columns && p->n_bands > 1 ? p->batch * p->n_bands * p->columns : 0, 8);
  take(&p->state_sums, tiles ? p->batch * p->n_row_blocks : 0, 8);
  take(&p->sums, int64_t{p->n_tall} + p->n_low, 8);
  take(&p->totals, 2, 8);
  take(&p->prepared, kPreparedBytes, 1);
  take(&p->finished, kFinishedBytes, 1);
  p->counters = *counters;
  *counters += 2;
  if (tiles) *counters += p->batch * counters_of_matrix(*p);
}

// Assigns a part's sums their places behind those of the tensors before, whose number is n of each stage.
Part part_of(const Partition& p, const WholeTensor& whole, const ReducingTraits& traits, int64_t* n,
             ReducingTable* table) {
  Part part{whole.rows, whole.columns, whole.numel, 0, 0, 0, 0, 0};
  for (std::vector<std::vector<int64_t>>& of_stage : table->sums) of_stage.emplace_back();
  const auto take = [&](int64_t* at, int stage, bool there, int64_t size) {
    if (!there) return;
    *at = n[stage];
    n[stage] += size;
    table->sums[stage].back().push_back(size);
  };
  const bool lines = p.cut != Cut::kFlat;
  take(&part.of_rows, 0, lines && traits.factors.of_row > 0, p.batch * p.rows);
  take(&part.of_columns, 0, lines && traits.factors.of_column > 0, p.batch * p.columns);
  take(&part.of_param, 0, traits.param_sum, 1);
  take(&part.of_matrices, 1, lines && traits.row_mean, p.batch);
  take(&part.of_update, 2, traits.update_sum, 1);
  return part;
}

void add_items(const Partition& p, const Record& record, int32_t index, bool tall, std::vector<Item>* items) {
  const int64_t n = tall ? p.n_tall : p.n_low, n_rows = tall ? p.tall_rows : p.low_rows;
  Item item{};
  item.record = index;
  const auto add = [&] {
    items->push_back(item);
    ++item.index;
  };
  if (p.cut == Cut::kFlat) {
    for (; item.index < n; item.column += kItemElements) {
      item.n_columns = static_cast<int32_t>(std::min<int64_t>(kItemElements, record.numel - item.column));
      add();
    }
  } else if (p.cut == Cut::kSmall) {
    for (; item.index < n; item.matrix += n_rows) {
      item.n_rows = static_cast<int32_t>(std::min<int64_t>(n_rows, p.batch - item.matrix));
      add();
    }
  } else {
    const int64_t strip = int64_t{p.lanes} * p.pack;
    for (item.matrix = 0; item.matrix < p.batch; ++item.matrix) {
      for (item.row = 0; item.row < p.rows; item.row += n_rows) {
        item.n_rows = static_cast<int32_t>(std::min<int64_t>(n_rows, p.rows - item.row));
        for (item.column = 0; item.column < p.columns; item.column += strip) {
          item.n_columns = static_cast<int32_t>(std::min<int64_t>(strip, p.columns - item.column));
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

ReducingTable build_reducing_table(const std::vector<Record>& records, const ReducingTraits& traits,
                                   const std::vector<WholeTensor>& wholes) {
  ReducingTable table;
  int64_t n_sums[kSumStages] = {};
  table.records = records;
  const int64_t n = static_cast<int64_t>(records.size());
  for (int64_t first = 0; first < n; first += kMaxTensorsPerLaunch) {
    ReducingSegment segment{first, std::min(kMaxTensorsPerLaunch, n - first), {}, {}, {}};
    for (int64_t i = 0; i < segment.n_records; ++i) {
      const Record& record = records[first + i];
      Partition partition = cut(record);
      assign_memory(&partition, record, traits.factors, &table.work_bytes, &table.n_counters);
      table.partitions.push_back(partition);
      if (!wholes.empty()) table.parts.push_back(part_of(partition, wholes[first + i], traits, n_sums, &table));
      table.kinds.push_back(kind_of(record, partition, traits.element_state));
      bool& followed = segment.followed[static_cast<int>(table.kinds.back())];
      followed = followed || record.has_followers();
    }
    for (const bool tall : {true, false}) {
      for (int kind = 0; kind < kKinds; ++kind) {
        const size_t begin = table.items.size();
        for (int64_t i = 0; i < segment.n_records; ++i) {
          if (static_cast<int>(table.kinds[first + i]) == kind)
            add_items(table.partitions[first + i], records[first + i], static_cast<int32_t>(i), tall, &table.items);
        }
        (tall ? segment.tall : segment.low)[kind] =
            Span32{static_cast<int32_t>(begin), static_cast<int32_t>(table.items.size() - begin)};
      }
    }
    table.segments.push_back(segment);
  }
  return table;
}

std::vector<char> ReducingTable::bytes() const {
  std::vector<char> bytes;
  append(&bytes, records);
  append(&bytes, partitions);
  append(&bytes, items);
  append(&bytes, parts);
  bytes.resize(bytes.size() + n_counters * sizeof(uint32_t), 0);
  return bytes;
}

}  // namespace fusedstep::cuda
