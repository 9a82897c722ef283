#include "kernels.h"

#include <algorithm>

#include "kernel_table.h"

namespace headrace {

int64_t attention_scratch_floats(int64_t queries, int32_t head_dim) {
  const int64_t dim = padded_dim(head_dim), padded = (queries + 15) / 16 * 16;
  // Queries; running and joined results; maxima, factors and offsets; scores; scales; a tile of keys or of values.
  return padded * dim + 2 * queries * partial_floats(head_dim) + 3 * padded + queries * kTileKeys + 2 * kTileKeys +
         kTileKeys * dim;
}

const Kernels& kernels_for(Isa isa) {
#ifdef HEADRACE_X86
  static const Kernels avx2 = avx2::make_kernels(), avx512 = avx512::make_kernels();
  if (isa == Isa::avx2) return avx2;
  if (isa != Isa::portable) return avx512;
#endif
  (void)isa;
  static const Kernels portable = portable::make_kernels();
  return portable;
}

}  // namespace headrace
