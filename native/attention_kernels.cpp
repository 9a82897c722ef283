// Paged attention with an online softmax (FlashAttention-2, arXiv:2307.08691), f32 arithmetic over f32 or bf16 caches.
//
// A query (one row, one query head) walks its keys in tiles of 64 positions that start at multiples of 64, in ascending
// order, and its tiles in splits of 512: what it computes depends on its position and the cache alone. Queries of one
// KV head are batched so that each key and value loaded serves several; a batch changes who computes, not what.
// Compiled once per instruction set (see vectors.h).
#include "kernel_table.h"
#include "vectors.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

constexpr int kTileKeys = 64, kTileVectors = kTileKeys / kLanes;
constexpr float kNegativeInfinity = -__builtin_inff();
#ifdef __AVX512F__
constexpr int kBatch = 6;  // x 4 vectors of keys: 24 of 32 registers
#else
constexpr int kBatch = 2;
#endif

// 64 consecutive positions of one KV head in four runs of 16: key feature d of run g at keys[g] + d * key_stride, value
// of its j-th token at values[g] + j * value_stride. Runs beyond the context repeat the first; nothing reads them
// unmasked.
template <typename T>
struct Tile {
  const T* keys[kTileVectors];
  const T* values[kTileVectors];
  const T* next_keys[kTileVectors];  // of the tile after it, to be fetched early
  int64_t key_stride, value_stride;
};

// The queries of one task. Running result of query i at state + i * stride: [sum of values | maximum, weight].
struct Queries {
  const float* q;  // [count][dim], scaled
  float* state;
  int64_t dim, stride;
  int32_t count, group, first_position, window;

  int32_t position(int32_t i) const { return first_position + i / group; }
  int32_t first_key(int32_t i) const { return window > 0 && position(i) >= window ? position(i) - window + 1 : 0; }
};

int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// Blocks lie apart, so hardware prefetchers start over at each: fetch the values while scoring, the next keys while
// summing values. Each step asks for its share of the runs.
template <typename T>
HEADRACE_INLINE void fetch(const T* const (&runs)[kTileVectors], int64_t offset) {
#pragma GCC unroll 8
  for (int g = 0; g < kTileVectors; ++g) __builtin_prefetch(runs[g] + offset);
}

template <int N, typename T>
void scores(const float* q, int64_t dim, const Tile<T>& tile, f32x16 (*out)[kTileVectors]) {
  f32x16 sums[N][kTileVectors];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 8
    for (int g = 0; g < kTileVectors; ++g) sums[i][g] = f32x16{};  // one by one: as a whole it would go through memory
  }
  for (int64_t d = 0; d < dim; ++d) {
    f32x16 keys[kTileVectors];
#pragma GCC unroll 8
    for (int g = 0; g < kTileVectors; ++g) keys[g] = load(tile.keys[g] + d * tile.key_stride);
    fetch(tile.values, d * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const f32x16 feature = broadcast(q[i * dim + d]);
#pragma GCC unroll 8
      for (int g = 0; g < kTileVectors; ++g) sums[i][g] = feature * keys[g] + sums[i][g];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 8
    for (int g = 0; g < kTileVectors; ++g) out[i][g] = sums[i][g];
  }
}

// Add the weighted values of tile positions [begin, end) to V vectors of N results, scaled by `decay` first.
template <int N, int V, typename T>
void accumulate(const float (*weights)[kTileKeys], const float* decay, const Tile<T>& tile, int64_t d, int begin,
                int end, float* state, int64_t stride) {
  f32x16 sums[N][V];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[i][v] = load(state + i * stride + d + v * kLanes) * decay[i];
  }
  for (int j = begin; j < end; ++j) {
    const T* token = tile.values[j / kLanes] + (j % kLanes) * tile.value_stride + d;
    f32x16 values[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) values[v] = load(token + v * kLanes);
    if (d == 0) fetch(tile.next_keys, j * tile.value_stride / kTileVectors);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const f32x16 weight = broadcast(weights[i][j]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[i][v] = weight * values[v] + sums[i][v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(state + i * stride + d + v * kLanes, sums[i][v]);
  }
}

// Turn one query's scores over tile positions [begin, end) into weights; returns the factor for what it had summed.
float soften(f32x16* scores, int begin, int end, float* maximum, float* weight, float* out) {
  f32x16 highest = broadcast(kNegativeInfinity);
  for (int g = 0; g < kTileVectors; ++g) {
    const i32x16 ids = kLaneIds + g * static_cast<int>(kLanes);
    scores[g] = ((ids >= begin) & (ids < end)) ? scores[g] : broadcast(kNegativeInfinity);
    highest = max(highest, scores[g]);
  }
  const float before = *maximum, now = max(highest), peak = now > before ? now : before;
  f32x16 total = {};
  for (int g = 0; g < kTileVectors; ++g) {
    const f32x16 w = exp(scores[g] - peak);
    store(out + g * kLanes, w);
    total += w;
  }
  const float decay = peak == before ? 1.0f : exp(broadcast(before - peak))[0];
  *weight = *weight * decay + sum(total);
  *maximum = peak;
  return decay;
}

template <int N, typename T>
void attend_batch(const Queries& queries, int32_t first, const Tile<T>& tile, int32_t tile_begin) {
  f32x16 tile_scores[N][kTileVectors];
  float weights[N][kTileKeys], decay[N];
  scores<N>(queries.q + first * queries.dim, queries.dim, tile, tile_scores);
  float* state = queries.state + first * queries.stride;
  int begin = kTileKeys, end = 0;
  for (int i = 0; i < N; ++i) {
    const int low = larger(queries.first_key(first + i) - tile_begin, 0);
    const int high = smaller(queries.position(first + i) + 1 - tile_begin, kTileKeys);
    float* tail = state + i * queries.stride + queries.dim;
    if (low < high) {
      decay[i] = soften(tile_scores[i], low, high, &tail[0], &tail[1], weights[i]);
      begin = smaller(begin, low);
      end = larger(end, high);
    } else {
      decay[i] = 1.0f;
      for (int g = 0; g < kTileVectors; ++g) store(weights[i] + g * kLanes, f32x16{});
    }
  }
  if (begin >= end) return;
  int64_t d = 0;
  for (; d + 4 * kLanes <= queries.dim; d += 4 * kLanes)
    accumulate<N, 4>(weights, decay, tile, d, begin, end, state, queries.stride);
  for (; d < queries.dim; d += kLanes) accumulate<N, 1>(weights, decay, tile, d, begin, end, state, queries.stride);
}

template <typename T>
void attend_tile(const Queries& queries, const Tile<T>& tile, int32_t tile_begin) {
  int32_t first = 0;
  for (; first + kBatch <= queries.count; first += kBatch) attend_batch<kBatch>(queries, first, tile, tile_begin);
  switch (queries.count - first) {
    case 1:
      return attend_batch<1>(queries, first, tile, tile_begin);
#ifdef __AVX512F__
    case 2:
      return attend_batch<2>(queries, first, tile, tile_begin);
    case 3:
      return attend_batch<3>(queries, first, tile, tile_begin);
    case 4:
      return attend_batch<4>(queries, first, tile, tile_begin);
    case 5:
      return attend_batch<5>(queries, first, tile, tile_begin);
#endif
    default:
      return;
  }
}

// Where the KV head of a task begins in the block of a position.
int64_t place(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, int32_t position) {
  return task.block_table[position / shape.block_size] * layer.block_stride + task.kv_head * shape.head_values();
}

// A tile whose runs of 16 each lie in one block, read in place.
template <typename T>
Tile<T> tile_in_place(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, int32_t begin,
                      int32_t end) {
  Tile<T> tile;
  tile.key_stride = shape.block_size;
  tile.value_stride = shape.head_dim;
  for (int g = 0; g < kTileVectors; ++g) {
    const int32_t run = begin + g * static_cast<int32_t>(kLanes), position = run < end ? run : begin;
    tile.keys[g] =
        static_cast<const T*>(layer.keys) + place(shape, layer, task, position) + position % shape.block_size;
    tile.values[g] = static_cast<const T*>(layer.values) + place(shape, layer, task, position) +
                     int64_t{position % shape.block_size} * shape.head_dim;
    const int32_t next = run + kTileKeys < end ? run + kTileKeys : position;
    tile.next_keys[g] = static_cast<const T*>(layer.keys) + place(shape, layer, task, next) + next % shape.block_size;
  }
  return tile;
}

// Any block size and head dimension: the tile's tokens gathered as f32, zeros where there are none.
template <typename T>
Tile<float> tile_gathered(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, int32_t begin,
                          int32_t end, int64_t dim, float* scratch) {
  const auto widen = [](T value) {
    if constexpr (sizeof(T) == sizeof(float)) return value;
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, sizeof wide);
    return wide;
  };
  float *keys = scratch, *values = scratch + kTileKeys * dim;
  __builtin_memset(scratch, 0, 2 * kTileKeys * dim * sizeof(float));
  for (int32_t position = begin; position < smaller(end, begin + kTileKeys); ++position) {
    const int32_t offset = position % shape.block_size, j = position - begin;
    const int64_t head = place(shape, layer, task, position);
    const T* k = static_cast<const T*>(layer.keys) + head + offset;
    const T* v = static_cast<const T*>(layer.values) + head + int64_t{offset} * shape.head_dim;
    for (int32_t d = 0; d < shape.head_dim; ++d) {
      keys[d * kTileKeys + j] = widen(k[int64_t{d} * shape.block_size]);
      values[j * dim + d] = widen(v[d]);
    }
  }
  Tile<float> tile;
  tile.key_stride = kTileKeys;
  tile.value_stride = dim;
  for (int g = 0; g < kTileVectors; ++g) {
    tile.keys[g] = keys + g * kLanes;
    tile.values[g] = values + g * kLanes * dim;
    tile.next_keys[g] = keys;
  }
  return tile;
}

void clear_state(float* state, int64_t count, int64_t dim, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < dim; d += kLanes) store(state + i * stride + d, f32x16{});
    state[i * stride + dim] = kNegativeInfinity;
    state[i * stride + dim + 1] = 0.0f;
  }
}

// Fold the result of the next split into what the splits before it made. Splits that saw no key leave no trace.
void fold(float* into, const float* next, int64_t dim) {
  if (next[dim] == kNegativeInfinity) return;
  if (into[dim] == kNegativeInfinity) {
    __builtin_memcpy(into, next, (dim + 2) * sizeof(float));
    return;
  }
  const float peak = into[dim] > next[dim] ? into[dim] : next[dim];
  const float a = exp(broadcast(into[dim] - peak))[0], b = exp(broadcast(next[dim] - peak))[0];
  for (int64_t d = 0; d < dim; d += kLanes) store(into + d, load(into + d) * a + load(next + d) * b);
  into[dim] = peak;
  into[dim + 1] = into[dim + 1] * a + next[dim + 1] * b;
}

void finish(const float* state, int64_t dim, int32_t head_dim, float* out) {
  const float factor = 1.0f / state[dim + 1];
  int32_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(out + d, load(state + d) * factor);
  if (d < head_dim) store_part(out + d, load_part(state + d, head_dim - d) * factor, head_dim - d);
}

// Scaled copies of the queries' features, padded with zeros.
void gather_queries(const AttentionShape& shape, const AttentionTask& task, int64_t dim, float* q) {
  const int32_t group = shape.group();
  for (int32_t row = 0; row < task.num_rows; ++row) {
    const float* source = task.q + row * task.ldq + int64_t{task.kv_head} * group * shape.head_dim;
    for (int32_t head = 0; head < group; ++head, q += dim, source += shape.head_dim) {
      for (int32_t d = 0; d < shape.head_dim; ++d) q[d] = source[d] * shape.scale;
      for (int64_t d = shape.head_dim; d < dim; ++d) q[d] = 0.0f;
    }
  }
}

template <typename T>
void attend_split(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, const Queries& queries,
                  int32_t split, float* tile_scratch) {
  const int32_t end = smaller((split + 1) * kSplitKeys, queries.position(queries.count - 1) + 1);
  const int32_t first = larger(split * kSplitKeys, queries.first_key(0) / kTileKeys * kTileKeys);
  const bool in_place = shape.block_size % kLanes == 0 && shape.head_dim % kLanes == 0;
  for (int32_t begin = first; begin < end; begin += kTileKeys) {
    if (in_place) {
      attend_tile(queries, tile_in_place<T>(shape, layer, task, begin, end), begin);
    } else {
      attend_tile(queries, tile_gathered<T>(shape, layer, task, begin, end, queries.dim, tile_scratch), begin);
    }
  }
}

template <typename T>
void attend_as(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  const int64_t dim = padded_dim(shape.head_dim), stride = partial_floats(shape.head_dim);
  const int32_t count = task.num_rows * shape.group();
  float* q = scratch;
  float* joined = q + count * dim;
  float* state = task.partial ? task.partial : joined + count * stride;
  float* tile_scratch = joined + 2 * count * stride;
  gather_queries(shape, task, dim, q);
  const Queries queries{q, state, dim, stride, count, shape.group(), task.first_position, shape.window};
  if (!task.partial) clear_state(joined, count, dim, stride);
  for (int32_t split = task.split_begin; split < task.split_end; ++split) {
    clear_state(state, count, dim, stride);
    attend_split<T>(shape, layer, task, queries, split, tile_scratch);
    if (task.partial) return;
    for (int32_t i = 0; i < count; ++i) fold(joined + i * stride, state + i * stride, dim);
  }
  for (int32_t i = 0; i < count; ++i) {
    const int64_t head = int64_t{task.kv_head} * shape.group() + i % shape.group();
    finish(joined + i * stride, dim, shape.head_dim, task.out + i / shape.group() * task.ldo + head * shape.head_dim);
  }
}

uint16_t narrow(float value, uint16_t) { return to_bf16(value); }
float narrow(float value, float) { return value; }

template <typename T>
void write_as(const AttentionShape& shape, const KvLayer& layer, int32_t block, int32_t offset, const float* k,
              const float* v) {
  for (int32_t head = 0; head < shape.num_kv_heads; ++head, k += shape.head_dim, v += shape.head_dim) {
    const int64_t begin = block * layer.block_stride + head * shape.head_values();
    T* keys = static_cast<T*>(layer.keys) + begin + offset;
    T* values = static_cast<T*>(layer.values) + begin + int64_t{offset} * shape.head_dim;
    for (int32_t d = 0; d < shape.head_dim; ++d) {
      keys[int64_t{d} * shape.block_size] = narrow(k[d], T{});
      values[d] = narrow(v[d], T{});
    }
  }
}

}  // namespace

void write_kv(const AttentionShape& shape, const KvLayer& layer, int32_t block, int32_t offset, const float* k,
              const float* v) {
  if (shape.format == KvFormat::bf16) return write_as<uint16_t>(shape, layer, block, offset, k, v);
  write_as<float>(shape, layer, block, offset, k, v);
}

void attend(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  if (shape.format == KvFormat::bf16) return attend_as<uint16_t>(shape, layer, task, scratch);
  attend_as<float>(shape, layer, task, scratch);
}

void join(const float* partials, int64_t count, int64_t stride, int32_t head_dim, float* out, float* scratch) {
  const int64_t dim = padded_dim(head_dim);
  clear_state(scratch, 1, dim, 0);
  for (int64_t i = 0; i < count; ++i) fold(scratch, partials + i * stride, dim);
  finish(scratch, dim, head_dim, out);
}

}  // namespace headrace::HEADRACE_KERNELS
