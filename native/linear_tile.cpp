// The AMX family's side of the contract in linear.h: shapes, memory, packing. The kernels are in linear_tile_amx.cpp.
#include "linear_tile.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <vector>

#include "formats.h"

#if defined(__x86_64__)

namespace headrace {
namespace {

using Payload = AmxWeights::Payload;

const char* kernel_name(Payload payload, int64_t tile_k) {
  if (payload == Payload::bf16) return "amx bf16";
  if (payload == Payload::i8) return tile_k == 32 ? "amx w8 g32" : "amx w8 g16";
  return tile_k == 32 ? "amx w4 g32" : "amx w4 g16";
}

class AmxLinear final : public Linear {
 public:
  AmxLinear(Format format, int64_t out, int64_t in, Activation activation) {
    const FormatTraits& t = traits(format);
    AmxWeights& w = weights_;
    w.payload = t.group == 0 ? Payload::bf16 : t.max_q - t.min_q < 16 ? Payload::u4 : Payload::i8;
    w.has_scale = t.group != 0;
    w.has_offset = t.has_offset;
    w.f16_scales = t.f16_scales;
    w.activation = activation;
    w.out_features = out;
    w.tile_k = t.group != 0 ? t.group : 32;
    w.blocks = (in + w.tile_k - 1) / w.tile_k;
    w.min_q = t.min_q;
    const int64_t block = w.tile_k * kTileColumns;
    w.payload_bytes = w.payload == Payload::bf16 ? block * 2 : w.payload == Payload::i8 ? block : block / 2;
    w.scale_bytes = w.has_scale ? kTileColumns * (w.f16_scales ? 2 : 4) : 0;
    w.panel_bytes = w.blocks * (w.payload_bytes + w.scale_bytes * (w.has_offset ? 2 : 1));
    w.panel_bytes = (w.panel_bytes + 63) / 64 * 64;

    out_features = out;
    in_features = in;
    form = {Isa::amx, activation, static_cast<int32_t>(w.has_offset ? t.group : 0), static_cast<int32_t>(w.tile_k)};
    kernel = kernel_name(w.payload, w.tile_k);
    packed_bytes = (out + kTileColumns - 1) / kTileColumns * w.panel_bytes;
  }

  void place(uint8_t* memory) override { weights_.data = memory; }

  void run(const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
           int64_t column_end) const override {
    assert(column_begin % column_tile == 0 && column_end <= out_features);
    if (rows > 0 && column_begin < column_end) {
      amx_run(weights_, prepared, rows, y, ldy, column_begin, column_end);
    }
  }

  void pack(const WeightView& view, int64_t column_begin, int64_t column_end) override {
    assert(view.out_features == out_features && view.in_features == in_features && column_begin % column_tile == 0);
    // Zeros stand for columns past the last and, in plain weights, for features past the last.
    const int64_t stride = weights_.blocks * weights_.tile_k;
    const int64_t value_bytes = weights_.payload == Payload::bf16 ? 2 : 1;
    std::vector<uint8_t> q(kTileColumns * stride * value_bytes);
    std::vector<float> scale(kTileColumns * weights_.blocks), offset(kTileColumns * weights_.blocks);
    for (int64_t n = column_begin; n < column_end; n += kTileColumns) {
      const int64_t lanes = std::min(kTileColumns, out_features - n);
      if (lanes < kTileColumns) {
        std::fill(q.begin(), q.end(), uint8_t{0});
        std::fill(scale.begin(), scale.end(), 0.0f);
        std::fill(offset.begin(), offset.end(), 0.0f);
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const uint8_t* row = view.data + (n + lane) * view.row_bytes;
        uint8_t* out = q.data() + lane * stride * value_bytes;
        if (weights_.payload == Payload::bf16) {
          std::memcpy(out, row, in_features * value_bytes);
        } else {
          decode_quants(view.format, row, in_features, reinterpret_cast<int8_t*>(out),
                        scale.data() + lane * weights_.blocks, offset.data() + lane * weights_.blocks);
        }
      }
      amx_pack_panel(weights_, n / kTileColumns, q.data(), stride, scale.data(), offset.data());
    }
  }

 private:
  AmxWeights weights_{};
};

}  // namespace

size_t amx_prepared_bytes(const InputForm& form, int64_t rows, int64_t features) {
  const int64_t blocks = (features + form.layout - 1) / form.layout;
  const int64_t padded = rows <= kStackedRows ? rows : (rows + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t parts = form.activation == Activation::f32 ? 2 : 1;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t sums = form.group != 0 ? tiles * blocks * kTileRows * sizeof(float) : 0;
  return padded * blocks * form.layout * parts * sizeof(uint16_t) + sums;
}

std::unique_ptr<Linear> make_amx_linear(Format format, int64_t out_features, int64_t in_features,
                                        Activation activation) {
  return std::make_unique<AmxLinear>(format, out_features, in_features, activation);
}

}  // namespace headrace

#endif
