// Number formats of stored weights: block geometry, and the one decoder per format that everything else is built on.
#pragma once

#include <bit>
#include <cstdint>
#include <string>

#include "linear.h"

namespace headrace {

// What holds a scale without loss.
enum class ScaleType : uint8_t { f32, bf16, f16 };

// A quantized row is groups of small integers: w = scale * q, or scale * q + offset.
struct FormatTraits {
  const char* name;
  int block;         // features per stored block; 1 for plain formats
  int block_bytes;   // bytes per stored block
  int group;         // features that share a scale; 0 for plain formats
  int min_q, max_q;  // range of q; |q| <= 128, so every q is exact in bf16
  bool has_offset;
  bool f16_scales;  // scale and offset are stored as f16, not computed from a product
  // Of row blocks. Codes above q are e4m3 bytes where `is_e4m3`.
  ScaleType scales = ScaleType::f16;
  bool has_zero_points = false;  // offsets are -scale * zero point
  bool is_e4m3 = false;
};

const FormatTraits& traits(Format format);

// Throws std::invalid_argument, naming the format, if no kernel reads it.
Format format_named(const std::string& name);

// Of a K-quant block, what its scales are made of: group g has scale d * scale[g] and offset -(dmin * min[g]).
struct KScales {
  float d, dmin;
  int8_t scale[16], min[16];
};

// Blocks of K-quants hold two levels of scales.
constexpr bool is_k_quant(Format format) { return format >= Format::q2_k && format <= Format::q6_k; }

// Groups of one scale, which may be as long as rows. Kernels see them as several groups of 32 or 16 with equal scales,
// and e2m1 codes as whole halves.
constexpr bool is_row_blocks(Format format) { return format >= Format::row_blocks; }

// Decode `features` values of a row of K-quants to integers and one KScales per block.
void decode_k_quants(Format format, const uint8_t* row, int64_t features, int8_t* q, KScales* scales);

// Decode `features` values of a quantized row to integers and one scale (and offset, if the format has them; else
// untouched) per group. `features` must be a multiple of the format's block.
void decode_quants(Format format, const uint8_t* row, int64_t features, int8_t* q, float* scale, float* offset);

// Of a row of blocks with zero points, those of each group: q - zero is a multiple of the scale.
void decode_zero_points(Format format, const uint8_t* row, int64_t features, int8_t* zero);

// Internal linkage, here and below: files compiled for different instruction sets must not share code.
// IEEE half to single, exact for every input. Branch-free so that loops over it vectorize on any target.
static inline float f16_to_f32(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  // Move exponent and mantissa into place, then let a multiplication correct the bias: it normalizes subnormals too.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t nonfinite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | nonfinite | (uint32_t{h} & 0x8000u) << 16);
}

static inline float bf16_to_f32(uint16_t h) { return std::bit_cast<float>(uint32_t{h} << 16); }

// Round to nearest, ties to even. NaN keeps its sign and becomes quiet.
static inline uint16_t f32_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace headrace
