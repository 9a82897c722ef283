// Which instruction sets this build and this machine share. Each check covers the processor and the operating system:
// registers that the system does not save are not there.
#include "isa.h"

#include <stdexcept>

#ifdef HEADRACE_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace headrace {

#ifdef HEADRACE_X86
namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!has_avx512_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16TileInt8 = 1u << 22 | 1u << 24 | 1u << 25;
  if ((d & kBf16TileInt8) != kBf16TileInt8) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & 1u << 5) == 0) return false;  // AVX512_BF16
  // Linux hands out the 8 KiB of tile registers per process, on request. The permission is inherited by threads.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool isa_available(Isa isa) {
  static const bool avx2 = has_avx2(), avx512 = has_avx512(), vnni = has_avx512_vnni(), amx = has_amx();
  switch (isa) {
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_vnni:
      return vnni;
    case Isa::amx:
      return amx;
    default:
      return true;
  }
}
#else
bool isa_available(Isa isa) { return isa == Isa::portable; }
#endif

constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::amx};

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_vnni", "amx"};
  return kNames[static_cast<int>(isa)];
}

Isa isa_named(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("'" + name + "' is not an instruction set");
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas) {
    if (isa_available(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

Isa choose_isa(const std::string& name) {
  Isa best = Isa::portable;
  std::string names;
  for (Isa isa : kIsas) {
    if (!isa_available(isa)) continue;
    if (name == isa_name(isa)) return isa;
    best = isa;
    names += std::string(" ") + isa_name(isa);
  }
  if (name.empty()) return best;
  throw std::invalid_argument("instruction set '" + name + "' is not available here, only:" + names);
}

}  // namespace headrace
