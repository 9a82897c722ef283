// How fast this machine reads memory: the denominator of every share of a limit.
#pragma once

#include <cstddef>

namespace headrace {

// Bytes per second that `threads` threads together read from a working set of `bytes`, each its own part of it, over
// and over: the best of several passes of at least `seconds` in all.
double read_bandwidth(size_t bytes, int threads, double seconds = 0.15);

}  // namespace headrace
