// How the work of a reducing rule is cut and dealt out to threads; the arithmetic is in reducing.cpp.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#include "team.h"

namespace fusedstep::cpu {
namespace {

constexpr int64_t kTileElements = 1 << 16;
// Parameters and gradients of a batch's share for one thread are about as large as the caches behind it.
constexpr int64_t kBatchElementsPerThread = 1 << 19;
constexpr int64_t kBlockColumns = 4096;  // at least, where there are: memory is read along rows
constexpr int64_t kAlignment = 64;

int64_t pieces(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

// Deals out work memory. While `base` is null it only counts.
struct Memory {
  char* base;
  int64_t used = 0;

  char* take(int64_t bytes) {
    char* const address = base == nullptr ? nullptr : base + used;
    used += pieces(bytes, kAlignment) * kAlignment;
    return address;
  }
};

void assign_memory(ReducingTensor& tensor, LineFactors factors, Memory& memory) {
  const Matrices& m = tensor.work->record->matrices;
  const int64_t number = tensor.work->record->param_dtype == Dtype::kF64 ? sizeof(double) : sizeof(float);
  if (tensor.blocks) {
    const int64_t rows = m.batch * m.rows * number, columns = m.batch * m.columns * number;
    if (factors.of_row > 0) tensor.row_sums = memory.take(tensor.column_blocks * rows);
    if (factors.of_column > 0)
      tensor.column_sums = memory.take(tensor.row_blocks * m.batch * tensor.padded_columns() * number);
    tensor.row_factors = memory.take(factors.of_row * rows);
    tensor.column_factors = memory.take(factors.of_column * columns);
    tensor.row_totals = reinterpret_cast<double*>(memory.take(m.batch * tensor.line_blocks() * 8));
  }
  tensor.param_sums = reinterpret_cast<double*>(memory.take(tensor.tiles * 8));
  tensor.update_sums = reinterpret_cast<double*>(memory.take(tensor.tiles * 8));
}

void cut_runs(CacheBatch& cache_batch, ReducingTensor& tensor, int64_t at) {
  const Matrices& m = tensor.work->record->matrices;
  const int64_t size = m.factored ? m.rows * m.columns : 1, n = m.factored ? m.batch : m.columns;
  const int64_t step = std::max<int64_t>(kTileElements / size, 1);
  for (int64_t first = 0; first < n; first += step) {
    cache_batch.tiles.push_back(Tile{at, cache_batch.numel, first, std::min(step, n - first), 0, 0, 0, 0, 0});
    cache_batch.numel += cache_batch.tiles.back().count * size;
  }
}

void cut_blocks(CacheBatch& cache_batch, ReducingTensor& tensor, int64_t at) {
  const Matrices& m = tensor.work->record->matrices;
  const int64_t some_rows = std::max<int64_t>(m.rows, 1), some_columns = std::max<int64_t>(m.columns, 1);
  const int64_t block_rows = std::min(kRowBlock, some_rows),
                target = std::max(kTileElements / block_rows, kBlockColumns);
  // A multiple of the widest pack, so that only a matrix's last columns are a part of one.
  tensor.block_columns = pieces(pieces(some_columns, std::max<int64_t>(some_columns / target, 1)), 16) * 16;
  tensor.row_blocks = pieces(m.rows, kRowBlock);
  tensor.column_blocks = pieces(m.columns, tensor.block_columns);
  const int64_t tile_elements = block_rows * std::min(tensor.block_columns, some_columns);
  const int64_t tile_rows = kRowBlock * std::max<int64_t>(kTileElements / tile_elements, 1);
  for (int64_t matrix = 0; matrix < m.batch; ++matrix) {
    for (int64_t row = 0; row < m.rows; row += tile_rows) {
      for (int64_t column = 0; column < m.columns; column += tensor.block_columns) {
        const int64_t rows = std::min(tile_rows, m.rows - row);
        const int64_t columns = std::min(tensor.block_columns, m.columns - column);
        cache_batch.tiles.push_back(Tile{at, cache_batch.numel, 0, 0, matrix, row, rows, column, columns});
        cache_batch.numel += rows * columns;
      }
    }
    for (const bool columns : {false, true}) {
      const int64_t n = columns ? m.columns : m.rows;
      for (int64_t first = 0; first < n; first += kLineBlock)
        cache_batch.lines.push_back(Lines{at, matrix, columns, first, std::min(kLineBlock, n - first)});
    }
  }
}

// wholes: of each tensor, if they are parts. These are cut into blocks, where sums are at hand between the phases.
std::vector<CacheBatch> cut(const ReducingCall& call, int64_t batch_elements, const WholeTensor* wholes = nullptr) {
  std::vector<CacheBatch> cache_batches;
  for (const ReducingWork& work : call.work) {
    if (cache_batches.empty() || cache_batches.back().numel + work.record->numel > batch_elements)
      cache_batches.push_back(CacheBatch{&call, {}, {}, {}, 0});
    CacheBatch& cache_batch = cache_batches.back();
    const Matrices& m = work.record->matrices;
    ReducingTensor tensor{};
    tensor.work = &work;
    if (wholes != nullptr) tensor.whole = wholes++;
    tensor.blocks = m.factored && (m.rows * m.columns > kRun || work.record->numel == 0 || tensor.whole != nullptr);
    tensor.first_tile = static_cast<int64_t>(cache_batch.tiles.size());
    const int64_t at = static_cast<int64_t>(cache_batch.tensors.size());
    if (tensor.blocks) {
      cut_blocks(cache_batch, tensor, at);
    } else {
      cut_runs(cache_batch, tensor, at);
    }
    tensor.tiles = static_cast<int64_t>(cache_batch.tiles.size()) - tensor.first_tile;
    cache_batch.tensors.push_back(tensor);
  }
  return cache_batches;
}

int64_t bytes_of(std::vector<ReducingTensor>& tensors, LineFactors factors) {
  Memory count{nullptr};
  for (ReducingTensor& tensor : tensors) assign_memory(tensor, factors, count);
  return count.used;
}

LineFactors factors_of(ReducingRuleId id) {
  return visit_reducing_rule(id, [](auto rule) { return kLineFactors<decltype(rule)>; });
}

// The first of the tiles that thread `index` of `size` begins with.
int64_t first_tile(const CacheBatch& cache_batch, int index, int size) {
  const auto before = [](const Tile& tile, int64_t element) { return tile.begin < element; };
  const int64_t element = index == size ? cache_batch.numel : cache_batch.numel / size * index;
  return std::lower_bound(cache_batch.tiles.begin(), cache_batch.tiles.end(), element, before) -
         cache_batch.tiles.begin();
}

// Which sums a rule takes of a tensor.
struct Sums {
  bool rows, columns, param, matrices, update;
};

Sums sums_of(ReducingRuleId id, const ReducingTensor& tensor) {
  const bool lines = tensor.blocks;
  return visit_reducing_rule(id, [&](auto rule) {
    using Rule = decltype(rule);
    const LineFactors factors = kLineFactors<Rule>;
    return Sums{lines && factors.of_row > 0, lines && factors.of_column > 0, Rule::kParamSum, lines && Rule::kRowMean,
                Rule::kUpdateSum};
  });
}

// Adds up the blocks of each line of a tensor, which begin `stride` sums apart.
template <class T>
void add_blocks(const char* sums, int64_t batch, int64_t blocks, int64_t lines, int64_t stride, double* totals) {
  const T* block = reinterpret_cast<const T*>(sums);
  for (int64_t matrix = 0; matrix < batch; ++matrix, totals += lines) {
    for (int64_t i = 0; i < lines; ++i) totals[i] = 0.0;
    for (int64_t b = 0; b < blocks; ++b, block += stride) {
      for (int64_t i = 0; i < lines; ++i) totals[i] += static_cast<double>(block[i]);
    }
  }
}

double total(const double* sums, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += sums[i];
  return sum;
}

}  // namespace

void ReducingParts::Release::operator()(char* memory) const {
  ::operator delete(memory, std::align_val_t{kAlignment});
}

ReducingParts::ReducingParts(ReducingCall call, std::vector<WholeTensor> wholes, int threads)
    : call_(std::move(call)), wholes_(std::move(wholes)), team_(team_size(threads, call_.numel)) {
  waves_ = cut(call_, std::numeric_limits<int64_t>::max(), wholes_.data());
  if (waves_.empty()) return;
  const LineFactors factors = factors_of(call_.rule);
  std::vector<ReducingTensor>& tensors = waves_.front().tensors;
  const auto bytes = static_cast<size_t>(bytes_of(tensors, factors));
  memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment})));
  Memory memory{memory_.get()};
  for (ReducingTensor& tensor : tensors) assign_memory(tensor, factors, memory);
}

int64_t ReducingParts::size(int stage) const {
  int64_t size = 0;
  if (waves_.empty()) return size;
  for (const ReducingTensor& tensor : waves_.front().tensors) {
    const Matrices& m = tensor.work->record->matrices;
    const Sums sums = sums_of(call_.rule, tensor);
    if (stage == 0) size += (sums.rows ? m.batch * m.rows : 0) + (sums.columns ? m.batch * m.columns : 0) + sums.param;
    if (stage == 1 && sums.matrices) size += m.batch;
    if (stage == 2) size += sums.update;
  }
  return size;
}

void ReducingParts::run(int stage, double* numbers) {
  if (waves_.empty()) return;
  CacheBatch& cache_batch = waves_.front();
  const PhaseFunction run_phase = current().run_phase;
  parallel(team_, [&](int index, int size, const auto&) {
    const int64_t first = first_tile(cache_batch, index, size), last = first_tile(cache_batch, index + 1, size);
    const int64_t lines = static_cast<int64_t>(cache_batch.lines.size());
    if (stage == 0) run_phase(cache_batch, Phase::kSums, first, last);
    if (stage == 1) run_phase(cache_batch, Phase::kLines, lines * index / size, lines * (index + 1) / size);
    if (stage == 2) run_phase(cache_batch, Phase::kDirections, first, last);
    if (stage == 3) {
      run_phase(cache_batch, Phase::kUpdate, first, last);
      if (index == 0) run_phase(cache_batch, Phase::kTensors, 0, static_cast<int64_t>(cache_batch.tensors.size()));
    }
  });
  for (ReducingTensor& tensor : cache_batch.tensors) {
    const Record& record = *tensor.work->record;
    const Matrices& m = record.matrices;
    const Sums sums = sums_of(call_.rule, tensor);
    const auto add_lines = record.param_dtype == Dtype::kF64 ? add_blocks<double> : add_blocks<float>;
    if (stage == 0 && sums.rows) {
      add_lines(tensor.row_sums, m.batch, tensor.column_blocks, m.rows, m.rows, numbers);
      tensor.whole_rows = numbers;
      numbers += m.batch * m.rows;
    }
    if (stage == 0 && sums.columns) {
      add_lines(tensor.column_sums, m.batch, tensor.row_blocks, m.columns, tensor.padded_columns(), numbers);
      tensor.whole_columns = numbers;
      numbers += m.batch * m.columns;
    }
    if (stage == 0 && sums.param) {
      *numbers = total(tensor.param_sums, tensor.tiles);
      tensor.whole_param = numbers++;
    }
    if (stage == 1 && sums.matrices) {
      for (int64_t i = 0; i < m.batch; ++i)
        numbers[i] = total(tensor.row_totals + i * tensor.line_blocks(), tensor.line_blocks());
      tensor.whole_matrices = numbers;
      numbers += m.batch;
    }
    if (stage == 2 && sums.update) {
      *numbers = total(tensor.update_sums, tensor.tiles);
      tensor.whole_update = numbers++;
    }
    if (stage == 3) *record.step = next_counter(*record.step);
  }
}

void reducing_step(const ReducingCall& call, int threads) {
  const int team = team_size(threads, call.numel);
  std::vector<CacheBatch> cache_batches = cut(call, kBatchElementsPerThread * team);
  const LineFactors factors = factors_of(call.rule);
  // A thread may be in the next batch while another is still in this one: they take turns in two parts of the memory.
  int64_t bytes[2] = {0, 0};
  for (size_t i = 0; i < cache_batches.size(); ++i) {
    bytes[i % 2] = std::max(bytes[i % 2], bytes_of(cache_batches[i].tensors, factors));
  }
  const std::align_val_t alignment{kAlignment};
  const auto release = [&](char* memory) { ::operator delete(memory, alignment); };
  const std::unique_ptr<char, decltype(release)> memory(
      static_cast<char*>(::operator new(static_cast<size_t>(bytes[0] + bytes[1]), alignment)), release);
  for (size_t i = 0; i < cache_batches.size(); ++i) {
    Memory part{memory.get() + (i % 2) * bytes[0]};
    for (ReducingTensor& tensor : cache_batches[i].tensors) assign_memory(tensor, factors, part);
  }

  const PhaseFunction run_phase = current().run_phase;
  parallel(team, [&](int index, int size, const auto& wait) {
    for (const CacheBatch& cache_batch : cache_batches) {
      const int64_t first = first_tile(cache_batch, index, size), last = first_tile(cache_batch, index + 1, size);
      run_phase(cache_batch, Phase::kSums, first, last);
      wait();
      if (!cache_batch.lines.empty()) {
        const int64_t lines = static_cast<int64_t>(cache_batch.lines.size());
        run_phase(cache_batch, Phase::kLines, lines * index / size, lines * (index + 1) / size);
        wait();
        run_phase(cache_batch, Phase::kDirections, first, last);
        wait();
      }
      run_phase(cache_batch, Phase::kUpdate, first, last);
      if (index == 0) run_phase(cache_batch, Phase::kTensors, 0, static_cast<int64_t>(cache_batch.tensors.size()));
    }
  });
  for (const ReducingWork& work : call.work) *work.record->step = next_counter(*work.record->step);
}

}  // namespace fusedstep::cpu
