// A tile of keys and values, and the two products over it. Included by attention_queries.h only (see vectors.h).
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace headrace {
namespace {

constexpr int kTileVectors = kTileKeys / kLanes;
// Whether cached values of that type are multiples of a scale of their token and KV head.
template <typename T>
constexpr bool is_scaled = std::is_same_v<T, E4m3>;
// Whether their rows lie in pairs.
template <typename T>
constexpr bool is_paired = std::is_same_v<T, uint16_t>;
template <typename T>
constexpr int kRowsTogether = is_paired<T> ? 2 : 1;

// Queries and vectors summed at once.
#if defined(__AVX512F__)
constexpr int kBatch = 6, kBlock = 4;  // 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kBatch = 6, kBlock = 1;  // 12 of 16, two to a vector
#else
constexpr int kBatch = 2, kBlock = 1;  // 8 of 16, four to a vector
#endif

// 64 consecutive positions of one KV head in four runs of 16: keys[g] is a matrix of run g with a row per feature,
// values[g] one with a row per token; rows are strides apart (see load_row). Runs beyond the context repeat the first;
// nothing reads them unmasked.
template <typename T>
struct Tile {
  const T* keys[kTileVectors];
  const T* values[kTileVectors];
  const T* next_keys[kTileVectors];                            // of the tile after it, to be fetched early
  const T *far_keys[kTileVectors], *far_values[kTileVectors];  // of the one after that, for L2
  int64_t key_stride, value_stride;
};

// Sixteen columns of row `row`, of which `kHalf` is the remainder by kRowsTogether; rows that lie in pairs have pairs
// of columns, so a pair of rows begins where the first of them would.
template <int kHalf, typename T>
HEADRACE_INLINE f32x16 load_row(const T* matrix, int64_t row, int64_t stride) {
  if constexpr (is_paired<T>) return load_half<kHalf>(matrix + (row - kHalf) * stride);
  return load(matrix + row * stride);
}

// `body<kHalf>(row)` for the rows [begin, end), in order.
template <typename T, typename Body>
HEADRACE_INLINE void each_row(int begin, int end, Body body) {
  if constexpr (is_paired<T>) {
    for (int row = begin / 2 * 2; row < end; row += 2) {
      if (row >= begin) body.template operator()<0>(row);
      if (row + 1 < end) body.template operator()<1>(row + 1);
    }
  } else {
    for (int row = begin; row < end; ++row) body.template operator()<0>(row);
  }
}

// Blocks lie apart, so hardware prefetchers start over at each: fetch the values while scoring, the next keys while
// summing values. Each step asks for its share of the runs, a cache line at a time.
template <typename T>
HEADRACE_INLINE void fetch(const T* const (&runs)[kTileVectors], int64_t offset) {
  if (offset * sizeof(T) % 64 != 0) return;
#pragma GCC unroll 4
  for (int g = 0; g < kTileVectors; ++g) __builtin_prefetch(runs[g] + offset);
}

// And what comes after them into L2, which waits for more lines at once than L1 does.
template <typename T>
HEADRACE_INLINE void fetch(const T* const (&runs)[kTileVectors], const T* const (&far)[kTileVectors], int64_t offset) {
  if (offset * sizeof(T) % 64 != 0) return;
#pragma GCC unroll 4
  for (int g = 0; g < kTileVectors; ++g) __builtin_prefetch(far[g] + offset, 0, 2);
  fetch(runs, offset);
}

// out[i * kTileKeys + key] = sum over d, in order, of q[d * kBatch + i] * key[d], for G runs of keys from `run` on.
template <int N, int G, bool kInPlace, typename T>
HEADRACE_INLINE void score_runs(const float* q, int64_t dim, const Tile<T>& tile, int run, float* out) {
  f32x16 sums[N][G];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) sums[i][g] = f32x16{};  // one by one: as a whole it would go through memory
  }
  const auto add_feature = [&]<int kHalf>(int64_t d) HEADRACE_INLINE_LAMBDA {
    f32x16 keys[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) keys[g] = load_row<kHalf>(tile.keys[run + g], d, tile.key_stride);
    if constexpr (kInPlace) fetch(tile.values, tile.far_values, d * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const f32x16 feature = broadcast(q[d * kBatch + i]);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sums[i][g] = feature * keys[g] + sums[i][g];
    }
  };
#pragma GCC unroll 2
  for (int64_t d = 0; d < dim; d += 2) {  // dim is a multiple of 16
    add_feature.template operator()<0>(d);
    add_feature.template operator()<kRowsTogether<T> - 1>(d + 1);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) store(out + i * kTileKeys + (run + g) * kLanes, sums[i][g]);
  }
}

// Scores of N queries for the first `runs` runs; what they leave of the others is chance.
template <int N, bool kInPlace, typename T>
void score(const float* q, int64_t dim, const Tile<T>& tile, int runs, float* out) {
  constexpr int kFew = kBlock < 2 ? 1 : 2;
  if (kBlock == kTileVectors && runs > kFew) {
    score_runs<N, kBlock, kInPlace>(q, dim, tile, 0, out);
  } else {
    for (int run = 0; run < runs; run += kFew) score_runs<N, kFew, kInPlace>(q, dim, tile, run, out);
  }
}

// Scale V vectors of N results, from feature d on, by `decays`; add the weighted values of tile positions [begin, end).
template <int N, int V, bool kInPlace, typename T>
HEADRACE_INLINE void sum_columns(const float* weights, const float* decays, const Tile<T>& tile, int64_t d, int begin,
                                 int end, float* state, int64_t stride) {
  f32x16 sums[N][V];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[i][v] = load(state + i * stride + d + v * kLanes) * decays[i];
  }
  for (int g = begin / kLanes; g * kLanes < end; ++g) {
    const int first = begin > g * kLanes ? begin : g * kLanes, last = end < (g + 1) * kLanes ? end : (g + 1) * kLanes;
    const T* run = tile.values[g] + d * kRowsTogether<T>;
    each_row<T>(first, last, [&]<int kHalf>(int j) HEADRACE_INLINE_LAMBDA {
      f32x16 values[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        values[v] = load_row<kHalf>(run + v * kLanes * kRowsTogether<T>, j - g * kLanes, tile.value_stride);
      if (kInPlace && d == 0) fetch(tile.next_keys, tile.far_keys, j * tile.value_stride / kTileVectors);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const f32x16 weight = broadcast(weights[i * kTileKeys + j]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[i][v] = weight * values[v] + sums[i][v];
      }
    });
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(state + i * stride + d + v * kLanes, sums[i][v]);
  }
}

template <int N, bool kInPlace, typename T>
void sum_values(const float* weights, const float* decays, const Tile<T>& tile, int begin, int end, float* state,
                int64_t stride, int64_t dim) {
  int64_t d = 0;
  for (; d + kBlock * kLanes <= dim; d += kBlock * kLanes)
    sum_columns<N, kBlock, kInPlace>(weights, decays, tile, d, begin, end, state, stride);
  if (kBlock > 2 && d + 2 * kLanes <= dim) {
    sum_columns<N, 2, kInPlace>(weights, decays, tile, d, begin, end, state, stride);
    d += 2 * kLanes;
  }
  if (kBlock > 1 && d < dim) sum_columns<N, 1, kInPlace>(weights, decays, tile, d, begin, end, state, stride);
}

}  // namespace
}  // namespace headrace
