// The f32 family of linear kernels: weights are decoded to f32 a cache-sized piece at a time and multiplied in f32.
// One source, `linear_f32.inc`, compiled for every instruction set.
#pragma once

#include "linear.h"

namespace headrace {

// Weights in panels of 16 columns, so that a vector lane is an output column. Within a panel:
//   f32, f16, bf16, i8   payload[k][16]
//   e4m3                 payload[k][16]
//   u4                   payload[k / 2][16], even k in the low nibbles; codes are q - min_q
struct PanelWeights {
  enum class Payload : uint8_t { f32, f16, bf16, i8, u4, e4m3 };
  Payload payload;
  int64_t out_features, in_features;
  int64_t group;        // features per scale; 0: none
  float min_q;          // added to u4 codes
  const uint8_t* data;  // [panels][panel_bytes]
  int64_t panel_bytes;
  const float* scales;   // [panels][groups][16]
  const float* offsets;  // the same, or null
};

constexpr int64_t kPanel = 16;

// y[m][n] for rows [0, rows), columns [column_begin, column_end); x is [rows][in_features].
using F32Kernel = void (*)(const PanelWeights& weights, const float* x, int64_t rows, float* y, int64_t ldy,
                           int64_t column_begin, int64_t column_end);

void linear_f32_portable(const PanelWeights&, const float*, int64_t, float*, int64_t, int64_t, int64_t);
void linear_f32_avx2(const PanelWeights&, const float*, int64_t, float*, int64_t, int64_t, int64_t);
void linear_f32_avx512(const PanelWeights&, const float*, int64_t, float*, int64_t, int64_t, int64_t);

}  // namespace headrace
