#include "checksum.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace headrace {
namespace {

constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;  // odd, so that each step is a bijection of the state and of the word

uint64_t mix(uint64_t state, uint64_t word) { return std::rotl(state ^ word, 29) * kFactor; }

}  // namespace

uint64_t checksum(const uint8_t* data, size_t bytes) {
  constexpr size_t kLanes = 8;  // chains side by side, because one waits for its multiplication
  uint64_t lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
  const size_t whole = bytes / sizeof(lanes) * sizeof(lanes);
  for (size_t at = 0; at < whole; at += sizeof(lanes)) {
    uint64_t words[kLanes];
    std::memcpy(words, data + at, sizeof(words));
    for (size_t i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
  }
  uint64_t rest[kLanes] = {};
  if (whole < bytes) std::memcpy(rest, data + whole, bytes - whole);
  uint64_t state = bytes;
  for (size_t i = 0; i < kLanes; ++i) state = mix(mix(state, lanes[i]), rest[i]);
  return state ^ (state >> 32);
}

std::vector<uint64_t> checksums(const uint8_t* data, size_t bytes, size_t piece) {
  std::vector<uint64_t> sums;
  for (size_t at = 0; at < bytes; at += piece) sums.push_back(checksum(data + at, std::min(piece, bytes - at)));
  return sums;
}

}  // namespace headrace
