// Where a task finds cached floats: of a position, and of a tile. Included by attention_kernels.cpp and
// attention_amx.cpp only (see vectors.h).
#pragma once

#include "attention_queries.h"
#include "kv_codes.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

// Where a block has row `row`, column `column` of a matrix.
template <typename T>
int64_t place_of(int64_t row, int64_t column, int64_t columns) {
  if constexpr (!is_paired<T>) return row * columns + column;
  const CodePlace at(row, column, columns);
  return 2 * at.pair + at.half;
}

// Where the KV head of a task keeps its part of the block of a position.
template <typename T>
struct Place {
  const T *keys, *values;
  const float *key_scales, *value_scales;

  Place(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, int32_t position) {
    const int64_t block = task.block_table[position / shape.block_size] * layer.block_bytes;
    const int64_t head = task.kv_head * kv_head_bytes(shape.format, shape.head_dim, shape.block_size),
                  scale = int64_t{task.kv_head} * shape.block_size;
    keys = reinterpret_cast<const T*>(layer.keys + block + head);
    values = reinterpret_cast<const T*>(layer.values + block + head);
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
    tile.keys[g] = place.keys + offset * kRowsTogether<T>;
    tile.values[g] = place.values + int64_t{offset} * shape.head_dim;
    if constexpr (is_scaled<T>) {
      store(queries.key_scales + g * kLanes, load(place.key_scales + offset));
      store(queries.value_scales + g * kLanes, load(place.value_scales + offset));
    }
    const int32_t next = run + kTileKeys < context ? run + kTileKeys : position, next_offset = next % shape.block_size;
    const Place<T> ahead(shape, layer, task, next);
    tile.next_keys[g] = ahead.keys + next_offset * kRowsTogether<T>;
    const int32_t late = run + 2 * kTileKeys < context ? run + 2 * kTileKeys : next,
                  late_offset = late % shape.block_size;
    const Place<T> far(shape, layer, task, late);
    tile.far_keys[g] = far.keys + late_offset * kRowsTogether<T>;
    tile.far_values[g] = far.values + int64_t{late_offset} * shape.head_dim;
    if constexpr (is_scaled<T>) {
      __builtin_prefetch(ahead.key_scales + next_offset);
      __builtin_prefetch(ahead.value_scales + next_offset);
    }
  }
  return tile;
}

}  // namespace
}  // namespace headrace::HEADRACE_KERNELS
