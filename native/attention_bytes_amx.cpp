// Attention over int8 caches on machines with AMX: the integers of attention_integer_kernels.cpp, with its bits, by
// tile products of bytes.
//
// Features of queries and weights, of 16 bits, are two digits: 256 times one of [-64, 64], and one of [-128, 127]. Rows
// of a tile are the higher digits of eight queries, then their lower ones. Tiles want four features of a token, or four
// tokens of a feature, side by side, where the cache has two: each tile of keys and values is copied so, once for all
// queries of a task. Few queries are not worth the copy.
#include "attention_amx.h"
#include "attention_integers.h"

namespace headrace::amx {
namespace {

constexpr int32_t kUnitQueries = 8;   // two rows of digits each
constexpr int64_t kQuad = 4;          // bytes that tile products take side by side
constexpr int64_t kTileColumns = 64;  // features of queries, or tokens of weights, in a tile
constexpr int64_t kTileBytes = 16 * kTileColumns;
static_assert(kTileKeys == kTileColumns);

// 64 consecutive positions of one KV head in four runs of 16, in the cache (see AttentionShape).
struct CodeTile {
  const uint8_t *keys[kTileVectors], *values[kTileVectors];
  const float *key_scales[kTileVectors], *value_scales[kTileVectors];
  const uint8_t* next_keys[kTileVectors];  // of the tile after it
  int32_t begin;                           // its first position
};

HEADRACE_INLINE __m512i load_bytes(const void* p) { return _mm512_loadu_si512(p); }

// The queries of a task and its tiles, by tile products.
class Pipeline {
  using TileUnit = Unit<CodeTile>;

 public:
  Pipeline(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, const Queries& queries)
      : shape_(shape),
        layer_(layer),
        task_(task),
        queries_(queries),
        feature_tiles_(tiles_of(queries.dim, kTileColumns)) {
    Scratch parts{queries.end};
    const int64_t units = tiles_of(queries.count, kUnitQueries);
    q_ = parts.take<int8_t>(units * feature_tiles_ * kTileBytes);
    steps_ = parts.take(tiles_of(queries.count, kLanes) * kLanes);  // all parts begin with a cache line
    keys_ = parts.take<int8_t>(feature_tiles_ * kTileColumns * kTileKeys);
    values_ = parts.take<int8_t>(queries.dim * kTileKeys);
    weights_ = parts.take<int8_t>(kTileBytes);
    weight_units_ = parts.take(kLanes);
    scores_ = parts.take(kUnitQueries * kTileKeys);
    products_ = parts.take<int32_t>(16 * kTileKeys);
    sums_ = parts.take<int32_t>(16 * queries.dim);
    __builtin_memset(q_, 0, units * feature_tiles_ * kTileBytes);
    configure();
  }
  ~Pipeline() { release_tiles(); }

  void take_query(int32_t i, const float* source) {
    int16_t* codes = reinterpret_cast<int16_t*>(queries_.q + queries_.dim);
    steps_[i] = round_query<Int8Codes>(shape_, source, queries_.q, codes);
    int8_t* unit = q_ + i / kUnitQueries * feature_tiles_ * kTileBytes;
    const int64_t row = i % kUnitQueries;
    for (int64_t d = 0; d < queries_.dim; ++d) {
      int8_t* tile = unit + d / kTileColumns * kTileBytes + d % kTileColumns;
      tile[row * kTileColumns] = static_cast<int8_t>((codes[d] + 128) >> 8);
      tile[(kUnitQueries + row) * kTileColumns] = static_cast<int8_t>(codes[d]);
    }
  }

  // All queries that see some of the tile at `begin`; `end`: of the positions to come.
  void attend_tile(int32_t begin, int32_t end) {
    CodeTile& tile = tiles_[num_tiles_++ % 2];
    place(tile, begin, end);
    copy_keys(tile);
    units_.push(queries_, tile, kUnitQueries, [this](TileUnit& next, const TileUnit& now) { run(next, now); });
  }

  void flush() {
    units_.flush([this](TileUnit& next, const TileUnit& now) { run(next, now); });
  }

 private:
  // Tile registers: 0 to 3 sum, 4 holds digits, 5 to 7 keys or values.
  static void configure() {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
    config.load();
  }

  // Runs beyond `end` repeat the first; nothing reads them unmasked.
  void place(CodeTile& tile, int32_t begin, int32_t end) const {
    tile.begin = begin;
    for (int g = 0; g < kTileVectors; ++g) {
      const int32_t run = begin + g * static_cast<int32_t>(kLanes), position = run < end ? run : begin;
      const int32_t offset = position % shape_.block_size;
      const CodeBlock block(shape_, layer_, {task_.block_table, task_.kv_head, position});
      tile.keys[g] = block.keys + offset * 2;
      tile.values[g] = block.values + int64_t{offset} * shape_.head_dim;
      tile.key_scales[g] = reinterpret_cast<const float*>(block.key_scales) + offset;
      tile.value_scales[g] = reinterpret_cast<const float*>(block.value_scales) + offset;
      const Position next = run_ahead(task_, queries_, run, 1, position);
      tile.next_keys[g] = CodeBlock(shape_, layer_, next).keys + next.index % shape_.block_size * 2;
      __builtin_prefetch(tile.key_scales[g]);
      __builtin_prefetch(tile.value_scales[g]);
    }
  }

  // The scores of a unit and their highest, the weights and the values of the one before.
  void run(TileUnit& next, const TileUnit& now) {
    if (now.tile) {
      if (now.first_of_tile) copy_values(*now.tile);
      weigh(now);
    }
    if (next.tile) with_number(tiles_of(next.high, kLanes), [&]<int N>() HEADRACE_INLINE_LAMBDA { score<N>(next); });
    if (now.tile) sum_values();
    if (next.tile) find_decays(next);
    if (now.tile) add_sums(now);
  }

  // The products of the digits at `left` and what lies at `right`, 64 bytes further for each of N sums.
  template <int N>
  static HEADRACE_INLINE void multiply(const int8_t* left, const int8_t* right, int64_t stride) {
    tile_load<4>(left, 64);
    tile_load<5>(right, stride);
    tile_multiply_bytes<0, 4, 5>();
    if constexpr (N > 1) {
      tile_load<6>(right + 64, stride);
      tile_multiply_bytes<1, 4, 6>();
    }
    if constexpr (N > 2) {
      tile_load<7>(right + 128, stride);
      tile_multiply_bytes<2, 4, 7>();
    }
    if constexpr (N > 3) {
      tile_load<5>(right + 192, stride);
      tile_multiply_bytes<3, 4, 5>();
    }
  }

  template <int N>
  HEADRACE_INLINE void score(const TileUnit& unit) {
    const int8_t* q = q_ + unit.first / kUnitQueries * feature_tiles_ * kTileBytes;
    clear<N>();
    for (int64_t i = 0; i < feature_tiles_; ++i)
      multiply<N>(q + i * kTileBytes, keys_ + i * kTileColumns * kTileKeys, kQuad * kTileKeys);
    store_sums<N>(products_, kTileKeys * sizeof(int32_t));
  }

  void sum_values() {
    for (int64_t d = 0; d < queries_.dim; d += 4 * kLanes) {
      with_number((queries_.dim - d) / kLanes, [&]<int N>() HEADRACE_INLINE_LAMBDA {
        clear<N>();
        multiply<N>(weights_, values_ + kQuad * d, kQuad * queries_.dim);
        store_sums<N>(sums_ + d, queries_.dim * sizeof(int32_t));
      });
    }
  }

  // A sum of products, from those of its digits.
  static HEADRACE_INLINE f32x16 whole(const int32_t* higher, const int32_t* lower) {
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(load_bytes(higher), 8), load_bytes(lower));
    return to_f32((i32x16)sum);
  }

  // From the scores of the tile and their highest, what is subtracted from them and what older results shrink by.
  void find_decays(TileUnit& unit) {
    const int32_t begin = unit.tile->begin;
    const bool all = queries_.low(unit.end - 1, begin) == 0 && queries_.high(unit.first, begin) == kTileKeys;
    f32x16 scales[kTileVectors], found[kLanes];
#pragma GCC unroll 4
    for (int g = 0; g < kTileVectors; ++g) scales[g] = load(unit.tile->key_scales[g]);
    const int64_t lower = kUnitQueries * kTileKeys;
    const int32_t rows = unit.rows();
#pragma GCC unroll 16
    for (int32_t row = 0; row < kLanes; ++row) {
      found[row] = broadcast(kNegativeInfinity);
      if (row >= kUnitQueries || row >= rows) continue;
      const int32_t i = unit.first + row, low = queries_.low(i, begin), high = queries_.high(i, begin);
      const f32x16 step = broadcast(steps_[i]);
#pragma GCC unroll 4
      for (int g = 0; g < kTileVectors; ++g) {
        const int64_t at = row * kTileKeys + g * kLanes;
        f32x16 s = whole(products_ + at, products_ + lower + at) * step * scales[g];
        if (!all) {
          const i32x16 ids = lane_ids() + g * static_cast<int>(kLanes);
          s = select((ids >= low) & (ids < high), s, broadcast(kNegativeInfinity));
        }
        store(scores_ + at, s);
        found[row] = max(s, found[row]);
      }
    }
    const Peaks peaks(load_part(queries_.maxima + unit.first, rows), highest_lanes(found));
    store_part(queries_.maxima + unit.first, peaks.maxima, rows);
    store(unit.subtract, peaks.subtract);
    store(unit.decays, peaks.decays);
  }

  // Weights of a tile, times the scales of its values, to 16 bits of the largest.
  void weigh(const TileUnit& unit) {
    const int32_t rows = unit.rows();
    const int64_t stride = queries_.stride, digits = kUnitQueries * kTileColumns;
    float *sums = queries_.state + unit.first * stride + queries_.dim, *const scores = scores_;
    int8_t* const weights = weights_;
    f32x16 scales[kTileVectors];
#pragma GCC unroll 4
    for (int g = 0; g < kTileVectors; ++g) scales[g] = load(unit.tile->value_scales[g]);
    __m512i best[kLanes];
#pragma GCC unroll 16
    for (int32_t row = 0; row < kLanes; ++row) {
      best[row] = _mm512_setzero_si512();
      if (row >= kUnitQueries || row >= rows) continue;
      const f32x16 subtract = broadcast(unit.subtract[row]);
      f32x16 total = {};
#pragma GCC unroll 4
      for (int g = 0; g < kTileVectors; ++g) {
        float* at = scores + row * kTileKeys + g * kLanes;
        const f32x16 w = exp2(load(at) - subtract), none = {};
        total = total + w;
        const f32x16 scaled = select(w == none, none, w * scales[g]);  // unseen: whatever lies there
        store(at, scaled);
        best[row] = _mm512_max_epi32(best[row], (__m512i)scaled);  // in the order of the numbers
      }
      float* sum = sums + row * stride;
      store(sum, load(sum) * unit.decays[row] + total);
    }
    const f32x16 peaks = (f32x16)reduce_lanes(best, [](__m512i x, __m512i y) { return _mm512_max_epi32(x, y); });
    float factors[kLanes];
    store(factors, select(peaks > kSmallest, kUnit / peaks, f32x16{}));
    store(weight_units_, select(peaks <= kSmallest, f32x16{}, peaks / kUnit));
    for (int32_t row = 0; row < rows; ++row) {
      const f32x16 factor = broadcast(factors[row]);
      __m512i codes[kTileVectors];
#pragma GCC unroll 4
      for (int g = 0; g < kTileVectors; ++g) {
        const f32x16 rounded = load(scores + row * kTileKeys + g * kLanes) * factor + kRound;
        codes[g] = _mm512_sub_epi32((__m512i)rounded, _mm512_set1_epi32(std::bit_cast<int32_t>(kRound)));
      }
      store_digits(weights + row * kTileColumns, weights + row * kTileColumns + digits, codes);
    }
  }

  // The digits of 64 weights: token 16 g + 4 l + i at 16 l + 4 g + i.
  static HEADRACE_INLINE void store_digits(int8_t* high, int8_t* low, const __m512i (&codes)[kTileVectors]) {
    const __m512i half = _mm512_set1_epi32(128), byte = _mm512_set1_epi32(255);
    const auto higher = [&](int g) { return _mm512_srai_epi32(_mm512_add_epi32(codes[g], half), 8); };
    const auto lower = [&](int g) { return _mm512_and_epi32(codes[g], byte); };
    _mm512_storeu_si512(
        high, _mm512_packs_epi16(_mm512_packs_epi32(higher(0), higher(1)), _mm512_packs_epi32(higher(2), higher(3))));
    _mm512_storeu_si512(
        low, _mm512_packus_epi16(_mm512_packus_epi32(lower(0), lower(1)), _mm512_packus_epi32(lower(2), lower(3))));
  }

  // Scale results by their decays; add the weighted values.
  void add_sums(const TileUnit& unit) {
    const int64_t dim = queries_.dim, stride = queries_.stride, lower = kUnitQueries * dim;
    const int32_t* sums = sums_;
    float* state = queries_.state + unit.first * stride;
    for (int32_t row = 0; row < unit.rows(); ++row, sums += dim, state += stride) {
      const f32x16 decay = broadcast(unit.decays[row]), step = broadcast(weight_units_[row]);
      for (int64_t d = 0; d < dim; d += kLanes)
        store(state + d, multiply_add(load(state + d), decay, whole(sums + d, sums + lower + d) * step));
    }
  }

  // 16 columns of two rows of pairs, as quads.
  static HEADRACE_INLINE void store_quads(int8_t* to, const uint8_t* first, const uint8_t* second) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1)));
  }

  // [features / 4][kTileKeys][4]; meanwhile the values are asked for.
  void copy_keys(const CodeTile& tile) {
    const int64_t dim = queries_.dim, stride = 2 * shape_.block_size;
    for (int64_t d = 0; d < dim; d += kQuad) {
#pragma GCC unroll 4
      for (int g = 0; g < kTileVectors; ++g) {
        const uint8_t* from = tile.keys[g] + d / 2 * stride;
        store_quads(keys_ + d * kTileKeys + g * kQuad * kLanes, from, from + stride);
        __builtin_prefetch(tile.values[g] + d * kLanes);
      }
    }
  }

  // [kTileKeys / 4][dim][4], in the order of digits of weights; meanwhile the keys of the tile after it are asked for.
  void copy_values(const CodeTile& tile) {
    const int64_t dim = queries_.dim, stride = 2 * dim;
    for (int quad = 0; quad < kLanes / kQuad; ++quad) {
      for (int g = 0; g < kTileVectors; ++g) {
        const uint8_t* from = tile.values[g] + 2 * quad * stride;
        int8_t* to = values_ + (kTileVectors * quad + g) * kQuad * dim;
        for (int64_t d = 0; d < dim; d += kLanes) {
          store_quads(to + kQuad * d, from + 2 * d, from + stride + 2 * d);
          __builtin_prefetch(tile.next_keys[g] + (quad * dim + d) * kQuad * 2);
        }
      }
    }
  }

  const AttentionShape& shape_;
  const KvLayer& layer_;
  const AttentionTask& task_;
  const Queries& queries_;
  const int64_t feature_tiles_;
  CodeTile tiles_[2];
  int64_t num_tiles_ = 0;
  Units<CodeTile> units_;
  int8_t* q_;            // [8 queries][64 features][16][64]
  float* steps_;         // [queries], of which their features are multiples
  int8_t* keys_;         // see copy_keys
  int8_t* values_;       // see copy_values
  int8_t* weights_;      // [16][64 tokens], in the order of store_digits
  float* weight_units_;  // [queries], of which their weights are multiples
  float* scores_;        // [8][kTileKeys]
  int32_t* products_;    // [16][kTileKeys]
  int32_t* sums_;        // [16][dim]
};

}  // namespace

void attend_bytes(const AttentionShape& shape, const KvLayer& layer, const AttentionTask& task, float* scratch) {
  const Queries queries(shape, task, scratch);
  Pipeline pipeline(shape, layer, task, queries);
  each_query(shape, task, queries, [&](int32_t i, const float* features) { pipeline.take_query(i, features); });
  attend_splits(shape, task, queries, [&](int32_t split) {
    each_tile(
        queries, split, [&](int32_t begin, int32_t end) { pipeline.attend_tile(begin, end); },
        [&] { pipeline.flush(); });
  });
}

}  // namespace headrace::amx
