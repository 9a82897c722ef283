// Paged attention with an online softmax (FlashAttention-2, arXiv:2307.08691): f32 arithmetic over f32, bf16 or int8
// caches.
//
// A query (one row, one query head) walks its keys in tiles of 64 positions that start at multiples of 64, in ascending
// order, and its tiles in splits of 512: what it computes depends on its position and the cache alone. Queries of one
// KV head are batched so that each key and value loaded serves several; a batch changes who computes, not what. Few
// queries read the cache in place, many read a copy of the tile widened to f32: the same values, so the same sums.
// Compiled once per instruction set (see vectors.h).
#include "attention_tiles.h"
#include "kernel_table.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

constexpr float kNegativeInfinity = -__builtin_inff();
constexpr float kLog2e = 1.44269504088896341f;  // scores are taken in units of ln 2: weights are powers of two

int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// The queries of one task and what they hold. State of query i at state + i * stride: [sum of weighted values | 16 sums
// of weights, by lane of the key | maximum], see partial_floats.
struct Queries {
  int64_t dim, stride;
  int32_t count, group, first_position, window;
  float* q;  // [batch][dim][kBatch], scaled
  float* state;
  float* joined;                      // state of the splits before
  float *maxima, *decays, *subtract;  // [count] padded to 16: highest score so far; of the tile: factor, and offset
  float* scores;                      // [count][kTileKeys], then weights
  float *key_scales, *value_scales;   // [kTileKeys] of the tile, in a scaled format
  float* copy;                        // of a tile as f32: its keys, then, in their place, its values

  Queries(const AttentionShape& shape, const AttentionTask& task, float* scratch)
      : dim(padded_dim(shape.head_dim)),
        stride(partial_floats(shape.head_dim)),
        count(task.num_rows * shape.group()),
        group(shape.group()),
        first_position(task.first_position),
        window(shape.window) {
    const auto take = [&scratch](int64_t floats) {
      float* part = scratch;
      scratch += floats;
      return part;
    };
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    q = take((count + kBatch - 1) / kBatch * kBatch * dim);
    state = take(count * stride);
    joined = take(count * stride);
    maxima = take(padded);
    decays = take(padded);
    subtract = take(padded);
    scores = take(count * kTileKeys);
    key_scales = take(kTileKeys);
    value_scales = take(kTileKeys);
    copy = take(kTileKeys * dim);
  }

  int32_t position(int32_t i) const { return first_position + i / group; }
  int32_t first_key(int32_t i) const { return window > 0 && position(i) >= window ? position(i) - window + 1 : 0; }
  // Positions of the tile at `begin` that query i sees: [low, high), nothing if low >= high.
  int32_t low(int32_t i, int32_t begin) const { return larger(first_key(i) - begin, 0); }
  int32_t high(int32_t i, int32_t begin) const { return smaller(position(i) + 1 - begin, kTileKeys); }
};

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

// Scale and mask one query's scores of a tile; returns the highest.
template <bool kScaled, bool kMasked>
HEADRACE_INLINE float highest(float* scores, const float* key_scales, int low, int high) {
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
  return max(best);
}

template <bool kScaled>
void find_highest(const Queries& queries, int32_t begin) {
  const int32_t count = queries.count;
  float *scores = queries.scores, *found = queries.subtract;
  const float* key_scales = queries.key_scales;
  if (queries.low(count - 1, begin) == 0 && queries.high(0, begin) == kTileKeys) {  // all see the whole tile
    for (int32_t i = 0; i < count; ++i) found[i] = highest<kScaled, false>(scores + i * kTileKeys, key_scales, 0, 0);
    return;
  }
  for (int32_t i = 0; i < count; ++i) {
    found[i] =
        highest<kScaled, true>(scores + i * kTileKeys, key_scales, queries.low(i, begin), queries.high(i, begin));
  }
}

// Turn the scores of a tile into weights, and take note of their maxima, their sums, and what older sums shrink by.
template <bool kScaled>
void soften(const Queries& queries, int32_t begin) {
  find_highest<kScaled>(queries, begin);
  for (int32_t i = 0; i < queries.count; i += kLanes) {
    const f32x16 before = load(queries.maxima + i), now = max(before, load(queries.subtract + i));
    const f32x16 finite = select(now == kNegativeInfinity, f32x16{}, now);  // of a query that has seen nothing yet
    store(queries.maxima + i, now);
    store(queries.subtract + i, finite);
    store(queries.decays + i, exp2(before - finite));
  }
  for (int32_t i = 0; i < queries.count; ++i) {
    float *weights = queries.scores + i * kTileKeys, *sums = queries.state + i * queries.stride + queries.dim;
    const f32x16 subtract = broadcast(queries.subtract[i]);
    f32x16 total = {};
#pragma GCC unroll 4
    for (int g = 0; g < kTileVectors; ++g) {
      f32x16 w = exp2(load(weights + g * kLanes) - subtract);
      total = total + w;
      if (kScaled) w = w * load(queries.value_scales + g * kLanes);
      store(weights + g * kLanes, w);
    }
    store(sums, load(sums) * queries.decays[i] + total);
  }
}

// `fill` makes the values ready once the keys are no longer needed.
template <bool kInPlace, bool kScaled, typename T, typename Fill>
void attend_tile(const Queries& queries, const Tile<T>& tile, int32_t begin, Fill fill) {
  each_batch(queries.count, [&]<int N>(int32_t first) {
    const int32_t high = queries.high(first + N - 1, begin);
    if (queries.low(first, begin) >= high) return;
    score<N, kInPlace>(queries.q + first * queries.dim, queries.dim, tile, (high + kLanes - 1) / kLanes,
                       queries.scores + first * kTileKeys);
  });
  soften<kScaled>(queries, begin);
  fill();
  each_batch(queries.count, [&]<int N>(int32_t first) {
    const int32_t low = queries.low(first, begin), high = queries.high(first + N - 1, begin);
    if (low >= high) return;
    sum_values<N, kInPlace>(queries.scores + first * kTileKeys, queries.decays + first, tile, low, high,
                            queries.state + first * queries.stride, queries.stride, queries.dim);
  });
}

// Where the KV head of a task keeps its part of the block of a position.
template <typename T>
struct Place {
  const T *keys, *values;
  const float *key_scales, *value_scales;

  Place(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, int32_t position) {
    const int64_t block = task.block_table[position / shape.block_size] * layer.block_bytes;
    const int64_t head = task.kv_head * shape.head_values(), scale = int64_t{task.kv_head} * shape.block_size;
    keys = reinterpret_cast<const T*>(layer.keys + block) + head;
    values = reinterpret_cast<const T*>(layer.values + block) + head;
    key_scales = reinterpret_cast<const float*>(layer.key_scales + block) + scale;
    value_scales = reinterpret_cast<const float*>(layer.value_scales + block) + scale;
  }
};

// A tile whose runs of 16 each lie in one block, read in place.
template <typename T>
Tile<T> tile_in_place(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task,
                      const Queries& queries, int32_t begin, int32_t end) {
  const int32_t context = queries.position(queries.count - 1) + 1;  // the next split's first tile is fetched early, too
  Tile<T> tile;
  tile.key_stride = shape.block_size;
  tile.value_stride = shape.head_dim;
  for (int g = 0; g < kTileVectors; ++g) {
    const int32_t run = begin + g * static_cast<int32_t>(kLanes), position = run < end ? run : begin;
    const int32_t offset = position % shape.block_size;
    const Place<T> place(shape, layer, task, position);
    tile.keys[g] = place.keys + offset;
    tile.values[g] = place.values + int64_t{offset} * shape.head_dim;
    if constexpr (is_scaled<T>) {
      store(queries.key_scales + g * kLanes, load(place.key_scales + offset));
      store(queries.value_scales + g * kLanes, load(place.value_scales + offset));
    }
    const int32_t next = run + kTileKeys < context ? run + kTileKeys : position, next_offset = next % shape.block_size;
    const Place<T> ahead(shape, layer, task, next);
    tile.next_keys[g] = ahead.keys + next_offset;
    if constexpr (is_scaled<T>) {
      __builtin_prefetch(ahead.key_scales + next_offset);
      __builtin_prefetch(ahead.value_scales + next_offset);
    }
  }
  return tile;
}

Tile<float> tile_of_copy(const Queries& queries) {
  Tile<float> tile;
  tile.key_stride = kTileKeys;
  tile.value_stride = queries.dim;
  for (int g = 0; g < kTileVectors; ++g) {
    tile.keys[g] = tile.next_keys[g] = queries.copy + g * kLanes;
    tile.values[g] = queries.copy + g * kLanes * queries.dim;
  }
  return tile;
}

// A tile as f32, all runs side by side: each waits for memory of its own.
template <typename T>
void widen_keys(const Queries& queries, Tile<T> tile) {
  const int64_t dim = queries.dim;
  float* copy = queries.copy;
  for (int64_t d = 0; d < dim; ++d) {
    fetch(tile.values, d * kLanes);
#pragma GCC unroll 4
    for (int g = 0; g < kTileVectors; ++g)
      store(copy + d * kTileKeys + g * kLanes, load(tile.keys[g] + d * tile.key_stride));
  }
}

template <typename T>
void widen_values(const Queries& queries, Tile<T> tile) {
  const int64_t run = kLanes * queries.dim;
  float* copy = queries.copy;
  for (int64_t i = 0; i < run; i += kLanes) {
    fetch(tile.next_keys, i);
#pragma GCC unroll 4
    for (int g = 0; g < kTileVectors; ++g) store(copy + g * run + i, load(tile.values[g] + i));
  }
}

float widen(float value) { return value; }
float widen(int8_t value) { return value; }
float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Any block size and head dimension: the tile's tokens as f32, one by one, zeros where there are none.
template <typename T>
void gather_keys(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, const Queries& queries,
                 int32_t begin, int32_t end) {
  __builtin_memset(queries.copy, 0, kTileKeys * queries.dim * sizeof(float));
  for (int32_t position = begin; position < smaller(end, begin + kTileKeys); ++position) {
    const int32_t offset = position % shape.block_size, j = position - begin;
    const Place<T> place(shape, layer, task, position);
    if constexpr (is_scaled<T>) {
      queries.key_scales[j] = place.key_scales[offset];
      queries.value_scales[j] = place.value_scales[offset];
    }
    for (int32_t d = 0; d < shape.head_dim; ++d)
      queries.copy[d * kTileKeys + j] = widen(place.keys[int64_t{d} * shape.block_size + offset]);
  }
}

template <typename T>
void gather_values(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, const Queries& queries,
                   int32_t begin, int32_t end) {
  __builtin_memset(queries.copy, 0, kTileKeys * queries.dim * sizeof(float));
  for (int32_t position = begin; position < smaller(end, begin + kTileKeys); ++position) {
    const int32_t offset = position % shape.block_size, j = position - begin;
    const T* values = Place<T>(shape, layer, task, position).values + int64_t{offset} * shape.head_dim;
    for (int32_t d = 0; d < shape.head_dim; ++d) queries.copy[j * queries.dim + d] = widen(values[d]);
  }
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
  for (int64_t d = 0; d < sums; d += kLanes) store(into + d, load(into + d) * a + load(next + d) * b);
  into[sums] = peak;
}

void finish(const float* state, int64_t dim, int32_t head_dim, float* out) {
  const float factor = 1.0f / sum(load(state + dim));
  int32_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(out + d, load(state + d) * factor);
  if (d < head_dim) store_part(out + d, load_part(state + d, head_dim - d) * factor, head_dim - d);
}

// Scaled copies of the queries' features, turned to their positions, those of a batch side by side, padded with zeros.
void gather_queries(const AttentionShape& shape, const AttentionTask& task, const Queries& queries) {
  const float factor = shape.scale * kLog2e;
  for (int32_t i = 0; i < queries.count; ++i) {
    const int64_t head = int64_t{task.kv_head} * queries.group + i % queries.group;
    const float* source = task.q + i / queries.group * task.ldq + head * shape.head_dim;
    if (task.cos) {
      const int64_t angle = i / queries.group * (task.rotary_dim / 2);
      rope(source, 1, shape.head_dim, task.rotary_dim, task.cos + angle, task.sin + angle, queries.copy);
      source = queries.copy;
    }
    float* q = queries.q + i / kBatch * kBatch * queries.dim + i % kBatch;
    for (int32_t d = 0; d < shape.head_dim; ++d) q[d * kBatch] = source[d] * factor;
    for (int64_t d = shape.head_dim; d < queries.dim; ++d) q[d * kBatch] = 0.0f;
  }
}

template <typename T>
void attend_split(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, const Queries& queries,
                  int32_t split) {
  const int32_t end = smaller((split + 1) * kSplitKeys, queries.position(queries.count - 1) + 1);
  const int32_t first = larger(split * kSplitKeys, queries.first_key(0) / kTileKeys * kTileKeys);
  const bool aligned = shape.block_size % kLanes == 0 && shape.head_dim % kLanes == 0;
  clear_state(queries.state, queries.count, queries.dim, queries.stride);
  for (int32_t i = 0; i < queries.count; i += kLanes) store(queries.maxima + i, broadcast(kNegativeInfinity));
  for (int32_t begin = first; begin < end; begin += kTileKeys) {
    if (!aligned) {
      gather_keys<T>(shape, layer, task, queries, begin, end);
      attend_tile<false, is_scaled<T>>(queries, tile_of_copy(queries), begin,
                                       [&] { gather_values<T>(shape, layer, task, queries, begin, end); });
      continue;
    }
    const Tile<T> tile = tile_in_place<T>(shape, layer, task, queries, begin, end);
    if (queries.count <= kBatch) {
      attend_tile<true, is_scaled<T>>(queries, tile, begin, [] {});
      continue;
    }
    widen_keys(queries, tile);
    attend_tile<false, is_scaled<T>>(queries, tile_of_copy(queries), begin, [&] { widen_values(queries, tile); });
  }
  for (int32_t i = 0; i < queries.count; ++i)
    queries.state[i * queries.stride + queries.dim + kLanes] = queries.maxima[i];
}

template <typename T>
void attend_as(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  const Queries queries(shape, task, scratch);
  const int64_t dim = queries.dim, stride = queries.stride;
  gather_queries(shape, task, queries);
  if (task.partial) {
    attend_split<T>(shape, layer, task, queries, task.split_begin);
    for (int32_t row = 0; row < task.num_rows; ++row) {
      const int64_t floats = queries.group * stride;
      __builtin_memcpy(task.partial + row * task.partial_row, queries.state + row * floats, floats * sizeof(float));
    }
    return;
  }
  clear_state(queries.joined, queries.count, dim, stride);
  for (int32_t split = task.split_begin; split < task.split_end; ++split) {
    attend_split<T>(shape, layer, task, queries, split);
    for (int32_t i = 0; i < queries.count; ++i) fold(queries.joined + i * stride, queries.state + i * stride, dim);
  }
  for (int32_t i = 0; i < queries.count; ++i) {
    const int64_t head = int64_t{task.kv_head} * queries.group + i % queries.group;
    finish(queries.joined + i * stride, dim, shape.head_dim,
           task.out + i / queries.group * task.ldo + head * shape.head_dim);
  }
}

}  // namespace

void attend(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  switch (shape.format) {
    case KvFormat::f32:
      return attend_as<float>(shape, layer, task, scratch);
    case KvFormat::bf16:
      return attend_as<uint16_t>(shape, layer, task, scratch);
    case KvFormat::int8:
      return attend_as<int8_t>(shape, layer, task, scratch);
  }
}

void join(const float* partials, int64_t count, int64_t stride, int32_t head_dim, float* out, float* scratch) {
  const int64_t dim = padded_dim(head_dim);
  clear_state(scratch, 1, dim, 0);
  for (int64_t i = 0; i < count; ++i) fold(scratch, partials + i * stride, dim);
  finish(scratch, dim, head_dim, out);
}

}  // namespace headrace::HEADRACE_KERNELS
