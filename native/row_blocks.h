// Row blocks: scale | zero point, if there is one | codes, of one group. See headrace.numerics.row_blocks.
#pragma once

#include <cstdint>
#include <string>

#include "formats.h"

namespace headrace {

struct RowBlocks {
  enum class Element : uint8_t { int4, uint4, int8, uint8, e4m3, e2m1 };
  enum class Stored : uint8_t { f32, bf16, f16, e8m0 };  // how a scale is

  std::string name;
  Element element;
  Stored stored;
  int64_t group_size;
  FormatTraits traits;  // its name is this one's

  // By the name of the number format. Throws std::invalid_argument for one that no kernel reads.
  explicit RowBlocks(const std::string& name);
  RowBlocks(const RowBlocks&) = delete;
  RowBlocks& operator=(const RowBlocks&) = delete;

  // See `decode_quants`, `decode_zero_points` and `decode_row`.
  void decode(const uint8_t* row, int64_t features, int8_t* q, float* scale, float* offset) const;
  void decode_zero_points(const uint8_t* row, int64_t features, int8_t* zero) const;
  void decode_values(const uint8_t* row, int64_t features, float* out) const;

 private:
  bool has_nibbles() const { return element == Element::int4 || element == Element::uint4 || element == Element::e2m1; }
  int64_t codes_at() const;
  float scale_of(const uint8_t* block) const;
  int zero_of(const uint8_t* block) const;                // of q, which is signed
  bool has_minus(const uint8_t* block, int64_t i) const;  // of e2m1, which has a minus zero
  int code_of(const uint8_t* block, int64_t i) const;
  void decode_codes(const uint8_t* codes, int8_t* q) const;
};

}  // namespace headrace
