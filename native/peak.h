// How fast this machine multiplies and adds: with the bandwidth, the denominator of every share of a limit.
#pragma once

#include <string>
#include <vector>

#include "linear.h"

namespace headrace {

// Operations per second (two per multiply-add) that `num_threads` threads together reach in a loop whose operands stay
// in registers: the best of passes of about 2 ms over `seconds`. `arithmetic` is "f32", "bf16", "int16" or "int8":
// operands of that format, products and sums as exact as the instruction makes them. Throws std::invalid_argument,
// saying what there is, for an arithmetic that the instruction set or this machine does not have.
double matrix_rate(const std::string& arithmetic, Isa isa, int num_threads, double seconds = 0.1);

// Names that `matrix_rate` takes for an available instruction set; "f32" first.
std::vector<std::string> arithmetics(Isa isa);

}  // namespace headrace
