// What attention by tile products shares, whatever the cache holds. Included by attention*_amx.cpp only (see
// vectors.h).
#pragma once

#include <immintrin.h>

#include "tiles_amx.h"

#define HEADRACE_KERNELS amx
#include "attention_queries.h"

namespace headrace::amx {
namespace {

int64_t tiles_of(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

// N sums of 16 columns, from nothing or from what lies side by side, `stride` bytes from row to row.
template <int N>
inline void clear() {
  tile_zero<0>();
  if (N > 1) tile_zero<1>();
  if (N > 2) tile_zero<2>();
  if (N > 3) tile_zero<3>();
}
template <int N>
inline void load_sums(const float* from, int64_t stride) {
  tile_load<0>(from, stride);
  if (N > 1) tile_load<1>(from + kLanes, stride);
  if (N > 2) tile_load<2>(from + 2 * kLanes, stride);
  if (N > 3) tile_load<3>(from + 3 * kLanes, stride);
}
template <int N, typename T>
inline void store_sums(T* to, int64_t stride) {
  tile_store<0>(to, stride);
  if (N > 1) tile_store<1>(to + kLanes, stride);
  if (N > 2) tile_store<2>(to + 2 * kLanes, stride);
  if (N > 3) tile_store<3>(to + 3 * kLanes, stride);
}

// Call `body<N>()` for N = n, or 4 if it is more.
template <typename Body>
HEADRACE_INLINE void with_number(int64_t n, Body body) {
  switch (n) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    default:
      return body.template operator()<4>();
  }
}

// Lane i: what `merge` makes of all lanes of x[i]. (One by one they would go to memory and come back as a vector, which
// waits for all that was stored before.)
template <typename Merge>
HEADRACE_INLINE __m512i reduce_lanes(const __m512i (&x)[kLanes], Merge merge) {
  const auto twos = [&](int i) HEADRACE_INLINE_LAMBDA {
    return merge(_mm512_unpacklo_epi32(x[i], x[i + 1]), _mm512_unpackhi_epi32(x[i], x[i + 1]));
  };
  const auto fours = [&](int i) HEADRACE_INLINE_LAMBDA {
    const __m512i a = twos(i), b = twos(i + 2);
    return merge(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  };
  const auto eights = [&](int i) HEADRACE_INLINE_LAMBDA {
    const __m512i a = fours(i), b = fours(i + 4);
    return merge(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xEE));
  };
  const __m512i a = eights(0), b = eights(8);
  return merge(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

// Lane i: the highest lane of x[i].
HEADRACE_INLINE f32x16 highest_lanes(const f32x16 (&x)[kLanes]) {
  __m512i bits[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) bits[i] = (__m512i)x[i];
  return (f32x16)reduce_lanes(
      bits, [](__m512i a, __m512i b) HEADRACE_INLINE_LAMBDA { return (__m512i)max((f32x16)a, (f32x16)b); });
}

// Some queries, at most 16, and a tile of keys and values, a `T`.
template <typename T>
struct Unit {
  const T* tile = nullptr;
  int32_t first = 0, end = 0;  // queries
  int32_t low = 0, high = 0;   // tokens that one of them sees
  bool first_of_tile = false;
  float subtract[kLanes];  // from scores
  float decays[kLanes];    // of what is older

  int32_t rows() const { return end - first; }
};

// Units one after the other, each in two steps, so that none waits for the other's products: `run(next, now)` does the
// first of one and the second of the one before.
template <typename T>
class Units {
 public:
  // All queries that see some of the tile, `size` at a time.
  template <typename Run>
  void push(const Queries& queries, const T& tile, int32_t size, Run run) {
    bool is_first = true;
    for (int32_t first = 0; first < queries.count; first += size) {
      const int32_t stop = smaller(first + size, queries.count);
      const int32_t low = queries.low(first, tile.begin), high = queries.high(stop - 1, tile.begin);
      if (low >= high) continue;
      push({&tile, first, stop, low, high, is_first}, run);
      is_first = false;
    }
  }

  template <typename Run>
  void flush(Run run) {
    push({}, run);
  }

 private:
  struct Which {
    const T* tile = nullptr;
    int32_t first = 0, end = 0, low = 0, high = 0;
    bool first_of_tile = false;
  };

  template <typename Run>
  void push(const Which& which, Run run) {
    const int64_t i = count_++;
    Unit<T>& unit = units_[i % 2];
    unit.tile = which.tile;
    unit.first = which.first;
    unit.end = which.end;
    unit.low = which.low;
    unit.high = which.high;
    unit.first_of_tile = which.first_of_tile;
    run(unit, units_[(i + 1) % 2]);
  }

  Unit<T> units_[2];
  int64_t count_ = 0;
};

}  // namespace
}  // namespace headrace::amx
