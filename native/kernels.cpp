#include "kernels.h"

#include <algorithm>

#include "kernel_table.h"

namespace headrace {

int64_t attention_scratch_floats(int64_t queries, int32_t head_dim) {
  const int64_t dim = padded_dim(head_dim), tile = 64;
  // Queries; running and joined results; a gathered tile of keys and of values.
  return queries * dim + 2 * queries * partial_floats(head_dim) + 2 * tile * dim;
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
