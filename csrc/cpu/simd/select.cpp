// Chooses the instruction set, once.
#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "rows.h"

namespace kvcomp::simd {
namespace {

struct Isa {
  const char* name;
  bool present;
  const Rows& (*rows)();
};

#ifdef __x86_64__
// Tiles are a state so large that a process has to ask Linux for it.
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7 in edx
  constexpr long kRequest = 0x1023, kTileData = 18;        // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBf16) && (edx & kTiles) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

const Rows& choose() {
  const Isa isas[] = {
      // ascending
      {"scalar", true, &scalar_rows},
#ifdef __x86_64__
      {"avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c"),
       &avx2_rows},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
       &avx512_rows},
      {"avx512bf16", __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"),
       &avx512bf16_rows},
      {"amx", has_amx(), &amx_rows},
#endif
  };
  const char* cap = std::getenv("KVCOMP_ISA");
  const Isa* best = isas;
  for (const Isa& isa : isas) {
    if (!isa.present) break;  // each set contains the one before it
    best = &isa;
    if (cap && std::string(cap) == isa.name) break;
  }
  bool known = !cap || !*cap;
  std::string names;
  for (const Isa& isa : isas) {
    known = known || std::string(cap) == isa.name;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  if (!known) {
    throw std::invalid_argument("KVCOMP_ISA: expected one of " + names + ", got '" + cap + "'");
  }
  return best->rows();
}

}  // namespace

const Rows& rows() {
  static const Rows& chosen = choose();
  return chosen;
}

}  // namespace kvcomp::simd
