// A model compiled to an array of ops over an arena of buffers, replayed for every step by all threads together.
//
// The number of rows is a run-time value, so one plan serves decode, prefill and any mix. An op is divided into chunks,
// which workers take from counters. No op divides a reduction but attention, every 512 keys wherever it runs. A
// barrier stands only before an op that touches what ops since the last barrier have touched, and not even there if all
// of them and it are single chunks: those worker 0 runs one after the other.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "runtime.h"
#include "sampler.h"
#include "step.h"

namespace headrace {

enum class Rows : uint8_t { tokens, sampled };

// Columns [column, column + features) of a buffer [rows, ld] of floats at bytes [begin, end) of the arena.
struct View {
  int64_t begin, end;
  int32_t ld, column, features;
  Rows rows;
};

// Bytes of the arena that hold a converted activation.
struct Span {
  int64_t begin, end;
};

enum class OpKind : uint8_t {
  embed,
  rms_norm,
  prepare,
  linear,
  add,
  glu,
  rope,
  write_kv,
  attention,
  join,
  select_rows,
  sample
};
constexpr int kNumOpKinds = 12;
const char* op_kind_name(OpKind kind);

// What ops read of a replay in progress.
struct Replay {
  Runtime& runtime;
  const Step& step;
  const AttentionSchedule& schedule;
  float* partials;  // [max_partials][num_heads][partial_floats] of the layer at work
  uint8_t* worker_scratch;
  int64_t scratch_stride;
  const SampleSpec* specs;
  const SampleOutput* outputs;
  Sampler* samplers;  // one per worker
  bool greedy;        // all sampled rows are
  Peak* peaks;        // of a greedy step's logits: [chunk of columns][max_sampled]

  int32_t count(Rows rows) const { return rows == Rows::tokens ? step.num_tokens : step.num_sampled; }
  float* at(const View& view, int64_t row = 0) const {
    return reinterpret_cast<float*>(runtime.arena() + view.begin) + row * view.ld + view.column;
  }
  float* scratch(int worker) const { return reinterpret_cast<float*>(worker_scratch + worker * scratch_stride); }
};

// Something an op touches: a range of the arena, or one of the places outside it.
struct Touch {
  enum class Place : uint8_t { arena, kv, partials } place;
  int64_t begin, end;
  int32_t column_begin, column_end;
  bool write;
};

class Op {
 public:
  explicit Op(OpKind kind_) : kind(kind_) {}
  virtual ~Op() = default;
  // How many chunks this replay's rows make; 0: nothing to do. The same on every worker.
  virtual int64_t num_chunks(const Replay& replay) const = 0;
  virtual void run(const Replay& replay, int64_t chunk, int worker) const = 0;
  // How many shares a step's chunks lie in, see Plan::run_op, and where share `i` of them begins.
  virtual int64_t num_shares(const Replay&) const { return 1; }
  virtual int64_t share_begin(const Replay&, int64_t chunks, int64_t i, int64_t shares) const {
    return chunks * i / shares;
  }

  const OpKind kind;
  std::vector<Touch> touches;
  int last_conflict = -1;  // the latest earlier op that touches the same
};

struct OpProfile {
  double seconds = 0;  // on worker 0, waiting for the others included
  int64_t runs = 0;
};

class Plan {
 public:
  explicit Plan(Runtime& runtime);

  void embed(int table, float scale, const View& out);
  void rms_norm(const View& x, int weight, int64_t group, float eps, const View& out);
  // Each makes what `linear` reads: of x, of its norm, or of a gated unit.
  void prepare(const View& x, int linear, const Span& out);
  void norm_prepare(const View& x, int weight, int64_t group, float eps, int linear, const Span& out);
  void glu_prepare(GluActivation activation, const View& gate, const View& up, int linear, const Span& out);
  // bias: a vector's number, or -1; residual: added to the result, or null.
  void linear(const Span& x, int linear, int bias, const View* residual, const View& out);
  void add(const View& a, const View& b, const View& out);
  void glu(GluActivation activation, const View& gate, const View& up, const View& out);
  void rope(const View& x, int32_t head_dim, int rotation, const View& out);
  // Rotations: of queries and of keys, to be turned by on the way, or -1.
  void attention(const View& q, int q_rotation, const View& k, int k_rotation, const View& v, int layer,
                 const AttentionShape& shape, const View& out);
  void select_rows(const View& x, const View& out);
  void sample(const View& logits);
  // `linear`, then `sample`; `logits` is written only by steps that need more of it than the highest.
  void sample_linear(const Span& x, int linear, int bias, const View& logits);

  // What the sampled rows of the next replay ask for, and where their results go: one entry each, filled by the caller.
  // They keep their memory from step to step.
  std::vector<SampleSpec> specs;
  std::vector<SampleOutput> outputs;

  // Run all ops. Throws std::invalid_argument for a step that does not fit; nothing is run then. Allocates nothing,
  // except the first time.
  void replay(const Step& step, bool timed);

  const std::array<OpProfile, kNumOpKinds>& profile() const { return profile_; }
  size_t num_ops() const { return ops_.size(); }
  int64_t num_barriers() const { return num_barriers_; }  // of the last replay
  Runtime& runtime() { return runtime_; }

 private:
  struct Walk {
    Plan& plan;
    const Replay& replay;
    bool timed;
  };

  void append(std::unique_ptr<Op> op);
  void reserve_scratch(int64_t floats);  // of each worker
  const float* vector_or_null(int i) const;
  void ready();  // make what replays need, once the ops are known
  void walk(const Replay& replay, int worker, bool timed);
  void run_op(const Replay& replay, size_t i, int64_t chunks, int worker);

  Runtime& runtime_;
  std::vector<std::unique_ptr<Op>> ops_;
  std::unique_ptr<std::atomic<int32_t>[]> taken_;  // [op][share], see run_op
  int64_t max_shares_;
  StepChecker checker_;
  AttentionSchedule schedule_;
  int32_t rows_per_chunk_ = std::numeric_limits<int32_t>::max();
  int64_t scratch_bytes_ = 0, partial_floats_ = 0;
  Pages scratch_, partials_;
  std::vector<Sampler> samplers_;
  std::vector<Peak> peaks_;
  std::array<OpProfile, kNumOpKinds> profile_{};
  int64_t num_barriers_ = 0;
};

}  // namespace headrace
