// The CPU engine for rules that reduce: how the tensors of a call are cut, where their sums lie, and the phases that
// the pieces go through. The cuts depend on shapes alone, and every sum is taken in the order of its pieces: the bits
// do not depend on the number of threads.
#pragma once

#include <memory>
#include <vector>

#include "../reducing_rules.h"
#include "step.h"

namespace fusedstep::cpu {

// A tensor that takes part in this step.
struct ReducingWork {
  const Record* record;
  const void* grad;
};

struct ReducingCall : Step {
  ReducingRuleId rule;
  std::vector<ReducingWork> work;
  int64_t numel;  // of all tensors together
};

// Of a tensor of which a record is a part: how many rows, columns and elements its sums are of.
struct WholeTensor {
  int64_t rows, columns, numel;
};

// Updates everything on up to `threads` threads and then advances the step counters.
void reducing_step(const ReducingCall& call, int threads);

// What follows is between the two parts of the engine.

constexpr int64_t kRun = 1024;       // elements that are worked on at once, where statistics are local
constexpr int64_t kRowBlock = 64;    // rows whose columns are summed together
constexpr int64_t kLineBlock = 512;  // lines that are finished together

// A tensor in a batch. Matrices of up to kRun elements, and flat tensors, are cut into runs of whole matrices
// (elements): their statistics are at hand wherever the elements are. Larger matrices are cut into blocks, and the sums
// of a row or column have a part for each column or row block. Sums and factors are float, or double for a double
// parameter.
struct ReducingTensor {
  const ReducingWork* work;
  bool blocks;
  int64_t row_blocks, column_blocks, block_columns;
  int64_t first_tile, tiles;
  char *row_sums, *column_sums;        // [batch][column_blocks][rows], [batch][row_blocks][padded_columns()]
  char *row_factors, *column_factors;  // [factors][batch][rows], [factors][batch][columns]
  double* row_totals;                  // [batch][blocks of kLineBlock rows]: of the rows' first state
  double *param_sums, *update_sums;    // [tiles]: of squares
  // Of a part, with sums over the whole tensor in place of those above once its stages have left them; else null.
  const WholeTensor* whole;
  const double *whole_rows, *whole_columns;  // [batch][rows], [batch][columns]
  const double* whole_matrices;              // [batch]: of the rows' first state
  const double *whole_param, *whole_update;  // one number

  // Sums of columns are whole packs: what a processor has just stored under a mask it is slow to load.
  int64_t padded_columns() const { return (work->record->matrices.columns + 15) / 16 * 16; }
  int64_t line_blocks() const { return (work->record->matrices.rows + kLineBlock - 1) / kLineBlock; }
};

// What one thread takes at a time.
struct Tile {
  int64_t tensor;                      // in its batch
  int64_t begin;                       // elements of the batch before it
  int64_t first, count;                // runs: matrices, or elements of a flat tensor
  int64_t matrix;                      // blocks: the matrix, and the part of it
  int64_t row, rows, column, columns;  // `row` begins a row block, `column` a column block
};

// Rows or columns of one matrix.
struct Lines {
  int64_t tensor, matrix;
  bool columns;
  int64_t first, count;
};

// Tensors that go through the phases together: few enough for their numbers to stay in the caches from one phase to the
// next, enough to occupy all threads.
struct CacheBatch {
  const ReducingCall* call;
  std::vector<ReducingTensor> tensors;
  std::vector<Tile> tiles;
  std::vector<Lines> lines;
  int64_t numel;
};

enum class Phase {
  kSums,        // tiles: squares of parameters; of gradients, by row and column; runs: of directions too
  kLines,       // lines: states and factors
  kDirections,  // tiles: squares of directions, in blocks
  kUpdate,      // tiles: parameters, and states of elements; runs: states of lines too
  kTensors,     // tensors: states that have one number
};

// Takes the pieces [first, last) of a batch through a phase. All before it must have been through the phase before.
using PhaseFunction = void (*)(const CacheBatch& cache_batch, Phase phase, int64_t first, int64_t last);

// A step on parts of tensors, in stages. Each leaves its sums over the parts in `numbers`, tensor after tensor; before
// the next one somebody puts those over whole tensors there. `numbers` must live until the last stage has run.
//   0: of squares, of each row [batch][rows] and column [batch][columns], if the rule has such lines and the tensor is
//      no flat one; and of the parameter, if the rule needs it
//   1: of the first state of the rows of each matrix [batch], if the rule needs it and the tensor is no flat one
//   2: of the directions, if the rule needs it
//   3: no sums; everything is updated, and the step counters advance
class ReducingParts {
 public:
  ReducingParts(ReducingCall call, std::vector<WholeTensor> wholes, int threads);
  ReducingParts(const ReducingParts&) = delete;
  ReducingParts& operator=(const ReducingParts&) = delete;

  void run(int stage, double* numbers);
  int64_t size(int stage) const;  // of `numbers`

 private:
  struct Release {
    void operator()(char* memory) const;
  };
  ReducingCall call_;
  std::vector<WholeTensor> wholes_;
  int team_;
  std::vector<CacheBatch> waves_;  // one
  std::unique_ptr<char, Release> memory_;
};

}  // namespace fusedstep::cpu
