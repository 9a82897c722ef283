// bf16 multiply-adds by VDPBF16PS, as peak_loops.h wants them.
#include "peak_loops.h"
#include "peak_twelve.h"

namespace headrace {
namespace {

HEADRACE_TWELVE_CHAINS(chains, "vdpbf16ps")

}  // namespace

// Pairs of ones: sums grow to 2^24 and stay there.
PeakLoop peak_bf16_avx512_bf16() {
  return {[](int64_t rounds) { return chains(rounds, 0x3f803f80, 0x3f803f80); }, 12 * 2.0 * 32};
}

}  // namespace headrace
