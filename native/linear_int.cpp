// The integer family's side of the contract in linear.h: shapes, memory, packing.
#include "linear_int.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>
#include <vector>

#include "formats.h"

#if defined(HEADRACE_X86)

namespace headrace {
namespace {

using Payload = IntWeights::Payload;

// Of a number that an f16 holds exactly, the bits: `f16_to_f32` backwards.
inline uint16_t f16_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint32_t half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p-112f) >> 13;
  const uint32_t nonfinite = 0x7c00u | (magnitude >> 13 & 0x3ffu);
  return static_cast<uint16_t>((magnitude >= 0x7f800000u ? nonfinite : half) | (bits >> 16 & 0x8000u));
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
    const IntWeights& w = weights_;
    const int64_t groups = in_features / w.group;
    // Columns past the last are zeros: rows of codes, scales and offsets that nothing fills.
    std::vector<uint8_t> codes(kIntPanel * in_features);
    std::vector<float> scales(kIntPanel * groups), offsets(kIntPanel * groups);
    for (int64_t n = column_begin; n < column_end; n += kIntPanel) {
      const int64_t lanes = std::min(kIntPanel, out_features - n);
      if (lanes < kIntPanel) {
        std::fill(codes.begin(), codes.end(), uint8_t{0});
        std::fill(scales.begin(), scales.end(), 0.0f);
        std::fill(offsets.begin(), offsets.end(), 0.0f);
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        uint8_t* row = codes.data() + lane * in_features;
        decode_quants(view.format, view.data + (n + lane) * view.row_bytes, in_features, reinterpret_cast<int8_t*>(row),
                      scales.data() + lane * groups, offsets.data() + lane * groups);
        for (int64_t k = 0; k < in_features; ++k) row[k] = static_cast<uint8_t>(row[k] - w.min_q);
      }
      uint8_t* group = w.data + n / kIntPanel * w.panel_bytes;
      for (int64_t g = 0; g < groups; ++g, group += w.group_bytes) {
        pack_codes(codes.data() + g * w.group, group);
        pack_scales(scales.data() + g, groups, group + w.payload_bytes);
        if (w.has_offset) pack_scales(offsets.data() + g, groups, group + w.payload_bytes + w.scale_bytes);
      }
    }
  }

 private:
  // One group of 16 rows of codes, `in_features` apart.
  void pack_codes(const uint8_t* codes, uint8_t* out) const {
    const int64_t step = weights_.payload == Payload::u4 ? 2 * kQuad : kQuad;
    for (int64_t k = 0; k < weights_.group; k += step) {
      for (int64_t lane = 0; lane < kIntPanel; ++lane, out += kQuad) {
        const uint8_t* row = codes + lane * in_features + k;
        uint32_t quad, next;
        std::memcpy(&quad, row, sizeof quad);
        if (weights_.payload == Payload::u4) {
          std::memcpy(&next, row + kQuad, sizeof next);
          quad |= next << 4;  // codes below 16: no byte reaches into its neighbour
        }
        std::memcpy(out, &quad, sizeof quad);
      }
    }
  }

  void pack_scales(const float* values, int64_t stride, uint8_t* out) const {
    for (int64_t lane = 0; lane < kIntPanel; ++lane) {
      const float value = values[lane * stride];
      if (weights_.f16_scales) {
        const uint16_t bits = f16_bits(value);
        std::memcpy(out + 2 * lane, &bits, sizeof bits);
      } else {
        std::memcpy(out + 4 * lane, &value, sizeof value);
      }
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
