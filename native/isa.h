// Which instruction sets this build and this machine share.
#pragma once

#include <string>
#include <vector>

#include "linear.h"

namespace headrace {

// The name users see and give: "portable", "avx2", "avx512", "avx512_vnni", "amx".
const char* isa_name(Isa isa);

// The set of that name, available or not; throws std::invalid_argument for another name.
Isa isa_named(const std::string& name);

// The best available set, or the one named; throws std::invalid_argument, listing what there is, if it is not
// available.
Isa choose_isa(const std::string& name);

// Names of the available sets, best last.
std::vector<std::string> available_isas();

}  // namespace headrace
