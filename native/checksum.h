// A checksum against damage by accident: any change of eight bytes or fewer is found for sure, anything else but for
// one in 2^64. As fast as memory is read. The same on every machine of one byte order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace headrace {

uint64_t checksum(const uint8_t* data, size_t bytes);

// The checksum of each `piece` bytes in turn; the last piece may be shorter.
std::vector<uint64_t> checksums(const uint8_t* data, size_t bytes, size_t piece);

}  // namespace headrace
