// Linear layers in fixed point, for machines with AMX: weights and inputs are 16-bit integers, products and their sums
// are exact, and what is exact has no order. So the few-row kernel (VPDPBUSD, weights straight from memory) and the
// many-row kernel (int8 tiles) give the same bits, each at its own best speed.
//
// A weight is W * unit, |W| < 2^15, one f32 unit per column (output feature); an input X * scale, one f32 scale per
// row. Stored codes q become W as they are read:
//   4 bits   W = step * q + base            (step and base of a group: integers)
//   8 bits   W = round(step * q / 128) + base     (codes of fewer bits are stored as multiples)
// 4-bit codes stay exact, their steps keep the 11 or 12 bits of the largest of a column; 8-bit codes are rounded to
// 2^-16 of the column's largest weight.
//
// Where one digit of weights will do, half of the products do: 8-bit codes of one scale a row are their own digits;
// others are rounded to 8 bits of their column's largest for those who ask for int8.
//
// Sums are exact over a stretch of at most 576 features; y is the sum of its stretches, in order, in f32:
//   y = ((sum of W * X) * unit) * scale, added up
#pragma once

#include "linear.h"

namespace headrace {

constexpr int64_t kFixedPanel = 16;    // columns
constexpr int64_t kFixedBlock = 64;    // features of a tile product
constexpr float kFixedTop = 32639.0f;  // 127 * 256 + 127: both digits of an input are signed bytes

// Weights in panels of 16 columns: [16] units (f32), then for each group
//   codes, as quads of features: 4 bytes of each column; 4 bits: two quads in one, the second in the high nibbles
//   [16] steps (int16) | [16] bases + 128 (int16), if the format has offsets
// or, where it `stores_digits`, digits + 128 instead of groups: tiles of 64 features, [16 quads][16 columns][4].
struct FixedWeights {
  bool four_bits, has_offset;
  bool one_digit;
  int group;
  int min_q;  // of 4-bit codes, stored as q - min_q
  int64_t out_features, in_features;
  uint8_t* data;
  int64_t group_bytes, panel_bytes;

  // 4-bit codes are rounded to a digit as they are read.
  bool stores_digits() const { return one_digit && !four_bits; }
};

// Stretches of features whose sums are exact, in blocks: few and even ones, whose decoded weights stay in L1.
struct Stretches {
  static constexpr int64_t kMostBlocks = 9;
  int64_t count, blocks;  // of all features; of each but the last

  explicit Stretches(int64_t all) : count((all + kMostBlocks - 1) / kMostBlocks), blocks((all + count - 1) / count) {}
};

// Digits of few rows' inputs: as bytes, or as words, the features of each quad in the order 0, 2, 1, 3.
// By weights of one digit they are bytes as well.
constexpr int32_t kFixedBytes = 0, kFixedWords = 1, kFixedOneDigit = 2;
// Calls of up to so many rows read weights straight from memory; of more, turn them to tiles first. By measurement.
constexpr int64_t fixed_few_rows(int32_t layout) {
  return layout == kFixedBytes ? 8 : layout == kFixedOneDigit ? 4 : 2;
}

// Where prepared inputs lie. Few rows: [features / 32][rows, padded][32 high | 32 low digits]. More: of each tile of 16
// rows [blocks][high | low digits][16][64]. Then scales [rows], sums of X over each stretch [stretches][rows], and for
// few rows over each group [groups][rows].
struct FixedInputs {
  bool few;
  int64_t rows, blocks, stretches, stretch_blocks, groups;  // rows: padded to 1, 2, 4, 8 or a multiple of 16
  size_t scales, sums, group_sums, bytes;                   // offsets

  FixedInputs(const InputForm& form, int64_t rows, int64_t features);
};

void fixed_prepare(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features, void* prepared,
                   int64_t row_begin, int64_t row_end);
void fixed_run(const FixedWeights& weights, const InputForm& form, const void* prepared, int64_t rows, float* y,
               int64_t ldy, int64_t column_begin, int64_t column_end);

// `activation`: int16, or int8 for weights of one digit.
std::unique_ptr<Linear> make_fixed_linear(Format format, int64_t out_features, int64_t in_features,
                                          Activation activation);

}  // namespace headrace
