// The integer family's side of the contract in linear.h: shapes, memory, packing.
#include "linear_int.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "formats.h"

#if defined(HEADRACE_X86)

namespace headrace {
namespace {

using Payload = IntWeights::Payload;

uint16_t f32_to_f16_exact(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

const char* kernel_name(const IntWeights& w) {
  static constexpr const char* kNames[2][2][2] = {
      {{"vnni w4a16 g16", "vnni w4a16 g32"}, {"vnni w8a16 g16", "vnni w8a16 g32"}},
      {{"vnni w4a8 g16", "vnni w4a8 g32"}, {"vnni w8a8 g16", "vnni w8a8 g32"}},
  };
  return kNames[w.activation == Activation::int8][w.payload == Payload::u8][w.group == 32];
}

class IntLinear final : public Linear {
 public:
  IntLinear(Format format, int64_t out, int64_t in, Activation activation) {
    const FormatTraits& t = traits(format);
    IntWeights& w = weights_;
    w.payload = t.max_q - t.min_q < 16 ? Payload::u4 : Payload::u8;
    w.has_offset = t.has_offset;
    w.f16_scales = t.f16_scales;
    w.activation = activation;
    w.min_q = t.min_q;
    w.out_features = out;
    w.in_features = in;
    w.group = t.group;
    w.payload_bytes = t.group * kIntPanel / (w.payload == Payload::u4 ? 2 : 1);
    w.scale_bytes = kIntPanel * (w.f16_scales ? 2 : 4);
    w.group_bytes = w.payload_bytes + w.scale_bytes * (w.has_offset ? 2 : 1);
    w.panel_bytes = in / t.group * w.group_bytes;

    out_features = out;
    in_features = in;
    form = {Isa::avx512_vnni, activation, static_cast<int32_t>(t.group), w.min_q};
    kernel = kernel_name(w);
    packed_bytes = (out + kIntPanel - 1) / kIntPanel * w.panel_bytes;
  }

  void place(uint8_t* memory) override { weights_.data = memory; }

  void run(const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
           int64_t column_end) const override {
    assert(column_begin % column_tile == 0 && column_end <= out_features);
    if (rows > 0) int_run_avx512_vnni(weights_, prepared, rows, y, ldy, column_begin, column_end);
  }

  void pack(const WeightView& view, int64_t column_begin, int64_t column_end) override {
    assert(view.out_features == out_features && view.in_features == in_features && column_begin % column_tile == 0);
    for (int64_t n = column_begin; n < column_end; n += kIntPanel) {
      uint8_t* panel = weights_.data + n / kIntPanel * weights_.panel_bytes;
      const int64_t lanes = std::min(kIntPanel, out_features - n);
      // Columns past the last, and both nibbles of a byte, start as zeros.
      if (lanes < kIntPanel || weights_.payload == Payload::u4) std::memset(panel, 0, weights_.panel_bytes);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        pack_row(view.format, view.data + (n + lane) * view.row_bytes, lane, panel);
      }
    }
  }

 private:
  void pack_row(Format format, const uint8_t* row, int64_t lane, uint8_t* panel) const {
    const FormatTraits& t = traits(format);
    constexpr int64_t kMaxBlock = 256;
    int8_t q[kMaxBlock];
    float scale[kMaxBlock / 16], offset[kMaxBlock / 16];
    for (int64_t k = 0; k < in_features; k += t.block, row += t.block_bytes) {
      decode_quants(format, row, t.block, q, scale, offset);
      for (int64_t i = 0; i < t.block / t.group; ++i, panel += weights_.group_bytes) {
        pack_codes(q + i * t.group, lane, panel);
        store_scale(scale[i], panel + weights_.payload_bytes, lane);
        if (t.has_offset) store_scale(offset[i], panel + weights_.payload_bytes + weights_.scale_bytes, lane);
      }
    }
  }

  void pack_codes(const int8_t* q, int64_t lane, uint8_t* group) const {
    for (int64_t k = 0; k < weights_.group; ++k) {
      const auto code = static_cast<uint8_t>(q[k] - weights_.min_q);
      const int64_t quad = k / kQuad, byte = lane * kQuad + k % kQuad;
      if (weights_.payload == Payload::u4) {
        group[quad / 2 * 64 + byte] |= static_cast<uint8_t>(code << (quad % 2 * 4));
      } else {
        group[quad * 64 + byte] = code;
      }
    }
  }

  void store_scale(float value, uint8_t* scales, int64_t lane) const {
    if (weights_.f16_scales) {
      const uint16_t bits = f32_to_f16_exact(value);
      std::memcpy(scales + 2 * lane, &bits, sizeof bits);
    } else {
      std::memcpy(scales + 4 * lane, &value, sizeof value);
    }
  }

  IntWeights weights_{};
};

}  // namespace

size_t int_prepared_bytes(const InputForm& form, int64_t rows, int64_t features) {
  const int64_t width = form.activation == Activation::int8 ? 1 : 2;
  const int64_t held = rows <= kFewRows ? padded_rows(rows) : rows;
  return held * (features * width + features / form.group * static_cast<int64_t>(sizeof(IntGroup)));
}

std::unique_ptr<Linear> make_int_linear(Format format, int64_t out_features, int64_t in_features,
                                        Activation activation) {
  return std::make_unique<IntLinear>(format, out_features, in_features, activation);
}

}  // namespace headrace

#endif
