// Rounding to integer groups. Compiled once per instruction set; plain loops that compilers vectorize, without a
// product that could be fused with a sum.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "formats.h"
#include "kernel_table.h"

namespace headrace::HEADRACE_KERNELS {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
constexpr int64_t kTile = 64;  // codes made at a time; even

float value_of(uint16_t bits) { return bf16_to_f32(bits); }
float value_of(float value) { return value; }
uint32_t bits_of(uint16_t bits) { return uint32_t{bits} << 16; }
uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }

// To the nearest binary16, ties to even, as bits.
uint16_t f32_to_f16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & kMagnitude;
  if (magnitude > kInfinity) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65,536 and more
  if (magnitude < 0x38800000u) {                                               // subnormal: a multiple of 2^-24
    const float multiples = std::nearbyint(std::bit_cast<float>(magnitude) * 0x1p24f);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(multiples));
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u);  // may carry into infinity
  return static_cast<uint16_t>(sign | rounded >> 13);
}

// Write a scale in its own type and return what it then is; NaN for what is not finite.
float store_scale(ScaleType type, float scale, uint8_t* at) {
  uint16_t half = 0;
  if (type == ScaleType::bf16) scale = bf16_to_f32(half = f32_to_bf16(scale));
  if (type == ScaleType::f16) scale = f16_to_f32(half = f32_to_f16(scale));
  if (!std::isfinite(scale)) {
    scale = kNan;
    half = type == ScaleType::bf16 ? 0x7fc0u : 0x7e00u;
  }
  if (type == ScaleType::f32) {
    std::memcpy(at, &scale, sizeof scale);
  } else {
    std::memcpy(at, &half, sizeof half);
  }
  return scale;
}

// To the nearest whole number, ties to even, for magnitudes below 2^22: the sum has no bits left for fractions.
float nearest(float x) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23
  return (x + kWhole) - kWhole;
}

float clamped(float x, float low, float high) { return std::min(std::max(x, low), high); }

// A code of either kind is nearest(x / scale), plus the zero point, within its range, plus `shift` to make it unsigned.
struct Codes {
  float scale, zero, low, high;
  int32_t shift;
};

template <typename T>
void fill_codes(const Codes& c, const T* x, int64_t count, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    // No code is further than 1,024 from its multiple, so nothing changes by bounding that first.
    const float multiple = nearest(clamped(value_of(x[i]) / c.scale, -1024.0f, 1024.0f));
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(clamped(multiple + c.zero, c.low, c.high)) + c.shift);
  }
}

template <typename T>
void quantize_group(const IntegerGroups& groups, const T* x, uint8_t* block) {
  uint32_t peak = 0;
  for (int64_t i = 0; i < groups.group; ++i) peak = std::max(peak, bits_of(x[i]) & kMagnitude);
  float least = 0, span = std::bit_cast<float>(peak);
  if (!groups.symmetric) {
    float most = 0;
    for (int64_t i = 0; i < groups.group; ++i) {
      least = std::min(least, value_of(x[i]));
      most = std::max(most, value_of(x[i]));
    }
    span = most - least;
  }
  if (peak >= kInfinity) span = kNan;
  const float scale = store_scale(groups.scale, span / groups.steps, block);
  const bool usable = scale > 0;
  const float low = static_cast<float>(groups.low), high = static_cast<float>(groups.high);
  const float zero =
      usable && !groups.symmetric ? clamped(nearest(clamped(-least / scale, 0.0f, 1024.0f)), low, high) : 0.0f;
  if (!groups.symmetric) block[groups.scale_bytes()] = static_cast<uint8_t>(zero);
  const Codes c{scale, zero, low, high, groups.bits == 4 && groups.symmetric ? 8 : 0};
  uint8_t* out = block + groups.scale_bytes() + !groups.symmetric;
  for (int64_t begin = 0; begin < groups.group; begin += kTile) {
    const int64_t count = std::min(kTile, groups.group - begin);
    uint8_t codes[kTile];
    if (usable) {
      fill_codes(c, x + begin, count, codes);
    } else {
      std::memset(codes, c.shift, count);
    }
    if (groups.bits == 8) {
      std::memcpy(out + begin, codes, count);
    } else {
      for (int64_t i = 0; i < count / 2; ++i) {
        out[begin / 2 + i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
      }
    }
  }
}

template <typename T>
void quantize(const IntegerGroups& groups, const T* values, int64_t count, uint8_t* blocks) {
  for (int64_t i = 0; i < count; i += groups.group, blocks += groups.block_bytes()) {
    quantize_group(groups, values + i, blocks);
  }
}

}  // namespace

void quantize_bf16(const IntegerGroups& groups, const uint16_t* values, int64_t count, uint8_t* blocks) {
  quantize(groups, values, count, blocks);
}

void quantize_f32(const IntegerGroups& groups, const float* values, int64_t count, uint8_t* blocks) {
  quantize(groups, values, count, blocks);
}

}  // namespace headrace::HEADRACE_KERNELS
