// How fast this machine reads memory: with peak.h, the denominator of every share of a limit.
#pragma once

#include <cstddef>

namespace headrace {

// Bytes per second that `threads` threads together read from a working set of `bytes`, each its own part of it, over
// and over, in the ways that the machine may read fastest: the best of several passes of at least `seconds` in all.
// Memory is in huge pages where the system has them. Throws std::bad_alloc, std::invalid_argument for threads that the
// system does not start.
double read_bandwidth(size_t bytes, int threads, double seconds = 0.15);

}  // namespace headrace
