#include "plan.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "plan_ops.h"

namespace headrace {
namespace {

using Clock = std::chrono::steady_clock;

bool collide(const Touch& a, const Touch& b) {
  if (a.place != b.place || !(a.write || b.write)) return false;
  if (a.end <= b.begin || b.end <= a.begin) return false;
  const bool same_buffer = a.begin == b.begin && a.end == b.end;
  return !same_buffer || (a.column_begin < b.column_end && b.column_begin < a.column_end);
}

bool conflict(const Op& a, const Op& b) {
  return std::any_of(a.touches.begin(), a.touches.end(), [&](const Touch& x) {
    return std::any_of(b.touches.begin(), b.touches.end(), [&](const Touch& y) { return collide(x, y); });
  });
}

}  // namespace

const char* op_kind_name(OpKind kind) {
  constexpr const char* kNames[kNumOpKinds] = {"embed", "rms_norm", "prepare",   "linear", "add",         "glu",
                                               "rope",  "write_kv", "attention", "join",   "select_rows", "sample"};
  return kNames[static_cast<int>(kind)];
}

Plan::Plan(Runtime& runtime)
    : runtime_(runtime),
      max_shares_((runtime.pool.size() + 15) / 16 * 16),  // a cache line, or more, to an op
      checker_(runtime.limits, runtime.cache),
      schedule_(runtime.pool.size(), runtime.limits) {
  specs.reserve(runtime.limits.max_sampled);
  outputs.reserve(runtime.limits.max_sampled);
}

void Plan::append(std::unique_ptr<Op> op) {
  int i = static_cast<int>(ops_.size()) - 1;
  while (i >= 0 && !conflict(*ops_[i], *op)) --i;
  op->last_conflict = i;
  ops_.push_back(std::move(op));
  taken_.reset();
}

void Plan::reserve_scratch(int64_t floats) {
  scratch_bytes_ = std::max<int64_t>(scratch_bytes_, (floats * 4 + 4095) / 4096 * 4096);
}

void Plan::embed(int table, float scale, const View& out) {
  append(std::make_unique<EmbedOp>(runtime_.table(table), scale, out));
}

void Plan::rms_norm(const View& x, int weight, int64_t group, float eps, const View& out) {
  append(std::make_unique<RmsNormOp>(x, runtime_.vector(weight).data(), group, eps, out));
}

void Plan::prepare(const View& x, int linear, const Span& out) {
  append(std::make_unique<PrepareOp>(x, runtime_.linear(linear).form, out));
}

void Plan::norm_prepare(const View& x, int weight, int64_t group, float eps, int linear, const Span& out) {
  reserve_scratch(kMostSharedRows * x.features);
  append(std::make_unique<NormPrepareOp>(x, runtime_.vector(weight).data(), group, eps, runtime_.linear(linear).form,
                                         out));
}

void Plan::glu_prepare(GluActivation activation, const View& gate, const View& up, int linear, const Span& out) {
  reserve_scratch(kMostSharedRows * gate.features);
  append(std::make_unique<GluPrepareOp>(activation, gate, up, runtime_.linear(linear).form, out));
}

void Plan::linear(const Span& x, int linear, int bias, const View* residual, const View& out) {
  append(std::make_unique<LinearOp>(x, runtime_.linear(linear), vector_or_null(bias), residual, runtime_.pool.size(),
                                    out));
}

void Plan::add(const View& a, const View& b, const View& out) { append(std::make_unique<AddOp>(a, b, out)); }

void Plan::glu(GluActivation activation, const View& gate, const View& up, const View& out) {
  append(std::make_unique<GluOp>(activation, gate, up, out));
}

void Plan::rope(const View& x, int32_t head_dim, int rotation, const View& out) {
  append(std::make_unique<RopeOp>(x, head_dim, runtime_.rotation(rotation), out));
}

void Plan::attention(const View& q, int q_rotation, const View& k, int k_rotation, const View& v, int layer,
                     const AttentionShape& shape, const View& out) {
  const auto rotation = [&](int i) { return i < 0 ? nullptr : &runtime_.rotation(i); };
  const KvLayer& kv = runtime_.kv_layer(layer);
  append(std::make_unique<WriteKvOp>(k, rotation(k_rotation), v, layer, kv, shape));
  append(std::make_unique<AttentionOp>(q, rotation(q_rotation), layer, kv, shape, out));
  reserve_scratch(k.features);
  append(std::make_unique<JoinOp>(shape, out));
  // One division of rows serves all layers, so it heeds the layer with the most query heads to a KV head.
  const int32_t rows = std::max(1, runtime_.kernels.max_queries / shape.group());
  rows_per_chunk_ = std::min(rows_per_chunk_, rows);
  const int64_t queries = int64_t{rows} * shape.group();
  reserve_scratch(attention_scratch_floats(queries, shape.head_dim));
  partial_floats_ = std::max(partial_floats_, shape.num_heads * headrace::partial_floats(shape.head_dim));
}

void Plan::select_rows(const View& x, const View& out) { append(std::make_unique<SelectRowsOp>(x, out)); }

void Plan::sample(const View& logits) { append(std::make_unique<SampleOp>(logits, nullptr)); }

void Plan::sample_linear(const Span& x, int linear, int bias, const View& logits) {
  auto op = std::make_unique<LogitsOp>(x, runtime_.linear(linear), vector_or_null(bias), runtime_.pool.size(), logits);
  const LogitsOp& source = *op;
  reserve_scratch(source.scratch_floats(runtime_.limits.max_sampled));
  peaks_.resize(source.max_chunks() * runtime_.limits.max_sampled);
  append(std::move(op));
  append(std::make_unique<SampleOp>(logits, &source));
}

const float* Plan::vector_or_null(int i) const { return i < 0 ? nullptr : runtime_.vector(i).data(); }

void Plan::ready() {
  scratch_ = Pages(scratch_bytes_ * runtime_.pool.size());
  partials_ = Pages(sizeof(float) * partial_floats_ * schedule_.max_partials());
  samplers_.clear();
  for (int i = 0; i < runtime_.pool.size(); ++i) samplers_.emplace_back(runtime_.kernels, runtime_.limits.vocab_size);
  taken_ = std::make_unique<std::atomic<int32_t>[]>(ops_.size() * max_shares_);  // last: it says that all is there
}

void Plan::replay(const Step& step, bool timed) {
  checker_.check(step);
  if (!taken_) ready();
  schedule_.plan(step, rows_per_chunk_);
  std::for_each_n(taken_.get(), ops_.size() * max_shares_, [](auto& n) { n.store(0, std::memory_order_relaxed); });
  const bool greedy = std::all_of(specs.begin(), specs.end(), [](const SampleSpec& s) { return s.is_greedy(); });
  const Replay replay{runtime_,         step,           schedule_,    reinterpret_cast<float*>(partials_.data()),
                      scratch_.data(),  scratch_bytes_, specs.data(), outputs.data(),
                      samplers_.data(), greedy,         peaks_.data()};
  Walk shared{*this, replay, timed};
  runtime_.pool.run(
      [](void* context, int worker) {
        auto& job = *static_cast<Walk*>(context);
        job.plan.walk(job.replay, worker, job.timed);
      },
      &shared);
}

// A worker takes the chunks of its own share in order, then what others have left of theirs. Linears and attention have
// a share for each worker, so that each mostly reads on through memory instead of leaping over what the others read.
// Other ops have one.
void Plan::run_op(const Replay& replay, size_t i, int64_t chunks, int worker) {
  const Op& op = *ops_[i];
  const int64_t shares = op.num_shares(replay);
  for (int64_t k = 0; k < shares; ++k) {
    const int64_t share = (worker + k) % shares, begin = op.share_begin(replay, chunks, share, shares);
    const int64_t count = op.share_begin(replay, chunks, share + 1, shares) - begin;
    std::atomic<int32_t>& taken = taken_[i * max_shares_ + share];
    if (taken.load(std::memory_order_relaxed) >= count) continue;
    for (int64_t n; (n = taken.fetch_add(1, std::memory_order_relaxed)) < count;) op.run(replay, begin + n, worker);
  }
}

void Plan::walk(const Replay& replay, int worker, bool timed) {
  int last_barrier = 0;       // the first op after it
  bool any_parallel = false;  // among the ops since then
  int64_t barriers = 0;
  auto mark = timed ? Clock::now() : Clock::time_point();
  for (size_t i = 0; i < ops_.size(); ++i) {
    const int64_t chunks = ops_[i]->num_chunks(replay);
    if (chunks == 0) continue;
    const bool parallel = chunks > 1;
    if (ops_[i]->last_conflict >= last_barrier && (parallel || any_parallel)) {
      runtime_.pool.barrier();
      last_barrier = static_cast<int>(i);
      any_parallel = false;
      ++barriers;
    }
    any_parallel |= parallel;
    if (parallel) {
      run_op(replay, i, chunks, worker);
    } else if (worker == 0) {
      ops_[i]->run(replay, 0, worker);
    }
    if (timed && worker == 0) {
      const auto now = Clock::now();
      OpProfile& profile = profile_[static_cast<int>(ops_[i]->kind)];
      profile.seconds += std::chrono::duration<double>(now - mark).count();
      ++profile.runs;
      mark = now;
    }
  }
  if (worker == 0) num_barriers_ = barriers;
}

}  // namespace headrace
