// Any processor. Compiled without floating-point contraction, so that its bits are those of the source.
namespace headrace {
namespace {
constexpr int kRows = 2, kPanels = 1, kDirect = 2;
}  // namespace
}  // namespace headrace

#include "linear_f32.inc"

void headrace::linear_f32_portable(const PanelWeights& weights, const float* x, int64_t rows, float* y, int64_t ldy,
                                   int64_t column_begin, int64_t column_end) {
  run(weights, x, rows, y, ldy, column_begin, column_end);
}
