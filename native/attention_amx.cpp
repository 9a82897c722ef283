// Attention on machines with AMX: over bf16 caches here, over int8 in attention_bytes_amx.cpp (see
// attention_kernels.cpp for the walk over tiles and splits).
//
// Queries and weights are rounded to bf16, as keys and values are; sums are f32. They are those of tile products, which
// take 32 features (of keys) or tokens (of values) at a time:
//   sum += (f(0) + f(1)), f(i) = a chain of fused multiply-adds over the features or tokens i, i + 2, ...
// Few queries, as in decoding, add them up in vectors, straight from the cache, while it is being read; more take
// tiles. The bits are the same: a row of a product depends on that row alone. What lies below the smallest normal f32
// counts as zero on the way in and out, as it does in tile products.
#include "attention_amx.h"

#include "attention_cache.h"

namespace headrace::amx {
namespace {

constexpr int32_t kFewQueries = 3;              // by measurement, as the next
constexpr int32_t kMostIntegersByVectors = 16;  // queries
constexpr int32_t kTileQueries = 16;
constexpr int64_t kTileColumns = 32;                // features of a query, or tokens of weights, in a tile
constexpr int64_t kTileValues = 16 * kTileColumns;  // bf16 in a tile
constexpr int64_t kSumColumns = 4 * kLanes;         // of the four tiles that sum
static_assert(kTileKeys == kSumColumns);

// Denormal numbers are zeros while this lives: for products only, since results of splits join in the default mode.
class FlushedDenormals {
 public:
  FlushedDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
  ~FlushedDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

HEADRACE_INLINE f32x16 rounded(f32x16 x) {
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
}

// 16 features of a query, scaled; zeros behind the last.
HEADRACE_INLINE f32x16 scaled_part(const AttentionShape& shape, const float* features, int64_t d) {
  const int64_t left = shape.head_dim - d;
  return load_part(features + d, left < 0 ? 0 : left < kLanes ? left : kLanes) * (shape.scale * kLog2e);
}

// Scale what older tiles made of a query.
HEADRACE_INLINE void shrink(const Queries& queries, int32_t i, float decay) {
  float* state = queries.state + i * queries.stride;
  for (int64_t d = 0; d < queries.dim; d += kLanes) store(state + d, load(state + d) * decay);
}

// ---- few queries (what comes later is not asked for earlier: measured, it costs more here than it brings)

// Scores of N queries for G runs of keys from `run` on.
template <int N, int G>
HEADRACE_INLINE void score_runs(const Queries& queries, int32_t first, const Tile<uint16_t>& tile, int run) {
  const float* q = queries.q + first * queries.dim;
  float* out = queries.scores + first * kTileKeys + run * kLanes;
  for (int64_t begin = 0; begin < queries.dim; begin += kTileColumns) {
    f32x16 sums[N][G][2];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sums[i][g][0] = sums[i][g][1] = f32x16{};
    }
    const int64_t end = begin + kTileColumns < queries.dim ? begin + kTileColumns : queries.dim;
    const auto add_feature = [&]<int kHalf>(int64_t d) HEADRACE_INLINE_LAMBDA {
      f32x16 keys[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) keys[g] = load_row<kHalf>(tile.keys[run + g], d, tile.key_stride);
      fetch(tile.values, d * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const f32x16 feature = broadcast(q[d * kBatch + i]);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sums[i][g][kHalf] = multiply_add(feature, keys[g], sums[i][g][kHalf]);
      }
    };
#pragma GCC unroll 2
    for (int64_t d = begin; d < end; d += 2) {
      add_feature.template operator()<0>(d);
      add_feature.template operator()<1>(d + 1);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        float* to = out + i * kTileKeys + g * kLanes;
        const f32x16 sum = sums[i][g][0] + sums[i][g][1];
        store(to, begin == 0 ? sum : load(to) + sum);
      }
    }
  }
}

template <int N>
void score(const Queries& queries, int32_t first, const Tile<uint16_t>& tile, int runs) {
  if (runs > 2) {
    score_runs<N, 4>(queries, first, tile, 0);
  } else {
    score_runs<N, 2>(queries, first, tile, 0);
  }
}

// The weighted values of tokens [begin, end), added to V vectors of N results, from feature d on.
template <int N, int V>
HEADRACE_INLINE void sum_columns(const Queries& queries, int32_t first, const Tile<uint16_t>& tile, int64_t d,
                                 int begin, int end) {
  const float* weights = queries.scores + first * kTileKeys;
  for (int part = begin / kTileColumns; part * kTileColumns < end; ++part) {
    f32x16 sums[N][V][2];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[i][v][0] = sums[i][v][1] = f32x16{};
    }
    for (int run = 2 * part; run < 2 * part + 2; ++run) {
      constexpr int kRun = kLanes;
      const uint16_t* from = tile.values[run] + 2 * d;
      each_row<uint16_t>(larger(begin, run * kRun), smaller(end, (run + 1) * kRun),
                         [&]<int kHalf>(int j) HEADRACE_INLINE_LAMBDA {
                           f32x16 values[V];
#pragma GCC unroll 4
                           for (int v = 0; v < V; ++v)
                             values[v] = load_row<kHalf>(from + 2 * v * kLanes, j - run * kRun, tile.value_stride);
                           if (d == 0) fetch(tile.next_keys, j * tile.value_stride / kTileVectors);
#pragma GCC unroll 8
                           for (int i = 0; i < N; ++i) {
                             const f32x16 weight = broadcast(weights[i * kTileKeys + j]);
#pragma GCC unroll 4
                             for (int v = 0; v < V; ++v)
                               sums[i][v][kHalf] = multiply_add(weight, values[v], sums[i][v][kHalf]);
                           }
                         });
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      float* state = queries.state + (first + i) * queries.stride + d;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(state + v * kLanes, load(state + v * kLanes) + (sums[i][v][0] + sums[i][v][1]));
    }
  }
}

template <int N>
void sum_values(const Queries& queries, int32_t first, const Tile<uint16_t>& tile, int begin, int end) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= queries.dim; d += 4 * kLanes) sum_columns<N, 4>(queries, first, tile, d, begin, end);
  for (; d < queries.dim; d += kLanes) sum_columns<N, 1>(queries, first, tile, d, begin, end);
}

void attend_few(const Queries& queries, const Tile<uint16_t>& tile, int32_t begin) {
  const auto each_that_sees = [&](auto body) {
    each_batch(queries.count, [&]<int N>(int32_t first) {
      const int32_t low = queries.low(first, begin), high = queries.high(first + N - 1, begin);
      if constexpr (N <= kFewQueries) {
        if (low < high) body.template operator()<N>(first, low, high);
      }
    });
  };
  each_that_sees([&]<int N>(int32_t first, int32_t, int32_t high) {
    score<N>(queries, first, tile, static_cast<int>(tiles_of(high, kLanes)));
  });
  soften<false>(queries, begin);
  for (int32_t i = 0; i < queries.count; ++i) {
    for (int64_t j = 0; j < kTileKeys; j += kLanes) {
      float* weights = queries.scores + i * kTileKeys + j;
      store(weights, rounded(load(weights)));
    }
    shrink(queries, i, queries.decays[i]);
  }
  each_that_sees(
      [&]<int N>(int32_t first, int32_t low, int32_t high) { sum_values<N>(queries, first, tile, low, high); });
}

// ---- tile products

// Tile registers: 0 to 3 sum, 4 holds queries or weights, 5 to 7 keys or values.
void configure(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 5; ++tile) config.set(tile, rows, 64);
  for (int tile = 5; tile < 8; ++tile) config.set(tile, 16, 64);
  config.load();
}

// The products of `left` and what lies at the first N of `rights`, `at` further, added to the N sums.
template <int N>
inline void multiply(const uint16_t* left, const uint16_t* const* rights, int64_t at, int64_t stride) {
  tile_load<4>(left, 64);
  tile_load<5>(rights[0] + at, stride);
  tile_multiply_bf16<0, 4, 5>();
  if constexpr (N > 1) {
    tile_load<6>(rights[1] + at, stride);
    tile_multiply_bf16<1, 4, 6>();
  }
  if constexpr (N > 2) {
    tile_load<7>(rights[2] + at, stride);
    tile_multiply_bf16<2, 4, 7>();
  }
  if constexpr (N > 3) {
    tile_load<5>(rights[3] + at, stride);
    tile_multiply_bf16<3, 4, 5>();
  }
}

// A tile of keys and values, in the cache or copied.
struct CachedTile {
  Tile<uint16_t> at;
  int32_t begin;      // its first position
  int32_t low, high;  // tokens that a query of the task sees
};

// The queries of a task and its tiles, by tile products.
class Pipeline {
  using TileUnit = Unit<CachedTile>;

 public:
  Pipeline(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, const Queries& queries)
      : shape_(shape),
        layer_(layer),
        task_(task),
        queries_(queries),
        feature_tiles_(tiles_of(queries.dim, kTileColumns)),
        aligned_(is_aligned(shape)),
        copies_keys_(!aligned_ || shape.head_dim % kTileColumns != 0) {
    Scratch parts{queries.end};
    q_ = parts.take<uint16_t>(tiles_of(queries.count, kTileQueries) * feature_tiles_ * kTileValues);
    keys_ = parts.take<uint16_t>(feature_tiles_ * kTileColumns * kTileKeys);
    values_ = parts.take<uint16_t>(queries.dim * kTileKeys);
    scores_ = parts.take(kTileQueries * kTileKeys);
    weights_ = parts.take<uint16_t>(kTileQueries * kTileKeys);
  }

  void take_query(int32_t i, const float* features) {
    for (int64_t tile = 0; tile < feature_tiles_; ++tile) {
      uint16_t* to = q_ + (i / kTileQueries * feature_tiles_ + tile) * kTileValues + i % kTileQueries * kTileColumns;
      const int64_t d = tile * kTileColumns;
      store_bf16(to, scaled_part(shape_, features, d), scaled_part(shape_, features, d + kLanes));
    }
  }

  // All queries that see some of the tile at `begin`; `end`: of the positions to come.
  void attend_tile(int32_t begin, int32_t end) {
    CachedTile& tile = tiles_[num_tiles_++ % 2];
    tile.begin = begin;
    tile.low = queries_.low(0, begin);
    tile.high = queries_.high(queries_.count - 1, begin);
    if (aligned_) tile.at = tile_in_place<uint16_t>(shape_, layer_, task_, queries_, begin, end);
    if (copies_keys_) copy_keys(tile);
    units_.push(queries_, tile, kTileQueries, [this](TileUnit& next, const TileUnit& now) { run(next, now); });
  }

  void flush() {
    units_.flush([this](TileUnit& next, const TileUnit& now) { run(next, now); });
  }

 private:
  static HEADRACE_INLINE void store_bf16(uint16_t* to, f32x16 a, f32x16 b) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
  }

  // The scores of a unit and their highest, the weights and the values of the one before. Tile products and
  // multiply-adds of vectors hinder each other, so they take turns.
  void run(TileUnit& next, const TileUnit& now) {
    if (now.first_of_tile) copy_values(*now.tile);
    for (int32_t row = 0; row < now.rows(); ++row) {
      weigh(now, row);
      shrink(queries_, now.first + row, now.decays[row]);
    }
    if (next.tile) with_number(tiles_of(next.high, kLanes), [&]<int N>() HEADRACE_INLINE_LAMBDA { score<N>(next); });
    if (now.tile) sum_values(now);
    if (next.tile) find_decays(next);
  }

  template <int N>
  HEADRACE_INLINE void score(const TileUnit& unit) {
    const Tile<uint16_t>& tile = unit.tile->at;
    const uint16_t* q = q_ + unit.first / kTileQueries * feature_tiles_ * kTileValues;
    clear<N>();
    for (int64_t i = 0; i < feature_tiles_; ++i) {
      multiply<N>(q + i * kTileValues, tile.keys, i * kTileColumns * tile.key_stride, tile.key_stride * 4);
      if (aligned_ && unit.first_of_tile) fetch_part(tile, i);
    }
    store_sums<N>(scores_, kTileKeys * sizeof(float));
  }

  // What comes two tiles later, into L2.
  HEADRACE_INLINE void fetch_part(const Tile<uint16_t>& tile, int64_t part) {
    const int64_t values = kLanes * kTileColumns, end = kLanes * queries_.dim;
    for (int64_t i = part * values; i < (part + 1) * values && i < end; i += kTileColumns) {
#pragma GCC unroll 4
      for (int g = 0; g < kTileVectors; ++g) {
        __builtin_prefetch(tile.far_keys[g] + i, 0, 2);
        __builtin_prefetch(tile.far_values[g] + i, 0, 2);
      }
    }
  }

  // From the highest scores of the tile, what is subtracted from scores and what older results shrink by.
  void find_decays(TileUnit& unit) {
    const int32_t begin = unit.tile->begin;
    const bool whole = queries_.low(unit.end - 1, begin) == 0 && queries_.high(unit.first, begin) == kTileKeys;
    f32x16 found[kTileQueries];
#pragma GCC unroll 16
    for (int32_t row = 0; row < kTileQueries; ++row) {
      found[row] = broadcast(kNegativeInfinity);
      if (row >= unit.rows()) continue;
      float* scores = scores_ + row * kTileKeys;
      const int32_t i = unit.first + row;
      found[row] = whole ? highest<false, false>(scores, nullptr, 0, 0)
                         : highest<false, true>(scores, nullptr, queries_.low(i, begin), queries_.high(i, begin));
    }
    const Peaks peaks(load(queries_.maxima + unit.first), highest_lanes(found));
    store(queries_.maxima + unit.first, peaks.maxima);
    store(unit.subtract, peaks.subtract);
    store(unit.decays, peaks.decays);
  }

  HEADRACE_INLINE void weigh(const TileUnit& unit, int32_t row) {
    const float* scores = scores_ + row * kTileKeys;
    const f32x16 subtract = broadcast(unit.subtract[row]);
    float* sums = queries_.state + (unit.first + row) * queries_.stride + queries_.dim;
    f32x16 total = {}, weights[kTileVectors];
#pragma GCC unroll 4
    for (int g = 0; g < kTileVectors; ++g) {
      weights[g] = exp2(load(scores + g * kLanes) - subtract);
      total = total + weights[g];
    }
    store(sums, load(sums) * unit.decays[row] + total);
#pragma GCC unroll 2
    for (int g = 0; g < kTileVectors; g += 2)
      store_bf16(weights_ + g / 2 * kTileValues + row * kTileColumns, weights[g], weights[g + 1]);
  }

  HEADRACE_INLINE void sum_values(const TileUnit& unit) {
    for (int64_t d = 0; d < queries_.dim; d += kSumColumns) {
      const uint16_t* values = values_ + 2 * d;
      const uint16_t* const columns[] = {values, values + 2 * kLanes, values + 4 * kLanes, values + 6 * kLanes};
      with_number((queries_.dim - d) / kLanes, [&]<int N>() HEADRACE_INLINE_LAMBDA {
        float* state = queries_.state + unit.first * queries_.stride + d;
        load_sums<N>(state, queries_.stride * sizeof(float));
        for (int64_t i = unit.low / kTileColumns; i < tiles_of(unit.high, kTileColumns); ++i)
          multiply<N>(weights_ + i * kTileValues, columns, i * kTileColumns * queries_.dim, queries_.dim * 4);
        store_sums<N>(state, queries_.stride * sizeof(float));
      });
    }
  }

  // A tile's values side by side, zeros where no query sees a token: what lies there may be another's, and no number.
  void copy_values(const CachedTile& tile) {
    if (!aligned_) return gather_values(tile);
    const int64_t row = 2 * queries_.dim;
    for (int32_t token = 0; token < kTileKeys; token += 2) {
      const auto seen = [&](int32_t j) { return j >= tile.low && j < tile.high; };
      const __m512i mask =
          _mm512_set1_epi32(static_cast<int32_t>((seen(token) ? 0xFFFFu : 0u) | (seen(token + 1) ? 0xFFFF0000u : 0u)));
      const uint16_t* from = tile.at.values[token / kLanes] + token % kLanes * tile.at.value_stride;
      uint16_t* to = values_ + token / 2 * row;
      for (int64_t i = 0; i < row; i += kTileColumns)
        _mm512_storeu_si512(to + i, _mm512_and_si512(_mm512_loadu_si512(from + i), mask));
    }
  }

  // Any block size and head dimension: token by token.
  void gather_values(const CachedTile& tile) {
    __builtin_memset(values_, 0, kTileKeys * queries_.dim * sizeof(uint16_t));
    for (int32_t j = tile.low; j < tile.high; ++j) {
      const int32_t position = tile.begin + j;
      const uint16_t* values = Place<uint16_t>(shape_, layer_, {task_.block_table, task_.kv_head, position}).values;
      for (int32_t d = 0; d < shape_.head_dim; ++d)
        values_[place_of<uint16_t>(j, d, queries_.dim)] =
            values[place_of<uint16_t>(position % shape_.block_size, d, shape_.head_dim)];
    }
  }

  // For heads that are no whole number of tiles; zeros behind them.
  void copy_keys(CachedTile& tile) {
    __builtin_memset(keys_, 0, kTileKeys * feature_tiles_ * kTileColumns * sizeof(uint16_t));
    if (aligned_) {
      for (int64_t d = 0; d < queries_.dim; d += 2) {
        for (int g = 0; g < kTileVectors; ++g)
          _mm512_storeu_si512(keys_ + d * kTileKeys + g * kTileColumns,
                              _mm512_loadu_si512(tile.at.keys[g] + d * tile.at.key_stride));
      }
    } else {
      for (int32_t j = tile.low; j < tile.high; ++j) {
        const int32_t position = tile.begin + j;
        const uint16_t* keys = Place<uint16_t>(shape_, layer_, {task_.block_table, task_.kv_head, position}).keys;
        for (int32_t d = 0; d < shape_.head_dim; ++d)
          keys_[place_of<uint16_t>(d, j, kTileKeys)] =
              keys[place_of<uint16_t>(d, position % shape_.block_size, shape_.block_size)];
      }
    }
    for (int g = 0; g < kTileVectors; ++g) tile.at.keys[g] = keys_ + g * kTileColumns;
    tile.at.key_stride = kTileKeys;
  }

  const AttentionShape& shape_;
  const KvLayer& layer_;
  const AttentionTask& task_;
  const Queries& queries_;
  const int64_t feature_tiles_;
  const bool aligned_, copies_keys_;
  CachedTile tiles_[2];
  int64_t num_tiles_ = 0;
  Units<CachedTile> units_;
  uint16_t* q_;        // [16 queries][32 features][16][32]
  uint16_t* keys_;     // a copy: [features / 2][kTileKeys][2]
  uint16_t* values_;   // a copy: [kTileKeys / 2][dim][2]
  float* scores_;      // [16][kTileKeys]
  uint16_t* weights_;  // [32 tokens][16][32]
};

void attend_bf16(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  const Queries queries(shape, task, scratch);
  if (queries.count <= kFewQueries && is_aligned(shape)) {
    each_query(shape, task, queries, [&](int32_t i, const float* features) {
      alignas(64) float part[kLanes];
      for (int64_t d = 0; d < queries.dim; d += kLanes) {
        store(part, rounded(scaled_part(shape, features, d)));
        for (int64_t j = 0; j < kLanes; ++j) queries.q[(d + j) * kBatch + i] = part[j];
      }
    });
    return attend_splits(shape, task, queries, [&](int32_t split) {
      const FlushedDenormals flushed;
      each_tile(queries, split, [&](int32_t begin, int32_t end) {
        attend_few(queries, tile_in_place<uint16_t>(shape, layer, task, queries, begin, end), begin);
      });
    });
  }
  Pipeline pipeline(shape, layer, task, queries);
  each_query(shape, task, queries, [&](int32_t i, const float* features) { pipeline.take_query(i, features); });
  configure(smaller(queries.count, kTileQueries));
  attend_splits(shape, task, queries, [&](int32_t split) {
    const FlushedDenormals flushed;
    each_tile(
        queries, split, [&](int32_t begin, int32_t end) { pipeline.attend_tile(begin, end); },
        [&] { pipeline.flush(); });
  });
  release_tiles();
}

}  // namespace

void attend(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  if (shape.format == KvFormat::bf16) return attend_bf16(shape, layer, task, scratch);
  if (shape.format == KvFormat::int8 && is_aligned(shape) && task.num_rows * shape.group() > kMostIntegersByVectors)
    return attend_bytes(shape, layer, task, scratch);
  avx512_vnni::attend(shape, layer, task, scratch);
}

}  // namespace headrace::amx
