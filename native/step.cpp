#include "step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace headrace {
namespace {

void expect(bool condition, const char* what, int64_t index, int64_t value) {
  if (condition) return;
  throw std::invalid_argument(std::string(what) + " [" + std::to_string(index) + "] is " + std::to_string(value));
}

int32_t num_splits(int32_t keys) { return (keys + kSplitKeys - 1) / kSplitKeys; }

}  // namespace

StepChecker::StepChecker(const Limits& limits, const KvCache& cache)
    : limits_(limits), cache_(cache), written_(cache.num_blocks) {}

void StepChecker::check_sequence(const Step& step, int32_t s) const {
  const int32_t begin = step.seq_starts[s], end = step.seq_starts[s + 1], length = step.context_lens[s];
  expect(begin < end && end <= step.num_tokens, "seq_starts", s + 1, end);
  expect(length >= end - begin && length <= limits_.max_positions, "context_lens", s, length);
  for (int32_t row = begin; row < end; ++row) {
    expect(step.positions[row] == length - (end - row), "positions", row, step.positions[row]);
    expect(step.token_ids[row] >= 0 && step.token_ids[row] < limits_.vocab_size, "token_ids", row, step.token_ids[row]);
  }
  const int32_t blocks = (length + cache_.block_size - 1) / cache_.block_size;
  expect(blocks <= step.table_width, "context_lens (beyond its block table)", s, length);
  const int32_t* table = step.block_tables + int64_t{s} * step.table_width;
  for (int32_t i = 0; i < blocks; ++i)
    expect(table[i] >= 0 && table[i] < cache_.num_blocks, "block_tables", s, table[i]);
}

void StepChecker::check_written_blocks(const Step& step) {
  ++steps_;
  const auto visit = [&](bool write) {
    for (int32_t s = 0; s < step.num_seqs; ++s) {
      const int32_t length = step.context_lens[s], rows = step.seq_starts[s + 1] - step.seq_starts[s];
      const int32_t kept = (length - rows) / cache_.block_size, last = (length - 1) / cache_.block_size;
      const int32_t* table = step.block_tables + int64_t{s} * step.table_width;
      for (int32_t i = write ? kept : 0; i < (write ? last + 1 : kept); ++i) {
        expect(written_[table[i]] != steps_, "block_tables (a block written elsewhere in this step)", s, table[i]);
        if (write) written_[table[i]] = steps_;
      }
    }
  };
  visit(true);
  visit(false);
}

void StepChecker::check(const Step& step) {
  expect(step.num_tokens > 0 && step.num_tokens <= limits_.max_tokens, "token_ids (length)", 0, step.num_tokens);
  expect(step.num_seqs > 0 && step.num_seqs <= limits_.max_sampled, "context_lens (length)", 0, step.num_seqs);
  expect(step.num_sampled <= limits_.max_sampled, "sample_rows (length)", 0, step.num_sampled);
  expect(step.seq_starts[0] == 0, "seq_starts", 0, step.seq_starts[0]);
  expect(step.seq_starts[step.num_seqs] == step.num_tokens, "seq_starts", step.num_seqs,
         step.seq_starts[step.num_seqs]);
  for (int32_t s = 0; s < step.num_seqs; ++s) check_sequence(step, s);
  check_written_blocks(step);
  for (int32_t r = 0, last = -1; r < step.num_sampled; last = step.sample_rows[r++]) {
    expect(step.sample_rows[r] > last && step.sample_rows[r] < step.num_tokens, "sample_rows", r, step.sample_rows[r]);
  }
}

AttentionSchedule::AttentionSchedule(int num_threads, const Limits& limits)
    : num_workers_(num_threads),
      max_partials_(num_threads > 1 ? 4 * num_threads * num_splits(limits.max_positions) : 0),
      seq_of_row_(limits.max_tokens) {
  chunks_.reserve(limits.max_tokens + max_partials_);
  costs_before_.reserve(chunks_.capacity() + 1);
  split_rows_.reserve(4 * num_threads);
}

void AttentionSchedule::plan(const Step& step, int32_t max_rows) {
  chunks_.clear();
  split_rows_.clear();
  // Few rows leave workers idle: give them the splits of each.
  const bool apart = max_partials_ > 0 && step.num_tokens < 4 * num_workers_;
  int32_t partials = 0;
  for (int32_t s = 0; s < step.num_seqs; ++s) {
    const int32_t begin = step.seq_starts[s], end = step.seq_starts[s + 1];
    std::fill(seq_of_row_.begin() + begin, seq_of_row_.begin() + end, s);
    for (int32_t row = begin, rows = 0; row < end; row += rows) {
      rows = std::min(max_rows, end - row);
      const int32_t splits = num_splits(step.positions[row + rows - 1] + 1);
      if (!apart || splits == 1) {
        chunks_.push_back({s, row, rows, 0, splits, -1, 0});
        continue;
      }
      for (int32_t i = 0; i < splits; ++i) chunks_.push_back({s, row, rows, i, i + 1, partials + i, splits});
      for (int32_t i = 0; i < rows; ++i, partials += splits) split_rows_.push_back({row + i, partials, splits});
    }
  }
  // Longest first, so that the last ones to be taken are short.
  const auto cost = [&](const RowChunk& c) {
    return int64_t{c.num_rows} *
           std::min((c.split_end - c.split_begin) * kSplitKeys, step.positions[c.row + c.num_rows - 1] + 1);
  };
  std::sort(chunks_.begin(), chunks_.end(), [&](const RowChunk& a, const RowChunk& b) {
    return cost(a) != cost(b) ? cost(a) > cost(b) : (a.row != b.row ? a.row < b.row : a.split_begin < b.split_begin);
  });
  costs_before_.assign(1, 0);
  for (const RowChunk& chunk : chunks_) costs_before_.push_back(costs_before_.back() + cost(chunk));
}

}  // namespace headrace
