#include "kernels.h"

#include <algorithm>

#include "kernel_table.h"

namespace headrace {

int64_t attention_scratch_floats(int64_t queries, int32_t head_dim) {
  const int64_t dim = padded_dim(head_dim), padded = (queries + 15) / 16 * 16;
  const int64_t batched = queries + 5;  // whole batches of at most six are no more
  const int64_t scales = kv_scales(KvFormat::int4, head_dim);
  // Queries; running and joined results; maxima, factors and offsets; scores; scales; a tile of keys or of values.
  const int64_t shared = batched * dim + (padded + queries) * partial_floats(head_dim) + 3 * padded +
                         queries * kTileKeys + 2 * kTileKeys + kTileKeys * dim;
  // Of integers: queries, their steps and sums; weights, their units and what the lowest values add; scales of a tile.
  const int64_t integers =
      batched * dim / 2 + padded * (1 + scales) + queries * scales * (kTileKeys / 2 + 2) + 4 * scales * kTileKeys;
  // Of tile products: queries, keys and values in bf16; scores and weights of 16 queries.
  const int64_t tiles = (padded * (dim + 16) + kTileKeys * (2 * dim + 16)) / 2 + 16 * kTileKeys * 3 / 2;
  // Of tile products of bytes: queries and their steps; keys, values and weights; what sums of eight queries take.
  const int64_t units = (queries + 7) / 8, tile_features = (dim + 63) / 64 * 64;
  const int64_t bytes =
      units * 4 * tile_features + padded + kTileKeys / 4 * (tile_features + dim + 16) + 16 + 24 * kTileKeys + 16 * dim;
  return shared + std::max({integers, tiles, bytes});
}

const Kernels& kernels_for(Isa isa) {
#ifdef HEADRACE_X86
  static const Kernels avx2 = avx2::make_kernels(), avx512 = avx512::make_kernels(),
                       avx512_vnni = avx512_vnni::make_kernels();
  static const Kernels amx = [] {
    Kernels table = avx512_vnni::make_kernels();
    table.attend = amx::attend;
    table.max_queries = amx::kMaxQueries;
    return table;
  }();
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::avx512_vnni) return avx512_vnni;
  if (isa == Isa::amx) return amx;
#endif
  (void)isa;
  static const Kernels portable = portable::make_kernels();
  return portable;
}

}  // namespace headrace
