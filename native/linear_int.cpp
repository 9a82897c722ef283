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

const char* kernel_name(const IntWeights& w, Isa isa) {
  static constexpr const char* kNames[2][2][3][2] = {
      {{{"avx2 w4a16 g16", "avx2 w4a16 g32"},
        {"avx2 w6a16 g16", "avx2 w6a16 g32"},
        {"avx2 w8a16 g16", "avx2 w8a16 g32"}},
       {{"avx2 w4a8 g16", "avx2 w4a8 g32"}, {"avx2 w6a8 g16", "avx2 w6a8 g32"}, {"avx2 w8a8 g16", "avx2 w8a8 g32"}}},
      {{{"vnni w4a16 g16", "vnni w4a16 g32"},
        {"vnni w6a16 g16", "vnni w6a16 g32"},
        {"vnni w8a16 g16", "vnni w8a16 g32"}},
       {{"vnni w4a8 g16", "vnni w4a8 g32"}, {"vnni w6a8 g16", "vnni w6a8 g32"}, {"vnni w8a8 g16", "vnni w8a8 g32"}}},
  };
  const bool vnni = isa == Isa::avx512_vnni, bytes = w.activation == Activation::int8;
  return kNames[vnni][bytes][static_cast<int>(w.payload)][w.group == 32];
}

class IntLinear final : public Linear {
 public:
  IntLinear(Format format, int64_t out, int64_t in, Isa isa, Activation activation) {
    const FormatTraits& t = traits(format);
    const int codes = t.max_q - t.min_q + 1;
    const int bits = codes <= 16 ? 4 : codes <= 64 ? 6 : 8;
    IntWeights& w = weights_;
    w.payload = bits == 4 ? Payload::u4 : bits == 6 ? Payload::u6 : Payload::u8;
    w.has_offset = t.has_offset;
    w.two_levels = is_k_quant(format);
    w.zero_points = t.has_zero_points;
    w.scales = t.scales == ScaleType::f16 && w.zero_points ? ScaleType::f32 : t.scales;  // no kernels of its own
    w.activation = activation;
    w.min_q = t.min_q;
    w.out_features = out;
    w.in_features = in;
    w.group = t.group;
    w.block = w.two_levels ? t.block : t.group;  // of row blocks, a group is a part of a block
    w.header_bytes = w.two_levels ? (t.has_offset ? 2 : 1) * kIntPanel * 2 : 0;
    w.payload_bytes = t.group * kIntPanel * bits / 8;
    w.scale_bytes = kIntPanel * (w.two_levels ? 1 : w.scales == ScaleType::f32 ? 4 : 2);
    w.offset_bytes = !t.has_offset ? 0 : w.zero_points ? kIntPanel : w.scale_bytes;
    w.group_bytes = w.payload_bytes + w.scale_bytes + w.offset_bytes;
    w.block_bytes = w.header_bytes + w.block / w.group * w.group_bytes;
    w.panel_bytes = in / w.block * w.block_bytes;

    out_features = out;
    in_features = in;
    form = {isa, activation, static_cast<int32_t>(t.group), w.min_q};
    kernel = kernel_name(w, isa);
    run_ = isa == Isa::avx512_vnni ? int_run_avx512_vnni : int_run_avx2;
    packed_bytes = (out + kIntPanel - 1) / kIntPanel * w.panel_bytes;
  }

  void place(uint8_t* memory) override { weights_.data = memory; }

  void run(const void* prepared, int64_t rows, float* y, int64_t ldy, int64_t column_begin,
           int64_t column_end) const override {
    assert(column_begin % column_tile == 0 && column_end <= out_features);
    if (rows > 0) run_(weights_, prepared, rows, y, ldy, column_begin, column_end);
  }

  void pack(const WeightView& view, int64_t column_begin, int64_t column_end) override {
    assert(view.out_features == out_features && view.in_features == in_features && column_begin % column_tile == 0);
    // Columns past the last are zeros: rows that nothing fills.
    Rows rows(in_features, weights_.group);
    for (int64_t n = column_begin; n < column_end; n += kIntPanel) {
      const int64_t lanes = std::min(kIntPanel, out_features - n);
      if (lanes < kIntPanel) rows = Rows(in_features, weights_.group);
      for (int64_t lane = 0; lane < lanes; ++lane)
        decode(view.format, view.data + (n + lane) * view.row_bytes, lane, rows);
      pack_panel(rows, weights_.data + n / kIntPanel * weights_.panel_bytes);
    }
  }

 private:
  // The decoded rows of a panel: codes [16][in_features], and f16 scales [16][groups], or two levels of them.
  struct Rows {
    Rows(int64_t features, int64_t group)
        : codes(kIntPanel * features),
          scales(kIntPanel * features / group),
          offsets(scales.size()),
          zeros(scales.size()),
          k(kIntPanel * (features + 255) / 256) {}
    std::vector<uint8_t> codes;
    std::vector<float> scales, offsets;
    std::vector<int8_t> zeros;
    std::vector<KScales> k;
  };

  void decode(Format format, const uint8_t* row, int64_t lane, Rows& rows) const {
    uint8_t* codes = rows.codes.data() + lane * in_features;
    auto* q = reinterpret_cast<int8_t*>(codes);
    const int64_t groups = in_features / weights_.group;
    if (weights_.two_levels) {
      decode_k_quants(format, row, in_features, q, rows.k.data() + lane * (in_features / weights_.block));
    } else {
      decode_quants(format, row, in_features, q, rows.scales.data() + lane * groups,
                    rows.offsets.data() + lane * groups);
      if (weights_.zero_points) decode_zero_points(format, row, in_features, rows.zeros.data() + lane * groups);
    }
    for (int64_t k = 0; k < in_features; ++k) codes[k] = static_cast<uint8_t>(codes[k] - weights_.min_q);
  }

  void pack_panel(const Rows& rows, uint8_t* out) const {
    const IntWeights& w = weights_;
    const int64_t per_block = w.block / w.group;
    for (int64_t g = 0; g < in_features / w.group; ++g, out += w.group_bytes) {
      if (w.two_levels && g % per_block == 0) out = pack_header(rows, g / per_block, out);
      pack_codes(rows.codes.data() + g * w.group, out);
      uint8_t *scales = out + w.payload_bytes, *offsets = scales + w.scale_bytes;
      for (int64_t lane = 0; lane < kIntPanel; ++lane) {
        if (w.two_levels) {
          const KScales& k = rows.k[lane * (in_features / w.block) + g / per_block];
          scales[lane] = static_cast<uint8_t>(k.scale[g % per_block]);
          if (w.has_offset) offsets[lane] = static_cast<uint8_t>(k.min[g % per_block]);
        } else {
          const int64_t at = lane * (in_features / w.group) + g;
          store_scale(rows.scales[at], lane, scales);
          if (w.zero_points) {
            offsets[lane] = static_cast<uint8_t>(rows.zeros[at]);
          } else if (w.has_offset) {
            store_f16(rows.offsets[at], offsets + 2 * lane);
          }
        }
      }
    }
  }

  uint8_t* pack_header(const Rows& rows, int64_t block, uint8_t* out) const {
    for (int64_t lane = 0; lane < kIntPanel; ++lane) {
      const KScales& k = rows.k[lane * (in_features / weights_.block) + block];
      store_f16(k.d, out + 2 * lane);
      if (weights_.has_offset) store_f16(k.dmin, out + 2 * (kIntPanel + lane));
    }
    return out + weights_.header_bytes;
  }

  // One group of 16 rows of codes, `in_features` apart. All shifts keep within bytes: codes have 4, 6 or 8 bits.
  void pack_codes(const uint8_t* codes, uint8_t* out) const {
    const int64_t quads = weights_.group / kQuad;
    const auto quad_of = [&](int64_t lane, int64_t quad) {
      uint32_t value;
      std::memcpy(&value, codes + lane * in_features + quad * kQuad, sizeof value);
      return value;
    };
    const auto store = [&](uint32_t value) {
      std::memcpy(out, &value, sizeof value);
      out += sizeof value;
    };
    constexpr uint32_t kLow = 0x0f0f0f0f, kHigh = 0x30303030;
    if (weights_.payload == Payload::u8) {
      for (int64_t quad = 0; quad < quads; ++quad) {
        for (int64_t lane = 0; lane < kIntPanel; ++lane) store(quad_of(lane, quad));
      }
      return;
    }
    for (int64_t quad = 0; quad < quads; quad += 2) {
      for (int64_t lane = 0; lane < kIntPanel; ++lane) {
        store((quad_of(lane, quad) & kLow) | (quad_of(lane, quad + 1) & kLow) << 4);
      }
    }
    for (int64_t quad = 0; weights_.payload == Payload::u6 && quad < quads; quad += 4) {
      for (int64_t lane = 0; lane < kIntPanel; ++lane) {
        store((quad_of(lane, quad) & kHigh) >> 4 | (quad_of(lane, quad + 1) & kHigh) >> 2 |
              (quad_of(lane, quad + 2) & kHigh) | (quad_of(lane, quad + 3) & kHigh) << 2);
      }
    }
  }

  void store_scale(float value, int64_t lane, uint8_t* out) const {
    if (weights_.scales == ScaleType::f16) return store_f16(value, out + 2 * lane);
    if (weights_.scales == ScaleType::f32) {
      std::memcpy(out + 4 * lane, &value, sizeof value);
    } else {
      const uint16_t bits = f32_to_bf16(value);
      std::memcpy(out + 2 * lane, &bits, sizeof bits);
    }
  }

  static void store_f16(float value, uint8_t* out) {
    const uint16_t bits = f16_bits(value);
    std::memcpy(out, &bits, sizeof bits);
  }

  IntWeights weights_{};
  IntKernel run_ = nullptr;
};

}  // namespace

size_t int_prepared_bytes(const InputForm& form, int64_t rows, int64_t features) {
  const bool avx2 = form.isa == Isa::avx2;
  const int64_t width = form.activation == Activation::int16 || (avx2 && reads_words(form)) ? 2 : 1;
  const int64_t held = !avx2 && rows <= kFewRows ? padded_rows(rows) : rows;
  return held * (features * width + features / form.group * static_cast<int64_t>(sizeof(IntGroup)));
}

std::unique_ptr<Linear> make_int_linear(Format format, int64_t out_features, int64_t in_features, Isa isa,
                                        Activation activation) {
  return std::make_unique<IntLinear>(format, out_features, in_features, isa, activation);
}

}  // namespace headrace

#endif
