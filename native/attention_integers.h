// What attention over caches of integers shares: how queries are rounded, and where codes and scales lie. Included by
// attention_integer_kernels.cpp and attention_bytes_amx.cpp only (see vectors.h).
#pragma once

#include "attention_queries.h"
#include "kv_codes.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

constexpr float kUnit = 16384.0f;      // of a largest magnitude, in 16 bits: scaling by it is exact
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
constexpr float kSmallest = 1e-30f;    // largest magnitudes below it count as zero

// Round a query to 16 bits of its largest feature: its codes, zeros behind the last. Returns what a sum of products of
// codes is multiplied by, beside the key's scale, to be a score: NaN if a feature is no number. `features` holds two
// heads, padded; `codes` may lie in the second.
template <typename Codes>
float round_query(const AttentionShape& shape, const float* source, float* features, int16_t* codes) {
  const int64_t dim = padded_dim(shape.head_dim);
  for (int64_t d = 0; d < dim; ++d) features[d] = d < shape.head_dim ? source[d] : 0.0f;
  if (Codes::kRotated) rotate_head(features, shape.head_dim, features + dim);
  f32x16 largest = {}, damage = {};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const f32x16 x = load(features + d);
    largest = max(largest, max(x, -x));
    damage = damage + x * 0.0f;
  }
  const float peak = max(largest);
  const bool usable = peak > kSmallest, damaged = !(sum(damage) == 0.0f);
  const float factor = usable && !damaged ? kUnit / peak : 0.0f;
  for (int64_t d = 0; d < dim; d += kLanes)
    store_low16(codes + d, bits_as<i32x16>(load(features + d) * factor + kRound));
  return damaged ? __builtin_nanf("") : usable ? peak / kUnit * (shape.scale * kLog2e) : 0.0f;
}

// Where the KV head of a task keeps its part of the block of a position.
struct CodeBlock {
  const uint8_t *keys, *values;
  const uint32_t *key_scales, *value_scales;

  CodeBlock(const AttentionShape& shape, const KvLayer& layer, const Position& position) {
    const int64_t block = position.block_table[position.index / shape.block_size] * layer.block_bytes;
    const int64_t head = position.kv_head * kv_head_bytes(shape.format, shape.head_dim, shape.block_size);
    const int64_t scale = position.kv_head * kv_scales(shape.format, shape.head_dim) * shape.block_size;
    keys = layer.keys + block + head;
    values = layer.values + block + head;
    key_scales = reinterpret_cast<const uint32_t*>(layer.key_scales + block) + scale;
    value_scales = reinterpret_cast<const uint32_t*>(layer.value_scales + block) + scale;
  }
};

}  // namespace
}  // namespace headrace::HEADRACE_KERNELS
