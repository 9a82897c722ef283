// Rounding to integer schemes, for weight updates (headrace.executors.native_quantize).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "isa.h"
#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace headrace;

namespace {

template <typename T>
using Matrix = nb::ndarray<const T, nb::numpy, nb::device::cpu, nb::c_contig, nb::ndim<2>>;

ScaleType scale_named(const std::string& name) {
  if (name == "f32") return ScaleType::f32;
  if (name == "bf16") return ScaleType::bf16;
  if (name == "f16") return ScaleType::f16;
  throw std::invalid_argument("scales are f32, bf16 or f16, not " + name);
}

template <typename T>
nb::object quantize_rows(const Matrix<T>& values, int bits, bool symmetric, int64_t group, const std::string& scale,
                         float steps, int low, int high, const std::string& isa) {
  const IntegerGroups groups{bits, symmetric, group, scale_named(scale), steps, low, high};
  const int64_t rows = values.shape(0), features = values.shape(1);
  if ((bits != 4 && bits != 8) || group < 1 || features % group != 0 || (bits == 4 && group % 2 != 0)) {
    throw std::invalid_argument("no such groups");
  }
  const size_t row_bytes = features / group * groups.block_bytes();
  const Kernels& kernels = kernels_for(choose_isa(isa));
  uint8_t* blocks = new uint8_t[rows * row_bytes];
  nb::capsule owner(blocks, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
  {
    const nb::gil_scoped_release release;
    if constexpr (sizeof(T) == 2) {
      kernels.quantize_bf16(groups, values.data(), rows * features, blocks);
    } else {
      kernels.quantize_f32(groups, values.data(), rows * features, blocks);
    }
  }
  return nb::cast(nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>(blocks, {static_cast<size_t>(rows), row_bytes}, owner));
}

}  // namespace

void bind_quantize(nb::module_& m) {
  m.def("quantize_rows", &quantize_rows<uint16_t>, "values"_a, "bits"_a, "symmetric"_a, "group"_a, "scale"_a, "steps"_a,
        "low"_a, "high"_a, "isa"_a = "");
  m.def("quantize_rows", &quantize_rows<float>, "values"_a, "bits"_a, "symmetric"_a, "group"_a, "scale"_a, "steps"_a,
        "low"_a, "high"_a, "isa"_a = "");
}
