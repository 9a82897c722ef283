// Decoders of GGUF blocks. Layouts follow ggml's `ggml-common.h`; values equal gguf-py's `quants.py` bit for bit, which
// is why scales are multiplied in the order that it uses and this file is compiled without floating-point contraction.
#include "formats.h"

#include <array>
#include <atomic>
#include <cassert>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "row_blocks.h"

namespace headrace {
namespace {

constexpr FormatTraits kTraits[] = {
    {"f32", 1, 4, 0, 0, 0, false, false},          {"f16", 1, 2, 0, 0, 0, false, false},
    {"bf16", 1, 2, 0, 0, 0, false, false},         {"q4_0", 32, 18, 32, -8, 7, false, true},
    {"q4_1", 32, 20, 32, 0, 15, true, true},       {"q5_0", 32, 22, 32, -16, 15, false, true},
    {"q5_1", 32, 24, 32, 0, 31, true, true},       {"q8_0", 32, 34, 32, -128, 127, false, true},
    {"q2_k", 256, 84, 16, 0, 3, true, false},      {"q3_k", 256, 110, 16, -4, 3, false, false},
    {"q4_k", 256, 144, 32, 0, 15, true, false},    {"q5_k", 256, 176, 32, 0, 31, true, false},
    {"q6_k", 256, 210, 16, -32, 31, false, false},
};

uint16_t load_u16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, 2);
  return value;
}

uint32_t load_u32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

float load_f16(const uint8_t* p) { return f16_to_f32(load_u16(p)); }

// 32 values: low nibbles are the first half of the block, high nibbles the second.
void nibbles(const uint8_t* qs, int bias, int8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = static_cast<int8_t>((qs[i] & 15) - bias);
    q[i + 16] = static_cast<int8_t>((qs[i] >> 4) - bias);
  }
}

// `nibbles` with a fifth bit per value from the mask `high`.
void five_bits(const uint8_t* qs, uint32_t high, int bias, int8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = static_cast<int8_t>(((qs[i] & 15) | (high >> i & 1) << 4) - bias);
    q[i + 16] = static_cast<int8_t>(((qs[i] >> 4) | (high >> (i + 16) & 1) << 4) - bias);
  }
}

void q4_0(const uint8_t* b, int8_t* q, float* scale, float*) {
  scale[0] = load_f16(b);
  nibbles(b + 2, 8, q);
}

void q4_1(const uint8_t* b, int8_t* q, float* scale, float* offset) {
  scale[0] = load_f16(b);
  offset[0] = load_f16(b + 2);
  nibbles(b + 4, 0, q);
}

void q5_0(const uint8_t* b, int8_t* q, float* scale, float*) {
  scale[0] = load_f16(b);
  five_bits(b + 6, load_u32(b + 2), 16, q);
}

void q5_1(const uint8_t* b, int8_t* q, float* scale, float* offset) {
  scale[0] = load_f16(b);
  offset[0] = load_f16(b + 2);
  five_bits(b + 8, load_u32(b + 4), 0, q);
}

void q8_0(const uint8_t* b, int8_t* q, float* scale, float*) {
  scale[0] = load_f16(b);
  std::memcpy(q, b + 2, 32);
}

// Two-bit planes: each run of 32 bytes holds four runs of 32 values.
int two_bits(const uint8_t* qs, int i) { return qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3; }

void q2_k(const uint8_t* b, int8_t* q, KScales& k) {
  k.d = load_f16(b + 80), k.dmin = load_f16(b + 82);
  for (int g = 0; g < 16; ++g) {
    k.scale[g] = static_cast<int8_t>(b[g] & 15);
    k.min[g] = static_cast<int8_t>(b[g] >> 4);
  }
  for (int i = 0; i < 256; ++i) q[i] = static_cast<int8_t>(two_bits(b + 16, i));
}

void q3_k(const uint8_t* b, int8_t* q, KScales& k) {
  const uint8_t *high = b, *qs = b + 32, *scales = b + 96;
  k.d = load_f16(b + 108);
  for (int g = 0; g < 16; ++g) {
    const int low = scales[g % 8] >> (g / 8 * 4) & 15;
    const int six = low | (scales[8 + g % 4] >> (g / 4 * 2) & 3) << 4;
    k.scale[g] = static_cast<int8_t>(six - 32);
  }
  for (int i = 0; i < 256; ++i) {
    const int clear = ~(high[i % 32] >> (i / 32)) & 1;  // the third bit is stored inverted
    q[i] = static_cast<int8_t>(two_bits(qs, i) - 4 * clear);
  }
}

// Eight six-bit scales and minima in twelve bytes.
void six_bit_scales(const uint8_t* b, KScales& k) {
  k.d = load_f16(b), k.dmin = load_f16(b + 2);
  const uint8_t* s = b + 4;
  for (int g = 0; g < 8; ++g) {
    k.scale[g] = static_cast<int8_t>(g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4);
    k.min[g] = static_cast<int8_t>(g < 4 ? s[g + 4] & 63 : (s[g + 4] >> 4) | (s[g] >> 6) << 4);
  }
}

void q4_k(const uint8_t* b, int8_t* q, KScales& k) {
  six_bit_scales(b, k);
  for (int i = 0; i < 256; ++i) q[i] = static_cast<int8_t>(b[16 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15);
}

void q5_k(const uint8_t* b, int8_t* q, KScales& k) {
  six_bit_scales(b, k);
  for (int i = 0; i < 256; ++i) {
    const int low = b[48 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
    q[i] = static_cast<int8_t>(low | (b[16 + i % 32] >> (i / 32) & 1) << 4);
  }
}

void q6_k(const uint8_t* b, int8_t* q, KScales& k) {
  k.d = load_f16(b + 208);
  std::memcpy(k.scale, b + 192, 16);
  for (int i = 0; i < 256; ++i) {
    const int low = b[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
    q[i] = static_cast<int8_t>((low | two_bits(b + 128, i) << 4) - 32);
  }
}

using BlockDecoder = void (*)(const uint8_t* block, int8_t* q, float* scale, float* offset);
constexpr BlockDecoder kDecoders[] = {nullptr, nullptr, nullptr, q4_0, q4_1, q5_0, q5_1, q8_0};
using KDecoder = void (*)(const uint8_t* block, int8_t* q, KScales& scales);
constexpr KDecoder kKDecoders[] = {q2_k, q3_k, q4_k, q5_k, q6_k};

KDecoder k_decoder(Format format) { return kKDecoders[static_cast<int>(format) - static_cast<int>(Format::q2_k)]; }

// The row blocks that were asked for: entries are added, never changed, so that they are read without a lock.
constexpr int kMostRowBlocks = 1024;
std::array<std::atomic<const RowBlocks*>, kMostRowBlocks> row_block_formats{};
std::mutex row_block_mutex;

const RowBlocks& row_blocks_of(Format format) {
  const int index = static_cast<int>(format) - static_cast<int>(Format::row_blocks);
  return *row_block_formats[index].load(std::memory_order_acquire);
}

Format row_blocks_named(const std::string& name) {
  const std::lock_guard lock(row_block_mutex);
  int i = 0;
  for (const RowBlocks* known; i < kMostRowBlocks && (known = row_block_formats[i].load()); ++i) {
    if (known->name == name) return static_cast<Format>(static_cast<int>(Format::row_blocks) + i);
  }
  if (i == kMostRowBlocks) throw std::invalid_argument("too many number formats");
  row_block_formats[i].store(new RowBlocks(name), std::memory_order_release);  // for as long as the process lives
  return static_cast<Format>(static_cast<int>(Format::row_blocks) + i);
}

// One block of any quantized format but row blocks.
void decode_block(Format format, const uint8_t* block, int8_t* q, float* scale, float* offset) {
  if (!is_k_quant(format)) return kDecoders[static_cast<int>(format)](block, q, scale, offset);
  const FormatTraits& t = traits(format);
  KScales k;
  k_decoder(format)(block, q, k);
  for (int g = 0; g < t.block / t.group; ++g) {
    scale[g] = k.d * static_cast<float>(k.scale[g]);
    if (t.has_offset) offset[g] = -(k.dmin * static_cast<float>(k.min[g]));
  }
}

}  // namespace

const FormatTraits& traits(Format format) {
  return is_row_blocks(format) ? row_blocks_of(format).traits : kTraits[static_cast<int>(format)];
}

Format format_named(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(Format::q6_k); ++i) {
    if (name == kTraits[i].name) return static_cast<Format>(i);
  }
  return row_blocks_named(name);
}

void decode_k_quants(Format format, const uint8_t* row, int64_t features, int8_t* q, KScales* scales) {
  const FormatTraits& t = traits(format);
  assert(is_k_quant(format) && features % t.block == 0);
  const KDecoder decode = k_decoder(format);
  for (int64_t i = 0; i < features; i += t.block, row += t.block_bytes) decode(row, q + i, *scales++);
}

void decode_quants(Format format, const uint8_t* row, int64_t features, int8_t* q, float* scale, float* offset) {
  const FormatTraits& t = traits(format);
  assert(t.group > 0 && features % t.block == 0);
  if (is_row_blocks(format)) return row_blocks_of(format).decode(row, features, q, scale, offset);
  for (int64_t i = 0; i < features; i += t.block, row += t.block_bytes) {
    decode_block(format, row, q + i, scale + i / t.group, offset + i / t.group);
  }
}

void decode_zero_points(Format format, const uint8_t* row, int64_t features, int8_t* zero) {
  row_blocks_of(format).decode_zero_points(row, features, zero);
}

void decode_row(Format format, const uint8_t* row, int64_t features, float* out) {
  const FormatTraits& t = traits(format);
  switch (format) {
    case Format::f32:
      std::memcpy(out, row, features * sizeof(float));
      return;
    case Format::f16:
      for (int64_t i = 0; i < features; ++i) out[i] = load_f16(row + 2 * i);
      return;
    case Format::bf16:
      for (int64_t i = 0; i < features; ++i) out[i] = bf16_to_f32(load_u16(row + 2 * i));
      return;
    default:
      break;
  }
  assert(features % t.block == 0);
  if (is_row_blocks(format)) return row_blocks_of(format).decode_values(row, features, out);
  int8_t q[256];
  float scale[16], offset[16];
  for (int64_t i = 0; i < features; i += t.block, row += t.block_bytes, out += t.block) {
    decode_block(format, row, q, scale, offset);
    for (int j = 0; j < t.block; ++j) {
      const float product = scale[j / t.group] * static_cast<float>(q[j]);
      out[j] = t.has_offset ? product + offset[j / t.group] : product;
    }
  }
}

}  // namespace headrace
