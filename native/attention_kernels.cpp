// Paged attention with an online softmax (FlashAttention-2, arXiv:2307.08691): f32 arithmetic over f32, bf16 or fp8
// caches. Caches of integers: attention_integer_kernels.cpp; with AMX: attention_amx.cpp.
//
// A query (one row, one query head) walks its keys in tiles of 64 positions that start at multiples of 64, in ascending
// order, and its tiles in splits of 512: what it computes depends on its position and the cache alone. Queries of one
// KV head are batched so that each key and value loaded serves several; a batch changes who computes, not what. Few
// queries read the cache in place, many read a copy of the tile widened to f32: the same values, so the same sums.
// Compiled once per instruction set (see vectors.h).
#include "attention_cache.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

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

Tile<float> tile_of_copy(const Queries& queries) {
  Tile<float> tile;
  tile.key_stride = kTileKeys;
  tile.value_stride = queries.dim;
  for (int g = 0; g < kTileVectors; ++g) {
    tile.keys[g] = tile.next_keys[g] = tile.far_keys[g] = queries.copy + g * kLanes;
    tile.values[g] = tile.far_values[g] = queries.copy + g * kLanes * queries.dim;
  }
  return tile;
}

// A tile as f32, all runs side by side: each waits for memory of its own.
template <typename T>
void widen_keys(const Queries& queries, Tile<T> tile) {
  float* copy = queries.copy;
  each_row<T>(0, static_cast<int>(queries.dim), [&]<int kHalf>(int d) HEADRACE_INLINE_LAMBDA {
    fetch(tile.values, tile.far_values, d * kLanes);
#pragma GCC unroll 4
    for (int g = 0; g < kTileVectors; ++g)
      store(copy + d * kTileKeys + g * kLanes, load_row<kHalf>(tile.keys[g], d, tile.key_stride));
  });
}

template <typename T>
void widen_values(const Queries& queries, Tile<T> tile) {
  const int64_t dim = queries.dim;
  float* copy = queries.copy;
  each_row<T>(0, kLanes, [&]<int kHalf>(int j) HEADRACE_INLINE_LAMBDA {
    for (int64_t d = 0; d < dim; d += kLanes) {
      fetch(tile.next_keys, tile.far_keys, j * dim + d);
#pragma GCC unroll 4
      for (int g = 0; g < kTileVectors; ++g)
        store(copy + (g * kLanes + j) * dim + d,
              load_row<kHalf>(tile.values[g] + d * kRowsTogether<T>, j, tile.value_stride));
    }
  });
}

float widen(float value) { return value; }
float widen(uint16_t value) { return from_bf16(value); }
float widen(E4m3 value) {
  const uint32_t code = value.code;
  return std::bit_cast<float>((code & 0x7F) << 20 | (code & 0x80) << 24) * 0x1p120f;
}

// Any block size and head dimension: the tile's tokens as f32, one by one, zeros where there are none.
template <typename T>
void gather_keys(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, const Queries& queries,
                 int32_t begin, int32_t end) {
  __builtin_memset(queries.copy, 0, kTileKeys * queries.dim * sizeof(float));
  for (int32_t position = begin; position < smaller(end, begin + kTileKeys); ++position) {
    const int32_t offset = position % shape.block_size, j = position - begin;
    const Place<T> place(shape, layer, {task.block_table, task.kv_head, position});
    if constexpr (is_scaled<T>) {
      queries.key_scales[j] = place.key_scales[offset];
      queries.value_scales[j] = place.value_scales[offset];
    }
    for (int32_t d = 0; d < shape.head_dim; ++d)
      queries.copy[d * kTileKeys + j] = widen(place.keys[place_of<T>(d, offset, shape.block_size)]);
  }
}

template <typename T>
void gather_values(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, const Queries& queries,
                   int32_t begin, int32_t end) {
  __builtin_memset(queries.copy, 0, kTileKeys * queries.dim * sizeof(float));
  for (int32_t position = begin; position < smaller(end, begin + kTileKeys); ++position) {
    const int32_t offset = position % shape.block_size, j = position - begin;
    const T* values = Place<T>(shape, layer, {task.block_table, task.kv_head, position}).values;
    for (int32_t d = 0; d < shape.head_dim; ++d)
      queries.copy[j * queries.dim + d] = widen(values[place_of<T>(offset, d, shape.head_dim)]);
  }
}

// Scaled features, those of a batch side by side, padded with zeros.
void gather_queries(const AttentionShape& shape, const AttentionTask& task, const Queries& queries) {
  const float factor = shape.scale * kLog2e;
  each_query(shape, task, queries, [&](int32_t i, const float* features) {
    float* q = queries.q + i / kBatch * kBatch * queries.dim + i % kBatch;
    for (int32_t d = 0; d < shape.head_dim; ++d) q[d * kBatch] = features[d] * factor;
    for (int64_t d = shape.head_dim; d < queries.dim; ++d) q[d * kBatch] = 0.0f;
  });
}

template <typename T>
void attend_as(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  const Queries queries(shape, task, scratch);
  const bool aligned = is_aligned(shape);
  gather_queries(shape, task, queries);
  const auto tile_at = [&](int32_t begin, int32_t end) {
    if (!aligned) {
      gather_keys<T>(shape, layer, task, queries, begin, end);
      attend_tile<false, is_scaled<T>>(queries, tile_of_copy(queries), begin,
                                       [&] { gather_values<T>(shape, layer, task, queries, begin, end); });
      return;
    }
    const Tile<T> tile = tile_in_place<T>(shape, layer, task, queries, begin, end);
    if (queries.count <= kBatch) {
      attend_tile<true, is_scaled<T>>(queries, tile, begin, [] {});
      return;
    }
    widen_keys(queries, tile);
    attend_tile<false, is_scaled<T>>(queries, tile_of_copy(queries), begin, [&] { widen_values(queries, tile); });
  };
  attend_splits(shape, task, queries, [&](int32_t split) { each_tile(queries, split, tile_at); });
}

}  // namespace

void attend(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  switch (shape.format) {
    case KvFormat::f32:
      return attend_as<float>(shape, layer, task, scratch);
    case KvFormat::bf16:
      return attend_as<uint16_t>(shape, layer, task, scratch);
    case KvFormat::fp8:
      return attend_as<E4m3>(shape, layer, task, scratch);
    case KvFormat::int8:
    case KvFormat::int4:
      return attend_integers(shape, layer, task, scratch);
  }
}

void join(const float* partials, int64_t count, int64_t stride, int32_t head_dim, float* out, float* scratch) {
  const int64_t dim = padded_dim(head_dim);
  clear_state(scratch, 1, dim, 0);
  for (int64_t i = 0; i < count; ++i) fold(scratch, partials + i * stride, dim);
  finish(scratch, dim, head_dim, out);
}

}  // namespace headrace::HEADRACE_KERNELS
