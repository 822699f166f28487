#include "cpu_features.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pyengine {
namespace {

#if defined(__x86_64__)
bool bit(uint64_t word, int index) { return (word >> index) & 1u; }

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// Zeros where the processor has no such leaf.
Registers cpuid(unsigned leaf, unsigned part) {
  Registers r;
  if (!__get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

// CPUID says what the core has; XGETBV says whether the operating system saves the wide registers. Both must hold:
// a kernel or hypervisor may leave AVX state off on a core that reports AVX2.
struct Features {
  bool avx2 = false, avxvnni = false, avx512vnni = false, amx = false;

  Features() {
    const Registers basic = cpuid(1, 0), wide = cpuid(7, 0), more = wide.a ? cpuid(7, 1) : Registers();
    const bool fma = bit(basic.c, 12), osxsave = bit(basic.c, 27), avx = bit(basic.c, 28), f16c = bit(basic.c, 29);
    if (!(fma && osxsave && avx && f16c)) return;
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr uint32_t kYmm = 0x6, kZmm = 0xe0, kTiles = 0x60000;  // SSE and AVX; masks and ZMM; configuration and data
    avx2 = (low & kYmm) == kYmm && bit(wide.b, 5);
    avxvnni = avx2 && bit(more.a, 4);
    const bool foundation = bit(wide.b, 16), dq = bit(wide.b, 17), bw = bit(wide.b, 30), vl = bit(wide.b, 31);
    avx512vnni = avx2 && (low & kZmm) == kZmm && foundation && dq && bw && vl && bit(wide.c, 11);
    amx = avxvnni && (low & kTiles) == kTiles && bit(wide.d, 24) && bit(wide.d, 25) && tiles_permitted();
  }

  // Linux gives a process the large state of the tiles only when it asks for it.
  static bool tiles_permitted() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }
};
#endif

}  // namespace

bool isa_supported(const char* isa) {
  if (std::strcmp(isa, "portable") == 0) return true;
#if defined(__x86_64__)
  static const Features has;
  if (std::strcmp(isa, "avx2") == 0) return has.avx2;
  if (std::strcmp(isa, "avxvnni") == 0) return has.avxvnni;
  if (std::strcmp(isa, "avx512vnni") == 0) return has.avx512vnni;
  if (std::strcmp(isa, "amx") == 0) return has.amx;
#elif defined(__aarch64__) && defined(__linux__)
  const bool dot = getauxval(AT_HWCAP) & HWCAP_ASIMDDP, matrix = getauxval(AT_HWCAP2) & HWCAP2_I8MM;
  if (std::strcmp(isa, "neondot") == 0) return dot;
  if (std::strcmp(isa, "i8mm") == 0) return dot && matrix;
#endif
  return false;
}

}  // namespace pyengine
