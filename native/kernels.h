// The kernels between the linear layers, one table of them per instruction set. They know rows and blocks, not plans.
//
// Contract (determinism): what a kernel makes of one row depends on that row alone, never on how many are given.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.h"
#include "quantize.h"

namespace headrace {

enum class KvFormat : uint8_t { f32, bf16, fp8, int8, int4 };
enum class GluActivation : uint8_t { silu, gelu_tanh };

// Features of a head of one token that share a scale and a lowest value in int4.
constexpr int32_t kInt4Group = 32;

// The largest head of integers: longer sums of products may not fit 32 bits.
constexpr int32_t kMaxIntegerHeadDim = 1024;

// One layer's attention, and how its KV blocks lie in memory. See headrace.executors.kv_layout for their sizes.
//
// In a block, keys are a matrix [head_dim][block_size] of each KV head (a vector holds one feature of 16 tokens: no
// sums across lanes) and values one [block_size][head_dim]. Rows of bf16, int8 and int4 lie in pairs:
// [rows / 2][columns][2], so that one instruction multiplies and sums two; int4 has each pair in a byte, its first in
// the lower half. A scale takes four bytes: [kv_head][block_size], an f32, or in int4 [kv_head][group][block_size], a
// bf16 scale in the upper half and the value of code 0, bf16, in the lower.
struct AttentionShape {
  int32_t num_heads, num_kv_heads, head_dim, block_size;
  int32_t window;  // keys that a query sees, itself included; 0: all before it
  float scale;
  KvFormat format;

  int32_t group() const { return num_heads / num_kv_heads; }
};

// Bytes that the keys of one head take in a block, as its values do: what lies in pairs, in whole ones.
constexpr int64_t kv_head_bytes(KvFormat format, int32_t head_dim, int32_t block_size) {
  const int64_t values = int64_t{head_dim} * block_size;
  const int64_t paired = (int64_t{head_dim} + 1) / 2 * 2 * ((int64_t{block_size} + 1) / 2 * 2);
  switch (format) {
    case KvFormat::f32:
      return 4 * values;
    case KvFormat::bf16:
      return 2 * paired;
    case KvFormat::fp8:
      return values;
    case KvFormat::int8:
      return paired;
    case KvFormat::int4:
      return paired / 2;
  }
  __builtin_unreachable();
}

// Scales of one head of one token's key, or of its value.
constexpr int64_t kv_scales(KvFormat format, int32_t head_dim) {
  if (format == KvFormat::int4) return (int64_t{head_dim} + kInt4Group - 1) / kInt4Group;
  return format == KvFormat::fp8 || format == KvFormat::int8 ? 1 : 0;
}

// One layer's part of the KV pool: where its keys and values, and their scales, lie in block 0. A block holds all
// layers, so what lies near in time lies near in memory, and one that moves (to another tier, to another machine) moves
// as one piece.
struct KvLayer {
  uint8_t *keys, *values;
  uint8_t *key_scales, *value_scales;  // nothing there if the format has none
  int64_t block_bytes;                 // from one block to the next
};

// A query meets its keys in tiles of this many positions, each as a whole.
constexpr int32_t kTileKeys = 64;

// Keys are attended to in splits of this many positions, each by itself, whose results are joined in order: the
// arithmetic of a row is the same whether one worker takes all its splits or several take some each.
constexpr int32_t kSplitKeys = 512;

// Keys that a worker will probably meet next, to be asked for early: positions [begin, end) of a KV head.
struct NextKeys {
  const int32_t* block_table = nullptr;  // or there are none
  int32_t kv_head = 0;
  int32_t begin = 0, end = 0;
};

// Work of one call: some consecutive rows of a sequence, one KV head, some splits.
struct AttentionTask {
  const int32_t* block_table;
  const float* q;  // the first row
  int64_t ldq;
  // Rotary tables of the first row's position, to turn queries by, or null; the next row's lie rotary_dim / 2 further.
  const float *cos, *sin;
  int32_t rotary_dim;
  float* out;  // the first row
  int64_t ldo;
  int32_t first_position;  // of the first row
  int32_t num_rows;
  int32_t kv_head;
  int32_t split_begin, split_end;  // in units of kSplitKeys positions
  // Where to leave the unfinished results of one split instead of `out`: [query head of the group][partial_floats] of
  // each row, and how many floats a row's lie after the row's before.
  float* partial;
  int64_t partial_row;
  NextKeys next;
};

// Floats of one query's unfinished result: weighted sum of values (padded to 16), sums of weights, maximum score.
inline int64_t padded_dim(int32_t head_dim) { return (int64_t{head_dim} + 15) / 16 * 16; }
inline int64_t partial_floats(int32_t head_dim) { return padded_dim(head_dim) + 32; }
// Floats of working memory that `attend` wants for tasks of at most `queries` queries.
int64_t attention_scratch_floats(int64_t queries, int32_t head_dim);

// The highest of a row of values, or of the part of it that was looked at.
struct Peak {
  float value = -__builtin_inff();
  int32_t index = 0;     // the lowest, on a tie
  bool damaged = false;  // there is a NaN or an infinity among them

  bool usable() const { return !damaged && value > -__builtin_inff(); }
};

// Of two parts, the first of which comes first.
inline Peak higher(const Peak& a, const Peak& b) {
  Peak both = b.value > a.value ? b : a;
  both.damaged = a.damaged || b.damaged;
  return both;
}

struct Kernels {
  // Runs of `group` features of one row: y = x / rms(x) * weight.
  void (*rms_norm)(const float* x, int64_t features, int64_t group, const float* weight, float eps, float* y);
  // One row of heads; cos and sin [rotary_dim / 2] of its position.
  void (*rope)(const float* x, int64_t heads, int64_t head_dim, int64_t rotary_dim, const float* cos, const float* sin,
               float* y);
  void (*glu)(GluActivation activation, const float* gate, const float* up, int64_t n, float* y);
  void (*add)(const float* a, const float* b, int64_t n, float* y);
  void (*scale)(float* x, int64_t n, float factor);
  // One token's keys and values, [num_kv_heads * head_dim] each, into place `offset` of a block.
  void (*write_kv)(const AttentionShape& shape, const KvLayer& layer, int32_t block, int32_t offset, const float* k,
                   const float* v);
  void (*attend)(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch);
  // Join `count` partial results of one query, `stride` floats apart, in order; out [head_dim].
  void (*join)(const float* partials, int64_t count, int64_t stride, int32_t head_dim, float* out, float* scratch);
  Peak (*peak)(const float* x, int64_t n);
  // Sum of e^(x - shift), in double.
  double (*sum_exp)(const float* x, int64_t n, double shift);
  // weights[i] = e^((x[i] - peak) / temperature), x <= peak; returns their sum.
  double (*exp_weights)(const float* x, int64_t n, double peak, double temperature, double* weights);
  double (*exp_weights_f64)(const double* x, int64_t n, double peak, double temperature, double* weights);
  // The places of all weights of at least `lowest`, ascending; returns how many.
  int64_t (*places_at_least)(const double* weights, int64_t n, double lowest, int32_t* places);
  // Round `count` values, a whole number of groups, to blocks.
  void (*quantize_bf16)(const IntegerGroups& groups, const uint16_t* values, int64_t count, uint8_t* blocks);
  void (*quantize_f32)(const IntegerGroups& groups, const float* values, int64_t count, uint8_t* blocks);
  // Queries that `attend` takes at once: query heads of one KV head times consecutive rows of one sequence.
  int32_t max_queries = 72;
};

// The table for an available instruction set. (That of AMX is AVX-512's with VNNI, but for attention over bf16 and
// int8.)
const Kernels& kernels_for(Isa isa);

}  // namespace headrace
