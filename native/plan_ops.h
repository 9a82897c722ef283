// The ops of a plan: small structs that know their operands, how they divide, and which kernel runs a chunk.
#pragma once

#include <optional>
#include <utility>

#include "plan.h"

namespace headrace {

struct EmbedOp final : Op {
  EmbedOp(const Table& table, float scale, const View& out);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  const Table& table;
  float scale;
  View out;
};

struct RmsNormOp final : Op {
  RmsNormOp(const View& x, const float* weight, int64_t group, float eps, const View& out);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  View x;
  const float* weight;
  int64_t group;
  float eps;
  View out;
};

// Converts rows to what a linear kernel reads. Subclasses compute the rows first, a tile at a time, into the worker's
// scratch: nothing else reads them.
// Rows of a chunk, at most, of an op that all workers wait for: each takes its part even of few.
constexpr int64_t kMostSharedRows = 16;

struct PrepareOp : Op {
  PrepareOp(const View& x, const InputForm& form, const Span& out);
  int64_t num_chunks(const Replay& replay) const final;
  void run(const Replay& replay, int64_t chunk, int worker) const final;
  // A pointer to the first row, and the distance between rows.
  virtual std::pair<const float*, int64_t> rows(const Replay& replay, int64_t begin, int64_t end, int worker) const;
  View x;
  InputForm form;
  Span out;
};

struct NormPrepareOp final : PrepareOp {
  NormPrepareOp(const View& x, const float* weight, int64_t group, float eps, const InputForm& form, const Span& out);
  std::pair<const float*, int64_t> rows(const Replay& replay, int64_t begin, int64_t end, int worker) const override;
  const float* weight;
  int64_t group;
  float eps;
};

struct GluPrepareOp final : PrepareOp {
  GluPrepareOp(GluActivation activation, const View& gate, const View& up, const InputForm& form, const Span& out);
  std::pair<const float*, int64_t> rows(const Replay& replay, int64_t begin, int64_t end, int worker) const override;
  GluActivation activation;
  View up;
};

struct LinearOp : Op {
  // The columns of a chunk.
  struct Columns {
    int64_t begin, end;
  };

  LinearOp(const Span& x, const Linear& linear, const float* bias, const View* residual, int num_workers,
           const View& out);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  int64_t num_shares(const Replay& replay) const override { return replay.runtime.pool.size(); }
  Span x;
  const Linear& linear;
  const float* bias;
  std::optional<View> residual;
  int64_t columns_per_chunk;
  View out;

 protected:
  Columns columns_of(int64_t chunk) const;
};

struct AddOp final : Op {
  AddOp(const View& a, const View& b, const View& out);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  View a, b, out;
};

struct GluOp final : Op {
  GluOp(GluActivation activation, const View& gate, const View& up, const View& out);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  GluActivation activation;
  View gate, up, out;
};

struct RopeOp final : Op {
  RopeOp(const View& x, int32_t head_dim, const Rotation& rotation, const View& out);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  View x;
  int32_t head_dim;
  const Rotation& rotation;
  View out;
};

// Keys are turned to their positions on the way, if there is a rotation.
struct WriteKvOp final : Op {
  WriteKvOp(const View& k, const Rotation* rotation, const View& v, int index, const KvLayer& layer,
            const AttentionShape& shape);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  View k;
  const Rotation* rotation;
  View v;
  KvLayer layer;
  AttentionShape shape;
};

// Queries are turned to their positions on the way, if there is a rotation.
struct AttentionOp final : Op {
  AttentionOp(const View& q, const Rotation* rotation, int index, const KvLayer& layer, const AttentionShape& shape,
              const View& out);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  int64_t num_shares(const Replay& replay) const override { return replay.runtime.pool.size(); }
  int64_t share_begin(const Replay& replay, int64_t chunks, int64_t i, int64_t shares) const override;
  NextKeys keys_of(const Replay& replay, int64_t chunk) const;
  View q;
  const Rotation* rotation;
  KvLayer layer;
  AttentionShape shape;
  View out;
};

// Joins the splits of rows that were computed apart; most steps have none.
struct JoinOp final : Op {
  JoinOp(const AttentionShape& shape, const View& out);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  AttentionShape shape;
  View out;
};

struct SelectRowsOp final : Op {
  SelectRowsOp(const View& x, const View& out);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  View x, out;
};

// The linear that makes logits. Of a greedy step it writes none: its chunks leave the peaks of their columns.
struct LogitsOp final : LinearOp {
  LogitsOp(const Span& x, const Linear& linear, const float* bias, int num_workers, const View& out);
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  // The highest logit of a row of a greedy step.
  Peak peak(const Replay& replay, int64_t row) const;
  // Floats of scratch, for steps of at most `rows` rows.
  int64_t scratch_floats(int64_t rows) const;
  int64_t max_chunks() const { return (linear.out_features + columns_per_chunk - 1) / columns_per_chunk; }

 private:
  // Of logits made at a time: as many as stay in L1 and L2, and at least a tile.
  int64_t columns_at_once(int64_t rows) const;
};

struct SampleOp final : Op {
  // `source`: what makes the logits, if it leaves peaks, or null.
  SampleOp(const View& logits, const LogitsOp* source);
  int64_t num_chunks(const Replay& replay) const override;
  void run(const Replay& replay, int64_t chunk, int worker) const override;
  View logits;
  const LogitsOp* source;
};

}  // namespace headrace
