// The AMX family of linear kernels: bf16 tiles with f32 accumulation, for quantized and bf16 weights.
//
// Integers of at most 8 bits are exact in bf16, so weights lose nothing. An f32 input is split into hi + lo, both bf16
// (16 significant bits), and both are multiplied; Activation::bf16 keeps hi only.
#pragma once

#include "linear.h"

namespace headrace {

// Weights in panels of 16 columns, each panel in blocks of `tile_k` features, the depth of one tile product:
//   [blocks] payload | [blocks][16] scales | [blocks][16] offsets
// A block unpacks to a B tile: row j holds, for column n = 0..15, the bf16 pair (k = 2j, k = 2j + 1).
//   bf16  the tile itself
//   i8    64 bytes per two rows: 4 bytes per column, q + 128
//   u4    64 bytes per four rows j..j+3: word i of row j + s is nibble s of word i; codes are q - min_q
struct AmxWeights {
  enum class Payload : uint8_t { bf16, i8, u4 };
  Payload payload;
  bool has_scale, has_offset, f16_scales;
  Activation activation;
  int64_t out_features, blocks, tile_k;
  int min_q;
  uint8_t* data;
  int64_t payload_bytes, scale_bytes, panel_bytes;  // of a block, of a block, of a panel
};

constexpr int64_t kTileRows = 16, kTileColumns = 16;
constexpr int64_t kStackedRows = kTileRows / 2;  // calls of up to this many rows stack hi and lo in one tile

size_t amx_prepared_bytes(const InputForm& form, int64_t rows, int64_t features);
void amx_prepare(const InputForm& form, const float* x, int64_t ldx, int64_t rows, int64_t features, void* prepared,
                 int64_t row_begin, int64_t row_end);
void amx_run(const AmxWeights& weights, const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
             int64_t column_end);

// Pack one panel from 16 decoded rows: `q` is [16][stride] (int8, or bf16 bits for plain weights), scales and offsets
// are [16][blocks].
void amx_pack_panel(const AmxWeights& weights, int64_t panel, const void* q, int64_t stride, const float* scale,
                    const float* offset);

std::unique_ptr<Linear> make_amx_linear(Format format, int64_t out_features, int64_t in_features,
                                        Activation activation);

}  // namespace headrace
