// Integer groups: what a matrix is rounded to by the rule of headrace.numerics.quantize, bit for bit.
#pragma once

#include <cstdint>

#include "formats.h"

namespace headrace {

// One row block: scale | zero point, if the codes are not signed | codes of 4 or 8 bits. See
// headrace.numerics.row_blocks.
struct IntegerGroups {
  int bits;
  bool symmetric;
  int64_t group;
  ScaleType scale;
  float steps;    // how many scales the largest magnitude is; without symmetry, the distance from least to largest
  int low, high;  // the lowest and the highest code

  int64_t scale_bytes() const { return scale == ScaleType::f32 ? 4 : 2; }
  int64_t block_bytes() const { return scale_bytes() + !symmetric + group * bits / 8; }
};

}  // namespace headrace
