// Attention over int8 or int4 caches, in integers (see attention_kernels.cpp for the walk over tiles and splits).
//
// Queries are rounded to 16 bits of their largest feature and multiplied with the codes; the weights of a tile, times
// the scales of their values, to 16 bits of the tile's largest, and multiplied with the values' codes. Sums of products
// are exact, so their order is free; what is rounded is rounded in the order of tiles. One instruction multiplies and
// adds 32 pairs where f32 takes two and four more to widen the codes. Nobody keeps a widened copy: codes are spread to
// 16 bits as they are loaded, for all queries of a batch at once. Compiled once per instruction set (see vectors.h).
#include "attention_integers.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

constexpr int32_t kRunPairs = kLanes / 2;

// 64 consecutive positions of one KV head in four runs of 16: pairs d, d + 1 of features of run g's keys at
// keys[g] + d / 2 * key_stride, values of its tokens j, j + 1 at values[g] + j / 2 * value_stride, all in bytes.
struct CodeTile {
  const uint8_t* keys[kTileVectors];
  const uint8_t* values[kTileVectors];
  const uint8_t* next_keys[kTileVectors];                            // of the tile after it, to be fetched early
  const uint8_t *far_keys[kTileVectors], *far_values[kTileVectors];  // of the one after that, for L2
  int64_t key_stride, value_stride;
};

// What a tile's scales are, [group][kTileKeys], and in int4 what its codes 0 are.
struct TileScales {
  float *scales, *lowest;
};

struct IntegerQueries : Queries {
  int32_t head_dim, groups;
  int32_t* codes;    // [batch][dim / 2][kBatch] pairs of 16-bit features
  float* steps;      // [count], of which a query's features are multiples
  float* code_sums;  // [group][count]
  int16_t* weights;  // [count][group][kTileKeys]
  float* units;      // [count][group], of which weights are multiples
  float* offsets;    // [count][group], what the codes 0 add
  TileScales keys, values;

  IntegerQueries(const AttentionShape& shape, const AttentionTask& task, float* scratch)
      : Queries(shape, task, scratch),
        head_dim(shape.head_dim),
        groups(static_cast<int32_t>(kv_scales(shape.format, shape.head_dim))) {
    Scratch parts{end};
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    codes = parts.take<int32_t>(batched() * dim / 2);
    steps = parts.take(padded);
    code_sums = parts.take(groups * padded);
    weights = parts.take<int16_t>(int64_t{count} * groups * kTileKeys);
    units = parts.take(int64_t{count} * groups);
    offsets = parts.take(int64_t{count} * groups);
    for (TileScales* part : {&keys, &values}) *part = {parts.take(groups * kTileKeys), parts.take(groups * kTileKeys)};
  }
};

// Round query i, and put its features in pairs.
template <typename Codes>
void take_query(const AttentionShape& shape, const IntegerQueries& queries, int32_t i, const float* source) {
  const int64_t dim = queries.dim;
  float* features = queries.q;  // nothing else needs that place
  int16_t* codes = reinterpret_cast<int16_t*>(features + dim);
  queries.steps[i] = round_query<Codes>(shape, source, features, codes);
  int32_t* pairs = queries.codes + i / kBatch * kBatch * dim / 2 + i % kBatch;
  for (int64_t d = 0; d < dim; d += 2) __builtin_memcpy(pairs + d / 2 * kBatch, codes + d, sizeof *pairs);
  if constexpr (Codes::kHasLowest) {
    for (int32_t g = 0; g < queries.groups; ++g) {
      const int64_t begin = int64_t{g} * kInt4Group, end = begin + kInt4Group < dim ? begin + kInt4Group : dim;
      int32_t sum = 0;
      for (int64_t d = begin; d < end; ++d) sum += codes[d];
      queries.code_sums[g * queries.count + i] = static_cast<float>(sum);
    }
  }
}

// Scores of N queries, from `first` on, for G runs of keys from `run` on.
template <typename Codes, int N, int G>
HEADRACE_INLINE void score_runs(const IntegerQueries& queries, int32_t first, const CodeTile& tile, int run) {
  const int64_t group = Codes::group(queries.dim), dim = queries.head_dim;
  const int32_t* q = queries.codes + first * queries.dim / 2;
  float* out = queries.scores + first * kTileKeys + run * kLanes;
  for (int32_t g = 0; g < queries.groups; ++g) {
    i32x16 sums[N][G];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < G; ++r) sums[i][r] = i32x16{};
    }
    const int64_t end = (g + 1) * group < dim ? (g + 1) * group : dim;
#pragma GCC unroll 2
    for (int64_t pair = g * group / 2; 2 * pair < end; ++pair) {
      i32x16 keys[G];
#pragma GCC unroll 4
      for (int r = 0; r < G; ++r) keys[r] = Codes::load_lanes_of_pairs(tile.keys[run + r] + pair * tile.key_stride);
      fetch(tile.values, tile.far_values, pair * Codes::kPairBytes * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const i32x16 features = spread<i32x16>(q[pair * kBatch + i]);
#pragma GCC unroll 4
        for (int r = 0; r < G; ++r) sums[i][r] = add_products(sums[i][r], keys[r], features);
      }
    }
    const float *scales = queries.keys.scales + g * kTileKeys + run * kLanes,
                *lowest = queries.keys.lowest + g * kTileKeys + run * kLanes;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const float step = queries.steps[first + i], offset = queries.code_sums[g * queries.count + first + i] * step;
#pragma GCC unroll 4
      for (int r = 0; r < G; ++r) {
        float* score = out + i * kTileKeys + r * kLanes;
        f32x16 s = to_f32(sums[i][r]) * step * load(scales + r * kLanes);
        if (Codes::kHasLowest) s = load(lowest + r * kLanes) * offset + s;
        store(score, g == 0 ? s : load(score) + s);
      }
    }
  }
}

template <typename Codes, int N>
void score(const IntegerQueries& queries, int32_t first, const CodeTile& tile, int runs) {
  constexpr int kFew = kBlock < 2 ? 1 : 2;
  if (kBlock == kTileVectors && runs > kFew) {
    score_runs<Codes, N, kBlock>(queries, first, tile, 0);
  } else {
    for (int run = 0; run < runs; run += kFew) score_runs<Codes, N, kFew>(queries, first, tile, run);
  }
}

// Weights of a tile, times the scales of the values of a group, to 16 bits.
template <typename Codes>
void round_weights(const IntegerQueries& queries, int32_t i, int32_t g) {
  const float *weights = queries.scores + i * kTileKeys, *scales = queries.values.scales + g * kTileKeys,
              *lowest = queries.values.lowest + g * kTileKeys;
  const int64_t at = int64_t{i} * queries.groups + g;
  f32x16 scaled[kTileVectors], offset = {};
  i32x16 best = {};
#pragma GCC unroll 4
  for (int r = 0; r < kTileVectors; ++r) {
    const f32x16 w = load(weights + r * kLanes), none = {};
    const auto unseen = w == none;  // whatever lies there
    scaled[r] = select(unseen, none, w * load(scales + r * kLanes));
    if (Codes::kHasLowest) offset = offset + select(unseen, none, w * load(lowest + r * kLanes));
    const i32x16 bits = bits_as<i32x16>(scaled[r]);  // in the order of the numbers
    best = max(bits, best);
  }
  const float peak = std::bit_cast<float>(max(best));
  const float factor = peak > kSmallest ? kUnit / peak : 0.0f;
#pragma GCC unroll 4
  for (int r = 0; r < kTileVectors; ++r)
    store_low16(queries.weights + at * kTileKeys + r * kLanes, bits_as<i32x16>(scaled[r] * factor + kRound));
  queries.units[at] = peak <= kSmallest ? 0.0f : peak / kUnit;
  queries.offsets[at] = Codes::kHasLowest ? sum(offset) : 0.0f;
}

// Scale V vectors of N results, from feature d on, by their decays; add the weighted values of the tile's pairs of
// tokens [begin, end).
template <typename Codes, int N, int V>
HEADRACE_INLINE void sum_columns(const IntegerQueries& queries, int32_t first, const CodeTile& tile, int64_t d,
                                 int begin, int end) {
  const int64_t group = Codes::group(queries.dim), g = d / group;
  const int16_t* weights = queries.weights + (first * queries.groups + g) * kTileKeys;
  // Groups start at multiples of V vectors, or V vectors hold whole groups.
  const auto group_of = [&](int v) { return Codes::kHasLowest ? v * kLanes / group : 0; };
  i32x16 sums[N][V];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[i][v] = i32x16{};
  }
  for (int run = begin / kRunPairs; run * kRunPairs < end; ++run) {
    const int start = larger(begin, run * kRunPairs), stop = smaller(end, (run + 1) * kRunPairs);
    const uint8_t* token = tile.values[run] + (start - run * kRunPairs) * tile.value_stride + d * Codes::kPairBytes;
    for (int pair = start; pair < stop; ++pair, token += tile.value_stride) {
      i32x16 values[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) values[v] = Codes::load_lanes_of_pairs(token + v * kLanes * Codes::kPairBytes);
      if (d == 0) fetch(tile.next_keys, tile.far_keys, pair * tile.value_stride / kTileVectors);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          int32_t both;
          __builtin_memcpy(&both, weights + (i * queries.groups + group_of(v)) * kTileKeys + 2 * pair, sizeof both);
          sums[i][v] = add_products(sums[i][v], values[v], spread<i32x16>(both));
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    float* state = queries.state + (first + i) * queries.stride + d;
    const f32x16 decay = broadcast(queries.decays[first + i]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = (first + i) * queries.groups + g + group_of(v);
      f32x16 added = to_f32(sums[i][v]) * queries.units[at];
      if (Codes::kHasLowest) added = added + queries.offsets[at];
      store(state + v * kLanes, multiply_add(load(state + v * kLanes), decay, added));
    }
  }
}

template <typename Codes, int N>
void sum_values(const IntegerQueries& queries, int32_t first, const CodeTile& tile, int begin, int end) {
  int64_t d = 0;
  for (; d + kBlock * kLanes <= queries.dim; d += kBlock * kLanes)
    sum_columns<Codes, N, kBlock>(queries, first, tile, d, begin, end);
  if (kBlock > 2 && d + 2 * kLanes <= queries.dim) {
    sum_columns<Codes, N, 2>(queries, first, tile, d, begin, end);
    d += 2 * kLanes;
  }
  if (kBlock > 1 && d < queries.dim) sum_columns<Codes, N, 1>(queries, first, tile, d, begin, end);
}

template <typename Codes>
void attend_tile(const IntegerQueries& queries, const CodeTile& tile, int32_t begin) {
  each_batch(queries.count, [&]<int N>(int32_t first) {
    const int32_t high = queries.high(first + N - 1, begin);
    if (queries.low(first, begin) >= high) return;
    score<Codes, N>(queries, first, tile, (high + kLanes - 1) / kLanes);
  });
  soften<false>(queries, begin);
  for (int32_t i = 0; i < queries.count; ++i) {
    for (int32_t g = 0; g < queries.groups; ++g) round_weights<Codes>(queries, i, g);
  }
  each_batch(queries.count, [&]<int N>(int32_t first) {
    const int32_t low = queries.low(first, begin), high = queries.high(first + N - 1, begin);
    if (low >= high) return;
    sum_values<Codes, N>(queries, first, tile, low / 2, (high + 1) / 2);
  });
}

// One run's scales, from what is stored of its tokens.
template <typename Codes>
HEADRACE_INLINE void widen_scales(const uint32_t* stored, const TileScales& scales, int64_t at) {
  const i32x16 bits = load_lanes<i32x16>(reinterpret_cast<const int32_t*>(stored));
  if constexpr (Codes::kHasLowest) {
    store(scales.scales + at, bits_as<f32x16>(bits & static_cast<int32_t>(0xFFFF0000)));
    store(scales.lowest + at, bits_as<f32x16>(bits << 16));
  } else {
    store(scales.scales + at, bits_as<f32x16>(bits));
  }
}

template <typename Codes>
void put_scale(uint32_t stored, const TileScales& scales, int64_t at) {
  scales.scales[at] = std::bit_cast<float>(Codes::kHasLowest ? stored & 0xFFFF0000u : stored);
  if (Codes::kHasLowest) scales.lowest[at] = std::bit_cast<float>(stored << 16);
}

// A tile whose runs of 16 each lie in one block, read in place.
template <typename Codes>
CodeTile tile_in_place(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task,
                       const IntegerQueries& queries, int32_t begin, int32_t end) {
  CodeTile tile;
  tile.key_stride = shape.block_size * Codes::kPairBytes;
  tile.value_stride = shape.head_dim * Codes::kPairBytes;
  for (int r = 0; r < kTileVectors; ++r) {
    const int32_t run = begin + r * static_cast<int32_t>(kLanes), position = run < end ? run : begin;
    const int32_t offset = position % shape.block_size;
    const CodeBlock place(shape, layer, {task.block_table, task.kv_head, position});
    tile.keys[r] = place.keys + offset * Codes::kPairBytes;
    tile.values[r] = place.values + offset / 2 * tile.value_stride;
    const Position next = run_ahead(task, queries, run, 1, position), late = run_ahead(task, queries, run, 2, position);
    const int32_t next_offset = next.index % shape.block_size, late_offset = late.index % shape.block_size;
    const CodeBlock ahead(shape, layer, next), far(shape, layer, late);
    tile.next_keys[r] = ahead.keys + next_offset * Codes::kPairBytes;
    tile.far_keys[r] = far.keys + late_offset * Codes::kPairBytes;
    tile.far_values[r] = far.values + late_offset / 2 * tile.value_stride;
    for (int32_t g = 0; g < queries.groups; ++g) {
      const int64_t at = g * kTileKeys + r * kLanes, stored = int64_t{g} * shape.block_size;
      widen_scales<Codes>(place.key_scales + stored + offset, queries.keys, at);
      widen_scales<Codes>(place.value_scales + stored + offset, queries.values, at);
      __builtin_prefetch(ahead.key_scales + stored + next_offset);
      __builtin_prefetch(ahead.value_scales + stored + next_offset);
    }
  }
  return tile;
}

// Any block size and head dimension: a copy of the tile's codes, token by token, zeros where there are none.
template <typename Codes>
CodeTile tile_of_copy(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task,
                      const IntegerQueries& queries, int32_t begin, int32_t end) {
  uint8_t* keys = reinterpret_cast<uint8_t*>(queries.copy);
  uint8_t* values = keys + kTileKeys / 2 * queries.dim * Codes::kPairBytes;
  __builtin_memset(keys, 0, kTileKeys * queries.dim * Codes::kPairBytes);
  for (int32_t position = begin; position < smaller(end, begin + kTileKeys); ++position) {
    const int32_t offset = position % shape.block_size, j = position - begin;
    const CodeBlock place(shape, layer, {task.block_table, task.kv_head, position});
    for (int32_t d = 0; d < shape.head_dim; ++d) {
      const CodePlace key(d, offset, shape.block_size), value(offset, d, shape.head_dim);
      const CodePlace to_key(d, j, kTileKeys), to_value(j, d, queries.dim);
      Codes::put(keys, to_key.pair, to_key.half, Codes::get(place.keys, key));
      Codes::put(values, to_value.pair, to_value.half, Codes::get(place.values, value));
    }
    for (int32_t g = 0; g < queries.groups; ++g) {
      const int64_t at = g * kTileKeys + j, stored = int64_t{g} * shape.block_size + offset;
      put_scale<Codes>(place.key_scales[stored], queries.keys, at);
      put_scale<Codes>(place.value_scales[stored], queries.values, at);
    }
  }
  CodeTile tile;
  tile.key_stride = kTileKeys * Codes::kPairBytes;
  tile.value_stride = queries.dim * Codes::kPairBytes;
  for (int r = 0; r < kTileVectors; ++r) {
    tile.keys[r] = tile.next_keys[r] = tile.far_keys[r] = keys + r * kLanes * Codes::kPairBytes;
    tile.values[r] = tile.far_values[r] = values + r * kRunPairs * tile.value_stride;
  }
  return tile;
}

template <typename Codes>
void attend_as(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  const IntegerQueries queries(shape, task, scratch);
  const bool aligned = is_aligned(shape);
  each_query(shape, task, queries,
             [&](int32_t i, const float* features) { take_query<Codes>(shape, queries, i, features); });
  const auto tile_at = [&](int32_t begin, int32_t end) {
    attend_tile<Codes>(queries,
                       aligned ? tile_in_place<Codes>(shape, layer, task, queries, begin, end)
                               : tile_of_copy<Codes>(shape, layer, task, queries, begin, end),
                       begin);
  };
  attend_splits(shape, task, queries, [&](int32_t split) { each_tile(queries, split, tile_at); });
}

}  // namespace

void attend_integers(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  if (shape.format == KvFormat::int8) return attend_as<Int8Codes>(shape, layer, task, scratch);
  return attend_as<Int4Codes>(shape, layer, task, scratch);
}

}  // namespace headrace::HEADRACE_KERNELS
