#include "row_blocks.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace headrace {
namespace {

using Element = RowBlocks::Element;
using Stored = RowBlocks::Stored;

[[noreturn]] void refuse(const std::string& name) {
  throw std::invalid_argument("no kernel reads the number format '" + name + "'");
}

// "int4_g32_bf16" and its like: element, group size and type of scales.
void parse(const std::string& name, RowBlocks& out) {
  if (name == "mxfp4" || name == "nvfp4") {
    out.element = Element::e2m1;
    out.stored = name == "mxfp4" ? Stored::e8m0 : Stored::f32;
    out.group_size = name == "mxfp4" ? 32 : 16;
    return;
  }
  const size_t group = name.find("_g"), scale = name.rfind('_');
  if (group == std::string::npos || scale <= group + 2 || scale - group > 11) refuse(name);
  const std::string element = name.substr(0, group), digits = name.substr(group + 2, scale - group - 2),
                    stored = name.substr(scale + 1);
  if (digits.find_first_not_of("0123456789") != std::string::npos) refuse(name);
  out.group_size = std::stoll(digits);
  constexpr const char* kElements[] = {"int4", "uint4", "int8", "uint8", "fp8"};
  constexpr const char* kStored[] = {"f32", "bf16", "f16"};
  int found = 0;
  for (int i = 0; i < 5; ++i) {
    if (element == kElements[i]) out.element = static_cast<Element>(i), ++found;
  }
  for (int i = 0; i < 3; ++i) {
    if (stored == kStored[i]) out.stored = static_cast<Stored>(i), ++found;
  }
  if (found != 2) refuse(name);
}

// Codes of e2m1 stand for 0 to 6 by halves: their doubles are whole.
constexpr int8_t kHalves[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Exponent and mantissa in a float's place, and the difference of the biases; 480 where it should be NaN.
float e4m3_value(int code) {
  const uint32_t magnitude = static_cast<uint32_t>(code & 0x7f) << 20, sign = static_cast<uint32_t>(code & 0x80) << 24;
  return std::bit_cast<float>(magnitude | sign) * 0x1p120f;
}

bool is_nan(int code) { return (code & 0x7f) == 0x7f; }

}  // namespace

RowBlocks::RowBlocks(const std::string& name_) : name(name_) {
  parse(name, *this);
  const int group = group_size % 32 == 0 ? 32 : 16;
  if (group_size < 1 || group_size % group != 0) {
    throw std::invalid_argument("no kernel reads groups of " + std::to_string(group_size) + ", as in '" + name +
                                "': they must be multiples of 16");
  }
  if (group_size > std::numeric_limits<int>::max() / 2) refuse(name);
  constexpr struct {
    int min_q, max_q;
  } kRanges[] = {{-8, 7}, {0, 15}, {-128, 127}, {-128, 127}, {-128, 127}, {-12, 12}};
  const auto [min_q, max_q] = kRanges[static_cast<int>(element)];
  traits = {name.c_str(), static_cast<int>(group_size), 0, group, min_q, max_q, false, stored == Stored::f16};
  traits.has_zero_points = traits.has_offset = element == Element::uint4 || element == Element::uint8;
  traits.is_e4m3 = element == Element::e4m3;
  traits.block_bytes = static_cast<int>(codes_at() + group_size / (has_nibbles() ? 2 : 1));
  // Powers of two are bf16, their halves too.
  traits.scales = stored == Stored::f32 ? ScaleType::f32 : stored == Stored::f16 ? ScaleType::f16 : ScaleType::bf16;
}

int64_t RowBlocks::codes_at() const {
  return (stored == Stored::f32 ? 4 : stored == Stored::e8m0 ? 1 : 2) + traits.has_zero_points;
}

float RowBlocks::scale_of(const uint8_t* block) const {
  if (stored == Stored::f32) {
    float value;
    std::memcpy(&value, block, sizeof value);
    return value;
  }
  if (stored == Stored::e8m0) {
    if (block[0] == 255) return std::numeric_limits<float>::quiet_NaN();
    return std::bit_cast<float>(block[0] > 0 ? uint32_t{block[0]} << 23 : uint32_t{1} << 22);
  }
  uint16_t half;
  std::memcpy(&half, block, sizeof half);
  return stored == Stored::bf16 ? bf16_to_f32(half) : f16_to_f32(half);
}

int RowBlocks::zero_of(const uint8_t* block) const {
  if (!traits.has_zero_points) return 0;
  return block[codes_at() - 1] + (element == Element::uint8 ? -128 : 0);
}

bool RowBlocks::has_minus(const uint8_t* block, int64_t i) const {
  return block[codes_at() + i / 2] >> (i % 2 * 4) & 8;
}

int RowBlocks::code_of(const uint8_t* block, int64_t i) const {
  const uint8_t* codes = block + codes_at();
  const int code = has_nibbles() ? codes[i / 2] >> (i % 2 * 4) & 15 : codes[i];
  switch (element) {
    case Element::int4:
      return code - 8;
    case Element::uint8:
      return code - 128;
    case Element::e2m1:
      return kHalves[code];
    case Element::int8:
    case Element::e4m3:
      return static_cast<int8_t>(code);
    default:
      return code;
  }
}

// As `code_of` has them, a block at a time.
void RowBlocks::decode_codes(const uint8_t* codes, int8_t* q) const {
  if (!has_nibbles()) {
    const uint8_t flip = element == Element::uint8 ? 0x80 : 0;  // subtracts 128
    for (int64_t i = 0; i < group_size; ++i) q[i] = static_cast<int8_t>(codes[i] ^ flip);
    return;
  }
  const auto each = [&](auto value) {
    for (int64_t i = 0; i < group_size / 2; ++i) {
      q[2 * i] = static_cast<int8_t>(value(codes[i] & 15));
      q[2 * i + 1] = static_cast<int8_t>(value(codes[i] >> 4));
    }
  };
  if (element == Element::int4) return each([](int code) { return code - 8; });
  if (element == Element::uint4) return each([](int code) { return code; });
  each([](int code) { return kHalves[code]; });
}

void RowBlocks::decode(const uint8_t* row, int64_t features, int8_t* q, float* scale, float* offset) const {
  const int64_t group = traits.group;
  for (int64_t at = 0; at < features; at += group_size, row += traits.block_bytes) {
    const float block_scale = element == Element::e2m1 ? scale_of(row) / 2 : scale_of(row);
    const float block_offset = -(block_scale * static_cast<float>(zero_of(row)));
    decode_codes(row + codes_at(), q + at);
    for (int64_t begin = at; begin < at + group_size; begin += group) {
      scale[begin / group] = block_scale;
      if (traits.has_offset) offset[begin / group] = block_offset;
      // Products of e4m3 know no NaN; any makes the whole output one.
      if (traits.is_e4m3 && std::any_of(q + begin, q + begin + group, is_nan)) {
        scale[begin / group] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
}

void RowBlocks::decode_zero_points(const uint8_t* row, int64_t features, int8_t* zero) const {
  for (int64_t at = 0; at < features; at += group_size, row += traits.block_bytes) {
    for (int64_t i = 0; i < group_size / traits.group; ++i) *zero++ = static_cast<int8_t>(zero_of(row));
  }
}

void RowBlocks::decode_values(const uint8_t* row, int64_t features, float* out) const {
  for (int64_t at = 0; at < features; at += group_size, row += traits.block_bytes) {
    const float scale = scale_of(row);
    const int zero = zero_of(row);
    for (int64_t i = 0; i < group_size; ++i) {
      const int code = code_of(row, i);
      float value = static_cast<float>(code - zero);
      if (element == Element::e2m1) value = std::copysign(value / 2, has_minus(row, i) ? -1.0f : 1.0f);
      if (traits.is_e4m3) value = is_nan(code) ? std::numeric_limits<float>::quiet_NaN() : e4m3_value(code);
      *out++ = value * scale;
    }
  }
}

}  // namespace headrace
