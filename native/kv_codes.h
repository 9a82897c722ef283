// Keys and values in pairs as they lie in a block (see AttentionShape), and the rotation of int4's keys. Included by
// `*_kernels.cpp` and attention*_amx.cpp only (see vectors.h).
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace headrace {
namespace {

// Row and column of a matrix whose rows lie in pairs.
struct CodePlace {
  int64_t pair;  // (row / 2) * columns + column
  int32_t half;  // row % 2

  CodePlace(int64_t row, int64_t column, int64_t columns)
      : pair(row / 2 * columns + column), half(static_cast<int32_t>(row % 2)) {}
};

struct Int8Codes {
  static constexpr int64_t kPairBytes = 2;
  static constexpr bool kHasLowest = false;  // whether code 0 has a value of its own beside the scale
  static constexpr bool kRotated = false;    // whether keys, and the queries that meet them, are rotated

  static int64_t group(int64_t dim) { return dim; }
  static i32x16 load_lanes_of_pairs(const uint8_t* p) { return load_pairs(reinterpret_cast<const int8_t*>(p)); }
  static int32_t get(const uint8_t* codes, CodePlace at) { return static_cast<int8_t>(codes[2 * at.pair + at.half]); }
  static void put(uint8_t* codes, int64_t pair, int32_t half, int32_t code) {
    codes[2 * pair + half] = static_cast<uint8_t>(code);
  }
  static void put_pair(uint8_t* codes, int64_t pair, int32_t first, int32_t second) {
    put(codes, pair, 0, first);
    put(codes, pair, 1, second);
  }
};

struct Int4Codes {
  static constexpr int64_t kPairBytes = 1;
  static constexpr bool kHasLowest = true, kRotated = true;

  static int64_t group(int64_t) { return kInt4Group; }
  static i32x16 load_lanes_of_pairs(const uint8_t* p) { return load_nibble_pairs(p); }
  static int32_t get(const uint8_t* codes, CodePlace at) { return codes[at.pair] >> 4 * at.half & 15; }
  static void put(uint8_t* codes, int64_t pair, int32_t half, int32_t code) {
    codes[pair] = static_cast<uint8_t>((codes[pair] & 0xF0 >> 4 * half) | code << 4 * half);
  }
  static void put_pair(uint8_t* codes, int64_t pair, int32_t first, int32_t second) {
    codes[pair] = static_cast<uint8_t>(first | second << 4);
  }
};

// headrace.numerics.hadamard.rotate of one head, in place, bit for bit; `other` holds as many. Each pass adds and
// subtracts the two halves and puts the results side by side, so that all passes are alike (Pease's constant geometry).
inline void rotate_head(float* x, int32_t dim, float* other) {
  const int32_t size = dim & -dim, half = size / 2;  // the largest power of two that divides it
  const float factor = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(size)));
  for (float* end = x + dim; x < end; x += size) {
    float *from = x, *to = other;
    for (int32_t pass = 1; pass < size; pass *= 2) {
      for (int32_t i = 0; i < half; ++i) {
        const float a = from[i], b = from[i + half];
        to[2 * i] = a + b;
        to[2 * i + 1] = a - b;
      }
      float* const next = from;
      from = to;
      to = next;
    }
    for (int32_t i = 0; i < size; ++i) x[i] = from[i] * factor;
  }
}

}  // namespace
}  // namespace headrace
