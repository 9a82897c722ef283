#include "plan_ops.h"

#include <algorithm>
#include <cstring>

namespace headrace {
namespace {

Touch reads(const View& v) { return {Touch::Place::arena, v.begin, v.end, v.column, v.column + v.features, false}; }
Touch writes(const View& v) { return {Touch::Place::arena, v.begin, v.end, v.column, v.column + v.features, true}; }
Touch touches_span(const Span& s, bool write) { return {Touch::Place::arena, s.begin, s.end, 0, 1, write}; }
Touch touches_kv(int layer, bool write) { return {Touch::Place::kv, layer, layer + 1, 0, 1, write}; }
Touch touches_partials(bool write) { return {Touch::Place::partials, 0, 1, 0, 1, write}; }

// Rows that make a chunk worth handing to another thread: some microseconds of elementwise work.
struct RowRange {
  int64_t begin, end;
};

int64_t rows_per_chunk(int32_t features) { return std::max<int64_t>(1, 8192 / features); }

int64_t row_chunks(int64_t rows, int32_t features) {
  const int64_t step = rows_per_chunk(features);
  return (rows + step - 1) / step;
}

RowRange row_range(int64_t chunk, int64_t rows, int32_t features) {
  const int64_t step = rows_per_chunk(features);
  return {chunk * step, std::min(rows, (chunk + 1) * step)};
}

// The same of ops between two that all workers run, who wait for its rows in any case.
int64_t shared_rows(const Replay& replay, Rows rows) {
  const int64_t workers = replay.runtime.pool.size();
  return std::clamp<int64_t>((replay.count(rows) + workers - 1) / workers, 1, kMostSharedRows);
}

int64_t shared_chunks(const Replay& replay, Rows rows) {
  const int64_t step = shared_rows(replay, rows);
  return (replay.count(rows) + step - 1) / step;
}

RowRange shared_range(const Replay& replay, Rows rows, int64_t chunk) {
  const int64_t step = shared_rows(replay, rows);
  return {chunk * step, std::min<int64_t>(replay.count(rows), (chunk + 1) * step)};
}

// One row of heads, turned to its position.
void turn(const Replay& replay, const View& x, int64_t row, int32_t head_dim, const Rotation& rotation, float* out) {
  const int64_t angle = int64_t{replay.step.positions[row]} * (rotation.rotary_dim / 2);
  replay.runtime.kernels.rope(replay.at(x, row), x.features / head_dim, head_dim, rotation.rotary_dim,
                              rotation.cos.data() + angle, rotation.sin.data() + angle, out);
}

int64_t chunks_of(const Replay& replay, const View& out) { return row_chunks(replay.count(out.rows), out.features); }

RowRange rows_of(const Replay& replay, const View& out, int64_t chunk) {
  return row_range(chunk, replay.count(out.rows), out.features);
}

}  // namespace

EmbedOp::EmbedOp(const Table& table_, float scale_, const View& out_)
    : Op(OpKind::embed), table(table_), scale(scale_), out(out_) {
  touches = {writes(out)};
}

int64_t EmbedOp::num_chunks(const Replay& replay) const { return chunks_of(replay, out); }

void EmbedOp::run(const Replay& replay, int64_t chunk, int) const {
  const auto [begin, end] = rows_of(replay, out, chunk);
  for (int64_t row = begin; row < end; ++row) {
    float* y = replay.at(out, row);
    decode_row(table.format, table.data + replay.step.token_ids[row] * table.row_bytes, table.features, y);
    if (scale != 1.0f) replay.runtime.kernels.scale(y, out.features, scale);
  }
}

RmsNormOp::RmsNormOp(const View& x_, const float* weight_, int64_t group_, float eps_, const View& out_)
    : Op(OpKind::rms_norm), x(x_), weight(weight_), group(group_), eps(eps_), out(out_) {
  touches = {reads(x), writes(out)};
}

int64_t RmsNormOp::num_chunks(const Replay& replay) const { return chunks_of(replay, out); }

void RmsNormOp::run(const Replay& replay, int64_t chunk, int) const {
  const auto [begin, end] = rows_of(replay, out, chunk);
  for (int64_t row = begin; row < end; ++row) {
    replay.runtime.kernels.rms_norm(replay.at(x, row), out.features, group, weight, eps, replay.at(out, row));
  }
}

PrepareOp::PrepareOp(const View& x_, const InputForm& form_, const Span& out_)
    : Op(OpKind::prepare), x(x_), form(form_), out(out_) {
  touches = {reads(x), touches_span(out, true)};
}

int64_t PrepareOp::num_chunks(const Replay& replay) const { return shared_chunks(replay, x.rows); }

void PrepareOp::run(const Replay& replay, int64_t chunk, int worker) const {
  const int64_t count = replay.count(x.rows);
  const auto [begin, end] = shared_range(replay, x.rows, chunk);
  const auto [first, ld] = rows(replay, begin, end, worker);
  headrace::prepare(form, first - begin * ld, ld, count, x.features, replay.runtime.arena() + out.begin, begin, end);
}

std::pair<const float*, int64_t> PrepareOp::rows(const Replay& replay, int64_t begin, int64_t, int) const {
  return {replay.at(x, begin), x.ld};
}

NormPrepareOp::NormPrepareOp(const View& x_, const float* weight_, int64_t group_, float eps_, const InputForm& form_,
                             const Span& out_)
    : PrepareOp(x_, form_, out_), weight(weight_), group(group_), eps(eps_) {}

std::pair<const float*, int64_t> NormPrepareOp::rows(const Replay& replay, int64_t begin, int64_t end,
                                                     int worker) const {
  float* y = replay.scratch(worker);
  for (int64_t row = begin; row < end; ++row) {
    replay.runtime.kernels.rms_norm(replay.at(x, row), x.features, group, weight, eps, y + (row - begin) * x.features);
  }
  return {y, x.features};
}

GluPrepareOp::GluPrepareOp(GluActivation activation_, const View& gate, const View& up_, const InputForm& form_,
                           const Span& out_)
    : PrepareOp(gate, form_, out_), activation(activation_), up(up_) {
  touches.push_back(reads(up));
}

std::pair<const float*, int64_t> GluPrepareOp::rows(const Replay& replay, int64_t begin, int64_t end,
                                                    int worker) const {
  float* y = replay.scratch(worker);
  for (int64_t row = begin; row < end; ++row) {
    replay.runtime.kernels.glu(activation, replay.at(x, row), replay.at(up, row), x.features,
                               y + (row - begin) * x.features);
  }
  return {y, x.features};
}

LinearOp::LinearOp(const Span& x_, const Linear& linear_, const float* bias_, const View* residual_, int num_workers,
                   const View& out_)
    : Op(OpKind::linear), x(x_), linear(linear_), bias(bias_), out(out_) {
  touches = {touches_span(x, false), writes(out)};
  if (residual_) touches.push_back(reads(residual.emplace(*residual_)));
  // Some chunks more than workers, so that a worker that was held up leaves its share to the others.
  const int64_t tiles = (linear.out_features + linear.column_tile - 1) / linear.column_tile;
  const int64_t wanted = num_workers == 1 ? 1 : 6 * num_workers;
  columns_per_chunk = std::max<int64_t>(1, (tiles + wanted - 1) / wanted) * linear.column_tile;
}

int64_t LinearOp::num_chunks(const Replay& replay) const {
  return replay.count(out.rows) == 0 ? 0 : (linear.out_features + columns_per_chunk - 1) / columns_per_chunk;
}

LinearOp::Columns LinearOp::columns_of(int64_t chunk) const {
  return {chunk * columns_per_chunk, std::min((chunk + 1) * columns_per_chunk, linear.out_features)};
}

void LinearOp::run(const Replay& replay, int64_t chunk, int) const {
  const auto [begin, end] = columns_of(chunk);
  const int64_t rows = replay.count(out.rows);
  linear.run(replay.runtime.arena() + x.begin, rows, replay.at(out), out.ld, begin, end);
  for (int64_t row = 0; (bias || residual) && row < rows; ++row) {
    float* y = replay.at(out, row) + begin;
    if (bias) replay.runtime.kernels.add(y, bias + begin, end - begin, y);
    if (residual) replay.runtime.kernels.add(y, replay.at(*residual, row) + begin, end - begin, y);
  }
}

LogitsOp::LogitsOp(const Span& x_, const Linear& linear_, const float* bias_, int num_workers, const View& out_)
    : LinearOp(x_, linear_, bias_, nullptr, num_workers, out_) {}

int64_t LogitsOp::columns_at_once(int64_t rows) const {
  constexpr int64_t kFloats = 32 << 10;
  return std::clamp(kFloats / rows / linear.column_tile * linear.column_tile, linear.column_tile, columns_per_chunk);
}

int64_t LogitsOp::scratch_floats(int64_t rows) const {
  int64_t most = 0;  // few rows make more columns, many rows at least a tile
  for (int64_t r = 1; r <= rows; ++r) most = std::max(most, r * columns_at_once(r));
  return most;
}

void LogitsOp::run(const Replay& replay, int64_t chunk, int worker) const {
  if (!replay.greedy) return LinearOp::run(replay, chunk, worker);
  const Kernels& kernels = replay.runtime.kernels;
  const auto [begin, end] = columns_of(chunk);
  const int64_t rows = replay.count(out.rows), step = columns_at_once(rows);
  Peak* peaks = replay.peaks + chunk * replay.runtime.limits.max_sampled;
  std::fill_n(peaks, rows, Peak{});
  float* y = replay.scratch(worker);
  for (int64_t n = begin; n < end; n += step) {
    const int64_t count = std::min(step, end - n);
    linear.run(replay.runtime.arena() + x.begin, rows, y - n, step, n, n + count);
    for (int64_t row = 0; row < rows; ++row) {
      float* logits = y + row * step;
      if (bias) kernels.add(logits, bias + n, count, logits);
      Peak found = kernels.peak(logits, count);
      found.index += static_cast<int32_t>(n);
      peaks[row] = higher(peaks[row], found);
    }
  }
}

Peak LogitsOp::peak(const Replay& replay, int64_t row) const {
  Peak found;
  for (int64_t chunk = 0; chunk < max_chunks(); ++chunk)
    found = higher(found, replay.peaks[chunk * replay.runtime.limits.max_sampled + row]);
  return found;
}

AddOp::AddOp(const View& a_, const View& b_, const View& out_) : Op(OpKind::add), a(a_), b(b_), out(out_) {
  touches = {reads(a), reads(b), writes(out)};
}

int64_t AddOp::num_chunks(const Replay& replay) const { return chunks_of(replay, out); }

void AddOp::run(const Replay& replay, int64_t chunk, int) const {
  const auto [begin, end] = rows_of(replay, out, chunk);
  for (int64_t row = begin; row < end; ++row) {
    replay.runtime.kernels.add(replay.at(a, row), replay.at(b, row), out.features, replay.at(out, row));
  }
}

GluOp::GluOp(GluActivation activation_, const View& gate_, const View& up_, const View& out_)
    : Op(OpKind::glu), activation(activation_), gate(gate_), up(up_), out(out_) {
  touches = {reads(gate), reads(up), writes(out)};
}

int64_t GluOp::num_chunks(const Replay& replay) const { return chunks_of(replay, out); }

void GluOp::run(const Replay& replay, int64_t chunk, int) const {
  const auto [begin, end] = rows_of(replay, out, chunk);
  for (int64_t row = begin; row < end; ++row) {
    replay.runtime.kernels.glu(activation, replay.at(gate, row), replay.at(up, row), out.features, replay.at(out, row));
  }
}

RopeOp::RopeOp(const View& x_, int32_t head_dim_, const Rotation& rotation_, const View& out_)
    : Op(OpKind::rope), x(x_), head_dim(head_dim_), rotation(rotation_), out(out_) {
  touches = {reads(x), writes(out)};
}

int64_t RopeOp::num_chunks(const Replay& replay) const { return chunks_of(replay, out); }

void RopeOp::run(const Replay& replay, int64_t chunk, int) const {
  const auto [begin, end] = rows_of(replay, out, chunk);
  for (int64_t row = begin; row < end; ++row) turn(replay, x, row, head_dim, rotation, replay.at(out, row));
}

WriteKvOp::WriteKvOp(const View& k_, const Rotation* rotation_, const View& v_, int index, const KvLayer& layer_,
                     const AttentionShape& shape_)
    : Op(OpKind::write_kv), k(k_), rotation(rotation_), v(v_), layer(layer_), shape(shape_) {
  touches = {reads(k), reads(v), touches_kv(index, true)};
}

int64_t WriteKvOp::num_chunks(const Replay& replay) const { return shared_chunks(replay, Rows::tokens); }

void WriteKvOp::run(const Replay& replay, int64_t chunk, int worker) const {
  const Step& step = replay.step;
  // Two tokens of a pair may share bytes: who writes the first writes the second.
  const auto is_second = [&](int64_t row) {
    return row > 0 && row < step.num_tokens && step.positions[row] % shape.block_size % 2 == 1 &&
           replay.schedule.sequence_of(row) == replay.schedule.sequence_of(row - 1);
  };
  auto [begin, end] = shared_range(replay, Rows::tokens, chunk);
  begin += is_second(begin);
  end += is_second(end);
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* table = step.block_tables + int64_t{replay.schedule.sequence_of(row)} * step.table_width;
    const int32_t position = step.positions[row];
    const float* keys = replay.at(k, row);
    if (rotation) {
      turn(replay, k, row, shape.head_dim, *rotation, replay.scratch(worker));
      keys = replay.scratch(worker);
    }
    replay.runtime.kernels.write_kv(shape, layer, table[position / shape.block_size], position % shape.block_size, keys,
                                    replay.at(v, row));
  }
}

AttentionOp::AttentionOp(const View& q_, const Rotation* rotation_, int index, const KvLayer& layer_,
                         const AttentionShape& shape_, const View& out_)
    : Op(OpKind::attention), q(q_), rotation(rotation_), layer(layer_), shape(shape_), out(out_) {
  touches = {reads(q), touches_kv(index, false), touches_partials(true), writes(out)};
}

int64_t AttentionOp::num_chunks(const Replay& replay) const {
  return static_cast<int64_t>(replay.schedule.chunks().size()) * shape.num_kv_heads;
}

// Sequences differ in length: shares are of equal work.
int64_t AttentionOp::share_begin(const Replay& replay, int64_t chunks, int64_t i, int64_t shares) const {
  const std::vector<int64_t>& before = replay.schedule.costs_before();
  const int64_t work = before.back() * shape.num_kv_heads, wanted = work * i / shares;
  if (wanted == work) return chunks;
  const auto part = std::upper_bound(before.begin(), before.end(), wanted / shape.num_kv_heads) - before.begin() - 1;
  const int64_t rest = wanted - before[part] * shape.num_kv_heads;
  return part * shape.num_kv_heads + rest / (before[part + 1] - before[part]);
}

NextKeys AttentionOp::keys_of(const Replay& replay, int64_t chunk) const {
  if (chunk == num_chunks(replay)) return {};
  const RowChunk& part = replay.schedule.chunks()[chunk / shape.num_kv_heads];
  const int32_t first = replay.step.positions[part.row], last = first + part.num_rows - 1;
  const int32_t unseen = shape.window > 0 ? std::max(first - shape.window + 1, 0) / kTileKeys * kTileKeys : 0;
  return {replay.step.block_tables + int64_t{part.seq} * replay.step.table_width,
          static_cast<int32_t>(chunk % shape.num_kv_heads), std::max(part.split_begin * kSplitKeys, unseen),
          std::min(part.split_end * kSplitKeys, last + 1)};
}

void AttentionOp::run(const Replay& replay, int64_t chunk, int worker) const {
  const RowChunk& part = replay.schedule.chunks()[chunk / shape.num_kv_heads];
  const int32_t kv_head = static_cast<int32_t>(chunk % shape.num_kv_heads);
  float* partial = nullptr;
  if (part.partial >= 0) {
    partial = replay.partials + (int64_t{part.partial} * shape.num_heads + int64_t{kv_head} * shape.group()) *
                                    partial_floats(shape.head_dim);
  }
  const int32_t position = replay.step.positions[part.row];
  const int64_t angle = rotation ? int64_t{position} * (rotation->rotary_dim / 2) : 0;
  const AttentionTask task{replay.step.block_tables + int64_t{part.seq} * replay.step.table_width,
                           replay.at(q, part.row),
                           q.ld,
                           rotation ? rotation->cos.data() + angle : nullptr,
                           rotation ? rotation->sin.data() + angle : nullptr,
                           rotation ? rotation->rotary_dim : 0,
                           replay.at(out, part.row),
                           out.ld,
                           position,
                           part.num_rows,
                           kv_head,
                           part.split_begin,
                           part.split_end,
                           partial,
                           int64_t{part.num_splits} * shape.num_heads * partial_floats(shape.head_dim),
                           keys_of(replay, chunk + 1)};
  replay.runtime.kernels.attend(shape, layer, task, replay.scratch(worker));
}

JoinOp::JoinOp(const AttentionShape& shape_, const View& out_) : Op(OpKind::join), shape(shape_), out(out_) {
  touches = {touches_partials(false), writes(out)};
}

int64_t JoinOp::num_chunks(const Replay& replay) const {
  return static_cast<int64_t>(replay.schedule.split_rows().size());
}

void JoinOp::run(const Replay& replay, int64_t chunk, int worker) const {
  const SplitRow& row = replay.schedule.split_rows()[chunk];
  const int64_t floats = partial_floats(shape.head_dim);
  for (int32_t head = 0; head < shape.num_heads; ++head) {
    replay.runtime.kernels.join(replay.partials + (int64_t{row.partial} * shape.num_heads + head) * floats,
                                row.num_splits, shape.num_heads * floats, shape.head_dim,
                                replay.at(out, row.row) + int64_t{head} * shape.head_dim, replay.scratch(worker));
  }
}

SelectRowsOp::SelectRowsOp(const View& x_, const View& out_) : Op(OpKind::select_rows), x(x_), out(out_) {
  touches = {reads(x), writes(out)};
}

int64_t SelectRowsOp::num_chunks(const Replay& replay) const { return chunks_of(replay, out); }

void SelectRowsOp::run(const Replay& replay, int64_t chunk, int) const {
  const auto [begin, end] = rows_of(replay, out, chunk);
  for (int64_t row = begin; row < end; ++row) {
    std::memcpy(replay.at(out, row), replay.at(x, replay.step.sample_rows[row]), out.features * sizeof(float));
  }
}

SampleOp::SampleOp(const View& logits_, const LogitsOp* source_)
    : Op(OpKind::sample), logits(logits_), source(source_) {
  touches = {reads(logits)};
}

int64_t SampleOp::num_chunks(const Replay& replay) const { return replay.step.num_sampled; }

void SampleOp::run(const Replay& replay, int64_t chunk, int worker) const {
  if (source && replay.greedy) return Sampler::choose(source->peak(replay, chunk), replay.outputs[chunk]);
  replay.samplers[worker].sample(replay.at(logits, chunk), replay.specs[chunk], replay.outputs[chunk]);
}

}  // namespace headrace
