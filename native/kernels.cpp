#include "kernels.h"

#include <algorithm>

#include "kernel_table.h"

namespace headrace {

int64_t attention_scratch_floats(int64_t queries, int32_t head_dim) {
  const int64_t dim = padded_dim(head_dim), padded = (queries + 15) / 16 * 16;
  const int64_t batched = queries + 5;  // whole batches of at most six are no more
  const int64_t scales = kv_scales(KvFormat::int4, head_dim);
  // Queries; running and joined results; maxima, factors and offsets; scores; scales; a tile of keys or of values.
  const int64_t shared = batched * dim + 2 * queries * partial_floats(head_dim) + 3 * padded + queries * kTileKeys +
                         2 * kTileKeys + kTileKeys * dim;
  // Of integers: queries, their steps and sums; weights, their units and what the lowest values add; scales of a tile.
  return shared + batched * dim / 2 + padded * (1 + scales) + queries * scales * (kTileKeys / 2 + 2) +
         4 * scales * kTileKeys;
}

const Kernels& kernels_for(Isa isa) {
#ifdef HEADRACE_X86
  static const Kernels avx2 = avx2::make_kernels(), avx512 = avx512::make_kernels(),
                       avx512_vnni = avx512_vnni::make_kernels();
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) return avx512;
  if (isa != Isa::portable) return avx512_vnni;
#endif
  (void)isa;
  static const Kernels portable = portable::make_kernels();
  return portable;
}

}  // namespace headrace
