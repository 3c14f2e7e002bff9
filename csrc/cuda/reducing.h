// The CUDA engine for rules that reduce: what Python's side calls. No CUDA types, so that plain C++ can include it.
//
// A step is up to three launches over the same items: sums of squares, sum of the squares of the update, apply. How a
// tensor is cut into items, and with it the order of every sum, depends on its own shape alone.
#pragma once

#include "engine.h"

namespace fusedstep::cuda {

// How a tensor is cut into items, each the work of one block at a time.
enum class Cut : int32_t {
  kFlat,   // runs of elements
  kSmall,  // several whole matrices each, for a warp or a thread every one
  kTiles,  // rows of one matrix, all columns of it or some strips
};

// The most columns that a warp sums at a time: what its threads' registers hold.
constexpr int kStrip = 512;

// What the kernels need to know of a tensor beside its record. Partial sums and factors lie in the work memory, at
// offsets in bytes; they are doubles where the parameter is, else floats.
struct Partition {
  int64_t batch, rows, columns;
  int64_t row_factors, column_factors;  // of each line, kFactors numbers
  int64_t row_sums;                     // [batch][rows][n_strips]
  int64_t column_sums;                  // [batch][n_row_blocks][columns]
  int64_t state_sums;                   // [batch][n_row_blocks], doubles: of the rows' first states
  int64_t matrix_factors;               // [batch]
  int64_t sums;                         // [2][n_items], doubles: squares of the parameter, and of the update
  int64_t totals;                       // [2], doubles
  int64_t counters;                     // index of the first one
  int32_t n_items, n_row_blocks, n_strips, n_groups;
  Cut cut;
  int32_t strip;         // columns of a strip
  int32_t item_rows;     // kTiles: rows of an item
  int32_t item_columns;  // kTiles: columns of an item, a multiple of `strip`
  int32_t team;          // kSmall: threads for each matrix
};

struct Item {
  int64_t matrix;       // kTiles: its matrix. kSmall: the first one
  int64_t row, column;  // kTiles: the first ones. kFlat: column is the first element
  int32_t n_rows;       // kSmall: how many matrices
  int32_t n_columns;
  int32_t record;  // among those of its launch
  int32_t index;   // among those of its tensor
};

// The part of a plan that does not change from step to step.
struct ReducingTable {
  std::vector<Record> records;
  std::vector<Partition> partitions;
  std::vector<Item> items;
  std::vector<Segment> segments;  // their block chunks are items
  int64_t n_counters = 0;
  int64_t work_bytes = 0;  // of device memory that needs no values, 16-byte aligned

  std::vector<char> bytes() const;  // records, partitions, items, zeroed counters (first one for each segment)
};
ReducingTable build_reducing_table(const std::vector<Record>& records, const std::vector<Matrices>& matrices,
                                   LineFactors factors);

// Queues the update; returns the number of launches. `work` is table.work_bytes of device memory. Throws
// std::runtime_error with CUDA's own words.
int step(const Call& call, ReducingRuleId rule, const ReducingTable& table, char* work);

}  // namespace fusedstep::cuda
