// The CUDA engine for rules that reduce: what Python's side calls. No CUDA types, so that plain C++ can include it.
//
// A step is up to three passes: sums of squares, sum of the squares of the update, apply; a launch each for every way
// of storing that occurs in a group. How a tensor is cut into items, and with it the order of every sum, depends on its
// own shape and dtypes alone.
//
// Of parts of tensors a step is made in four stages, those of cpu/reducing.h: between them somebody puts the sums over
// whole tensors in the place of those over the parts.
#pragma once

#include <array>

#include "../reducing_rules.h"
#include "engine.h"

namespace fusedstep::cuda {

enum class Pass { kSums, kUpdate, kApply };

// How a tensor is cut into items, each the work of one block.
enum class Cut : int32_t {
  kFlat,   // runs of elements
  kSmall,  // several whole matrices each, for a warp or a thread every one
  kTiles,  // rows of one matrix, all columns of it or a strip
};

// What the kernels need to know of a tensor beside its record. Partial sums and factors lie in the work memory, at
// offsets in bytes; they are doubles where the parameter is, else floats, unless another type is named.
struct Partition {
  int64_t batch, rows, columns;
  int64_t row_factors, column_factors;  // of each line, kFactors numbers
  int64_t row_sums;                     // [batch][rows][n_parts]
  int64_t column_sums;                  // [batch][n_row_blocks][columns]
  int64_t band_sums;                    // [batch][n_bands][columns], doubles
  int64_t state_sums;                   // [batch][n_row_blocks], doubles: of the rows' first states
  int64_t matrix_factors;               // [batch]
  int64_t sums;                         // doubles: squares of the parameter [n_tall], of the update [n_low]
  int64_t totals;                       // [2], doubles
  int64_t prepared;                     // kPreparedBytes: the rule's scalars
  int64_t finished;                     // kFinishedBytes: what follows from the totals
  int64_t counters;                     // index of the first one
  int32_t n_tall, n_low;                // items of pass 1, and of passes 2 and 3
  int32_t n_row_blocks, n_strips;       // kTiles: tall items of a matrix, down and across
  int32_t n_bands;                      // of kBand blocks of rows
  int32_t n_parts;                      // of a row, of which a warp sums each
  Cut cut;
  int32_t pack;                 // kTiles: neighbours in a row that a thread takes
  int32_t lanes;                // kTiles: threads that take a row of an item, a power of two
  int32_t tall_rows, low_rows;  // kTiles: of an item
  int32_t team;                 // kSmall: threads for each matrix
};

// How many of a tensor's counters each of its matrices has, if it is cut into tiles: one for each block of rows, for
// each strip and its bands, and one of its own.
constexpr int64_t counters_of_matrix(const Partition& p) {
  return p.n_row_blocks + int64_t{p.n_bands + 1} * p.n_strips + 1;
}

// Of a tensor of which a record is a part: how many rows, columns and elements its sums are of; and where the part's
// are, among the numbers of their stages.
struct Part {
  int64_t rows, columns, numel;
  int64_t of_rows, of_columns, of_param;  // of the first stage: [batch][rows], [batch][columns], one
  int64_t of_matrices;                    // of the second: [batch]
  int64_t of_update;                      // of the third: one
};
constexpr int kSumStages = 3;
struct WholeTensor {
  int64_t rows, columns, numel;
};

struct Item {
  int64_t matrix;       // kTiles: its matrix. kSmall: the first one
  int64_t row, column;  // kTiles: the first ones. kFlat: column is the first element
  int32_t n_rows;       // kSmall: how many matrices
  int32_t n_columns;
  int32_t record;  // among those of its launch
  int32_t index;   // among those of its tensor
};

// How a tensor is stored, as far as there are kernels for it. All but the first are tiles whose rows are whole 16-byte
// vectors, of a gradient like the parameter; a state with a number for each element is fp32 unless another is named.
enum class Kind : int32_t { kAny, kF32, kBF16, kBF16WithBF16State, kCount };
constexpr int kKinds = static_cast<int>(Kind::kCount);

struct Span32 {
  int32_t first, n;
};
struct ReducingSegment {
  int64_t first_record, n_records;
  Span32 tall[kKinds], low[kKinds];  // items of each kind
  bool followed[kKinds];             // whether a tensor has an average or a copy
};

// What a table needs to know of a rule.
struct ReducingTraits {
  LineFactors factors;
  int element_state;  // the place of the state that has a number for each element; -1: there is none
  bool param_sum, row_mean, update_sum;
};
template <class Rule>
constexpr ReducingTraits kReducingTraits = {kLineFactors<Rule>, kStateIndex<Rule, Span::kElement>, Rule::kParamSum,
                                            Rule::kRowMean, Rule::kUpdateSum};

// The part of a plan that does not change from step to step.
struct ReducingTable {
  std::vector<Record> records;
  std::vector<Partition> partitions;
  std::vector<Kind> kinds;
  std::vector<Item> items;
  std::vector<ReducingSegment> segments;
  std::vector<Part> parts;  // one for each record, if they are parts; else none
  int64_t n_counters = 0;
  int64_t work_bytes = 0;  // of device memory that needs no values, 16-byte aligned
  // Of parts, the sums of each stage: the sizes of those that each record has, in the order of cpu/reducing.h.
  std::array<std::vector<std::vector<int64_t>>, kSumStages> sums;

  std::vector<char> bytes() const;  // records, partitions, items, parts, zeroed counters
};
// wholes: of each record, if they are parts; else none.
ReducingTable build_reducing_table(const std::vector<Record>& records, const ReducingTraits& traits,
                                   const std::vector<WholeTensor>& wholes = {});

// Queues the update; returns the number of launches. `work` is table.work_bytes of device memory. Throws
// std::runtime_error with CUDA's own words.
int step(const Call& call, ReducingRuleId rule, const ReducingTable& table, char* work);
// The same of one pass, as if the ones before had been made.
int step_pass(const Call& call, ReducingRuleId rule, const ReducingTable& table, char* work, Pass pass);
// The same of a stage of parts, 0 to 3, whose sums are left in numbers[stage]. Nothing is written in the first one.
// numbers: device memory for table.sums of each stage, which must live until the last one has been made.
int step_stage(const Call& call, ReducingRuleId rule, const ReducingTable& table, char* work,
               const std::array<double*, kSumStages>& numbers, int stage);

}  // namespace fusedstep::cuda
