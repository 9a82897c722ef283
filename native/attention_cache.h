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

  Place(const AttentionShape& shape, const KvLayer& layer, const Position& position) {
    const int64_t block = position.block_table[position.index / shape.block_size] * layer.block_bytes;
    const int64_t head = position.kv_head * kv_head_bytes(shape.format, shape.head_dim, shape.block_size),
                  scale = int64_t{position.kv_head} * shape.block_size;
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
  Tile<T> tile;
  tile.key_stride = shape.block_size;
  tile.value_stride = shape.head_dim;
  for (int g = 0; g < kTileVectors; ++g) {
    const int32_t run = begin + g * static_cast<int32_t>(kLanes), position = run < end ? run : begin;
    const int32_t offset = position % shape.block_size;
    const Place<T> place(shape, layer, {task.block_table, task.kv_head, position});
    tile.keys[g] = place.keys + offset * kRowsTogether<T>;
    tile.values[g] = place.values + int64_t{offset} * shape.head_dim;
    if constexpr (is_scaled<T>) {
      store(queries.key_scales + g * kLanes, load(place.key_scales + offset));
      store(queries.value_scales + g * kLanes, load(place.value_scales + offset));
    }
    const Position next = run_ahead(task, queries, run, 1, position), late = run_ahead(task, queries, run, 2, position);
    const int32_t next_offset = next.index % shape.block_size, late_offset = late.index % shape.block_size;
    const Place<T> ahead(shape, layer, next), far(shape, layer, late);
    tile.next_keys[g] = ahead.keys + next_offset * kRowsTogether<T>;
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
