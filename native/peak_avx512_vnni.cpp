// int8 multiply-adds by VPDPBUSD, as peak_loops.h wants them.
#include "peak_loops.h"
#include "peak_twelve.h"

namespace headrace {
namespace {

HEADRACE_TWELVE_CHAINS(chains, "vpdpbusd")

}  // namespace

PeakLoop peak_int8_avx512_vnni() {
  return {[](int64_t rounds) { return chains(rounds, 0x03030303, 0xfbfbfbfb); }, 12 * 2.0 * 64};
}

}  // namespace headrace
