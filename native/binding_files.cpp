// What Python asks of the extension about files: strings of a GGUF header, checksums, the identity of packed layouts.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "checksum.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::numpy, nb::device::cpu, nb::c_contig, nb::ndim<1>>;

// Where each of `count` strings, every one after its length (u64, little-endian), begins with that length, then the end
// of the last: counted from `position`. A string that ends past the data is an error that names its index.
std::vector<int64_t> string_offsets(const Bytes& data, uint64_t position, uint64_t count) {
  const uint64_t size = data.shape(0);
  std::vector<int64_t> offsets;
  uint64_t at = position;
  for (uint64_t i = 0; i < count; ++i) {
    offsets.push_back(static_cast<int64_t>(at - position));
    uint64_t length = 0;
    if (at > size || size - at < sizeof(length)) throw nb::index_error(std::to_string(i).c_str());
    std::memcpy(&length, data.data() + at, sizeof(length));
    at += sizeof(length);
    if (length > size - at) throw nb::index_error(std::to_string(i).c_str());
    at += length;
  }
  offsets.push_back(static_cast<int64_t>(at - position));
  return offsets;
}

}  // namespace

void bind_files(nb::module_& m) {
  m.def("string_offsets", &string_offsets, "data"_a, "position"_a, "count"_a);
  m.def(
      "checksums",
      [](const Bytes& data, size_t piece) {
        if (piece == 0) throw std::invalid_argument("a piece has at least one byte");
        const nb::gil_scoped_release release;
        return headrace::checksums(data.data(), data.shape(0), piece);
      },
      "data"_a, "piece"_a);
  m.attr("packing_id") = HEADRACE_PACKING_ID;
}
