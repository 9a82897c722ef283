// One step as the native executor sees it: borrowed arrays, checked once, and the division of attention into tasks.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime.h"

namespace headrace {

// See headrace.engine.step.Step for what each array holds.
struct Step {
  const int32_t* token_ids;
  const int32_t* positions;
  const int32_t* seq_starts;
  const int32_t* context_lens;
  const int32_t* block_tables;
  const int32_t* sample_rows;
  int32_t num_tokens, num_seqs, num_sampled;
  int32_t table_width;
};

class StepChecker {
 public:
  StepChecker(const Limits& limits, const KvCache& cache);

  // Throws std::invalid_argument, naming the entry, for anything that would read or write outside its place, and for a
  // block that the step writes and that stands in its tables more than once: what is read from it would be chance.
  void check(const Step& step);

 private:
  void check_sequence(const Step& step, int32_t s) const;
  void check_written_blocks(const Step& step);

  const Limits limits_;
  const KvCache cache_;
  int64_t steps_ = 0;
  std::vector<int64_t> written_;  // [num_blocks], the last step that writes each
};

// Consecutive rows of one sequence whose attention one worker computes, per KV head.
struct RowChunk {
  int32_t seq, row, num_rows;
  int32_t split_begin, split_end;  // splits of kSplitKeys positions
  // Slot of the unfinished result of the first row; num_splits lie from there to the next row's. -1: the chunk finishes
  // by itself.
  int32_t partial, num_splits;
};

// A row whose splits were computed apart.
struct SplitRow {
  int32_t row, partial, num_splits;
};

// How a step's rows are divided for attention. Which worker computes what depends on the batch and the threads; what is
// computed does not.
class AttentionSchedule {
 public:
  AttentionSchedule(int num_threads, const Limits& limits);
  void plan(const Step& step, int32_t max_rows);

  const std::vector<RowChunk>& chunks() const { return chunks_; }
  // The work of all chunks before each, one more than there are chunks: of rows times keys.
  const std::vector<int64_t>& costs_before() const { return costs_before_; }
  const std::vector<SplitRow>& split_rows() const { return split_rows_; }
  int32_t max_partials() const { return max_partials_; }
  int32_t sequence_of(int32_t row) const { return seq_of_row_[row]; }

 private:
  int32_t num_workers_, max_partials_;
  std::vector<RowChunk> chunks_;
  std::vector<int64_t> costs_before_;
  std::vector<SplitRow> split_rows_;
  std::vector<int32_t> seq_of_row_;
};

}  // namespace headrace
