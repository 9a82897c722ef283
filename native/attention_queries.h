// What attention over any cache shares: the queries of a task, the online softmax over their scores, and how results
// of splits join. Included by attention*_kernels.cpp and attention*_amx.cpp only (see vectors.h).
#pragma once

#include "attention_tiles.h"
#include "kernel_table.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

constexpr float kNegativeInfinity = -__builtin_inff();
constexpr float kLog2e = 1.44269504088896341f;  // scores are taken in units of ln 2: weights are powers of two

int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// Working memory, part by part.
struct Scratch {
  float* end;  // of what is taken

  template <typename T = float>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(end);
    end += count * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(float));
    return part;
  }
};

// The queries of one task and what they hold. State of query i at state + i * stride: [sum of weighted values | 16 sums
// of weights, by lane of the key | maximum], see partial_floats.
struct Queries {
  int64_t dim, stride;
  int32_t count, group, first_position, window;
  float* q;                           // [batch][dim][kBatch]
  float* state;                       // [count padded to 16][stride]
  float* joined;                      // state of the splits before
  float *maxima, *decays, *subtract;  // [count] padded to 16: highest score so far; of the tile: factor, and offset
  float* scores;                      // [count][kTileKeys], then weights
  float *key_scales, *value_scales;   // [kTileKeys] of the tile, in a scaled format
  float* copy;                        // of a tile as f32: its keys, then, in their place, its values
  float* end;                         // of what these take of the scratch

  Queries(const AttentionShape& shape, const AttentionTask& task, float* scratch)
      : dim(padded_dim(shape.head_dim)),
        stride(partial_floats(shape.head_dim)),
        count(task.num_rows * shape.group()),
        group(shape.group()),
        first_position(task.first_position),
        window(shape.window) {
    Scratch parts{scratch};
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    q = parts.take(batched() * dim);
    state = parts.take(padded * stride);
    joined = parts.take(count * stride);
    maxima = parts.take(padded);
    decays = parts.take(padded);
    subtract = parts.take(padded);
    scores = parts.take(count * kTileKeys);
    key_scales = parts.take(kTileKeys);
    value_scales = parts.take(kTileKeys);
    copy = parts.take(kTileKeys * dim);
    end = parts.end;
  }

  // Queries of whole batches.
  int64_t batched() const { return (int64_t{count} + kBatch - 1) / kBatch * kBatch; }
  int32_t position(int32_t i) const { return first_position + i / group; }
  int32_t first_key(int32_t i) const { return window > 0 && position(i) >= window ? position(i) - window + 1 : 0; }
  // Positions of the tile at `begin` that query i sees: [low, high), nothing if low >= high.
  int32_t low(int32_t i, int32_t begin) const { return larger(first_key(i) - begin, 0); }
  int32_t high(int32_t i, int32_t begin) const { return smaller(position(i) + 1 - begin, kTileKeys); }
};

// A position of one KV head of a sequence.
struct Position {
  const int32_t* block_table;
  int32_t kv_head, index;
};

// What lies `tiles` tiles after the run at `run`: in the same task, in what comes after it, or, where there is nothing,
// at `otherwise`.
HEADRACE_INLINE Position run_ahead(const AttentionTask& task, const Queries& queries, int32_t run, int32_t tiles,
                                   int32_t otherwise) {
  const int32_t end = smaller(queries.position(queries.count - 1) + 1, task.split_end * kSplitKeys);
  const int32_t ahead = run + tiles * kTileKeys, beyond = ahead - (end + kTileKeys - 1) / kTileKeys * kTileKeys;
  if (ahead < end) return {task.block_table, task.kv_head, ahead};
  const NextKeys& next = task.next;
  if (beyond >= 0 && next.begin + beyond < next.end) return {next.block_table, next.kv_head, next.begin + beyond};
  return {task.block_table, task.kv_head, otherwise};
}

// Call `body<N>(first)` for the queries in batches of N <= kBatch.
template <int N, typename Body>
HEADRACE_INLINE void rest(int32_t first, int32_t count, Body body) {
  if constexpr (N > 0) {
    if (count - first == N) return body.template operator()<N>(first);
    rest<N - 1>(first, count, body);
  }
}

template <typename Body>
HEADRACE_INLINE void each_batch(int32_t count, Body body) {
  int32_t first = 0;
  for (; first + kBatch <= count; first += kBatch) body.template operator()<kBatch>(first);
  rest<kBatch - 1>(first, count, body);
}

// Scale and mask one query's scores of a tile; returns the highest of each lane.
template <bool kScaled, bool kMasked>
HEADRACE_INLINE f32x16 highest(float* scores, const float* key_scales, int low, int high) {
  f32x16 best = broadcast(kNegativeInfinity);
#pragma GCC unroll 4
  for (int g = 0; g < kTileVectors; ++g) {
    f32x16 s = load(scores + g * kLanes);
    if (kScaled) s = s * load(key_scales + g * kLanes);
    if (kMasked) {
      const i32x16 ids = lane_ids() + g * static_cast<int>(kLanes);
      s = select((ids >= low) & (ids < high), s, broadcast(kNegativeInfinity));
    }
    if (kScaled || kMasked) store(scores + g * kLanes, s);
    best = max(s, best);
  }
  return best;
}

// What a tile's highest scores change: the highest so far, what is subtracted from scores, what older sums shrink by.
struct Peaks {
  f32x16 maxima, subtract, decays;

  HEADRACE_INLINE Peaks(f32x16 before, f32x16 found)
      : maxima(max(before, found)),
        subtract(select(maxima == kNegativeInfinity, f32x16{}, maxima)),  // of a query that has seen nothing yet
        decays(exp2(before - subtract)) {}
};

// Turn the scores of a tile into weights, and take note of their maxima, their sums, and what older sums shrink by.
template <bool kScaled>
void soften(const Queries& queries, int32_t begin) {
  const bool whole = queries.low(queries.count - 1, begin) == 0 && queries.high(0, begin) == kTileKeys;
  for (int32_t first = 0; first < queries.count; first += kLanes) {
    f32x16 found = broadcast(kNegativeInfinity);  // (through memory a vector would wait for all that was stored before)
    for (int32_t i = first; i < smaller(first + kLanes, queries.count); ++i) {
      float* scores = queries.scores + i * kTileKeys;
      const f32x16 lanes =
          whole ? highest<kScaled, false>(scores, queries.key_scales, 0, 0)
                : highest<kScaled, true>(scores, queries.key_scales, queries.low(i, begin), queries.high(i, begin));
      found = select(lane_ids() == i - first, broadcast(max(lanes)), found);
    }
    const Peaks peaks(load(queries.maxima + first), found);
    store(queries.maxima + first, peaks.maxima);
    store(queries.subtract + first, peaks.subtract);
    store(queries.decays + first, peaks.decays);
  }
  for (int32_t i = 0; i < queries.count; ++i) {
    float *weights = queries.scores + i * kTileKeys, *sums = queries.state + i * queries.stride + queries.dim;
    const f32x16 subtract = broadcast(queries.subtract[i]);
    f32x16 total = {};
#pragma GCC unroll 4
    for (int g = 0; g < kTileVectors; ++g) {
      f32x16 w = exp2(load(weights + g * kLanes) - subtract);
      total = total + w;
      if (kScaled) w = select(w == f32x16{}, f32x16{}, w * load(queries.value_scales + g * kLanes));  // unseen
      store(weights + g * kLanes, w);
    }
    store(sums, load(sums) * queries.decays[i] + total);
  }
}

// Whether tiles can be read in place.
HEADRACE_INLINE bool is_aligned(const AttentionShape& shape) {
  return shape.block_size % kLanes == 0 && shape.head_dim % kLanes == 0;
}

void clear_state(float* state, int64_t count, int64_t dim, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < dim + kLanes; d += kLanes) store(state + i * stride + d, f32x16{});
    state[i * stride + dim + kLanes] = kNegativeInfinity;
  }
}

// Fold the result of the next split into what the splits before it made. Splits that saw no key leave no trace.
void fold(float* into, const float* next, int64_t dim) {
  const int64_t sums = dim + kLanes;
  if (next[sums] == kNegativeInfinity) return;
  if (into[sums] == kNegativeInfinity) {
    __builtin_memcpy(into, next, (sums + 1) * sizeof(float));
    return;
  }
  const float peak = into[sums] > next[sums] ? into[sums] : next[sums];
  const f32x16 a = exp2(broadcast(into[sums] - peak)), b = exp2(broadcast(next[sums] - peak));
  for (int64_t d = 0; d < sums; d += kLanes) store(into + d, multiply_add(load(into + d), a, load(next + d) * b));
  into[sums] = peak;
}

void finish(const float* state, int64_t dim, int32_t head_dim, float* out) {
  const float factor = 1.0f / sum(load(state + dim));
  int32_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(out + d, load(state + d) * factor);
  if (d < head_dim) store_part(out + d, load_part(state + d, head_dim - d) * factor, head_dim - d);
}

// The features of each query, turned to its position: `take(i, features)`.
template <typename Take>
void each_query(const AttentionShape& shape, const AttentionTask& task, const Queries& queries, Take take) {
  for (int32_t i = 0; i < queries.count; ++i) {
    const int64_t head = int64_t{task.kv_head} * queries.group + i % queries.group;
    const float* source = task.q + i / queries.group * task.ldq + head * shape.head_dim;
    if (task.cos) {
      const int64_t angle = i / queries.group * (task.rotary_dim / 2);
      rope(source, 1, shape.head_dim, task.rotary_dim, task.cos + angle, task.sin + angle, queries.copy);
      source = queries.copy;
    }
    take(i, source);
  }
}

// A task: `attend_split(split)` leaves the results of one split in the queries' state.
template <typename AttendSplit>
void attend_splits(const AttentionShape& shape, const AttentionTask& task, const Queries& queries,
                   AttendSplit attend_split) {
  const int64_t dim = queries.dim, stride = queries.stride;
  if (task.partial) {
    attend_split(task.split_begin);
    for (int32_t row = 0; row < task.num_rows; ++row) {
      const int64_t floats = queries.group * stride;
      __builtin_memcpy(task.partial + row * task.partial_row, queries.state + row * floats, floats * sizeof(float));
    }
    return;
  }
  clear_state(queries.joined, queries.count, dim, stride);
  for (int32_t split = task.split_begin; split < task.split_end; ++split) {
    attend_split(split);
    for (int32_t i = 0; i < queries.count; ++i) fold(queries.joined + i * stride, queries.state + i * stride, dim);
  }
  for (int32_t i = 0; i < queries.count; ++i) {
    const int64_t head = int64_t{task.kv_head} * queries.group + i % queries.group;
    finish(queries.joined + i * stride, dim, shape.head_dim,
           task.out + i / queries.group * task.ldo + head * shape.head_dim);
  }
}

// The tiles of one split in order: `attend_tile(begin, end)` with the first position of each and the end of them all,
// and `flush()` after the last.
template <typename AttendTile, typename Flush>
void each_tile(const Queries& queries, int32_t split, AttendTile attend_tile, Flush flush) {
  const int32_t end = smaller((split + 1) * kSplitKeys, queries.position(queries.count - 1) + 1);
  const int32_t first = larger(split * kSplitKeys, queries.first_key(0) / kTileKeys * kTileKeys);
  clear_state(queries.state, queries.count, queries.dim, queries.stride);
  for (int32_t i = 0; i < queries.count; i += kLanes) store(queries.maxima + i, broadcast(kNegativeInfinity));
  for (int32_t begin = first; begin < end; begin += kTileKeys) attend_tile(begin, end);
  flush();
  for (int32_t i = 0; i < queries.count; ++i) {
    float* sums = queries.state + i * queries.stride + queries.dim;
    const float total = sum(load(sums));
    sums[kLanes] = total == total ? queries.maxima[i] : total;  // else it would be lost where no other key is seen
  }
}

template <typename AttendTile>
void each_tile(const Queries& queries, int32_t split, AttendTile attend_tile) {
  each_tile(queries, split, attend_tile, [] {});
}

}  // namespace
}  // namespace headrace::HEADRACE_KERNELS
