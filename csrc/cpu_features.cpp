#include "cpu_features.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pyengine {
namespace {

#if defined(__x86_64__)
bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// CPUID says what the core has; XGETBV says whether the operating system saves the wide registers. Both must hold:
// a kernel or hypervisor may leave AVX state off on a core that reports AVX2.
bool has_avx2() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!(fma && osxsave && avx && f16c)) return false;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 0x6) != 0x6) return false;  // XMM and YMM state
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && bit(b, 5);
}
#endif

}  // namespace

bool isa_supported(const char* isa) {
  if (std::strcmp(isa, "portable") == 0) return true;
#if defined(__x86_64__)
  static const bool avx2 = has_avx2();
  if (std::strcmp(isa, "avx2") == 0) return avx2;
#elif defined(__aarch64__) && defined(__linux__)
  const bool dot = getauxval(AT_HWCAP) & HWCAP_ASIMDDP, matrix = getauxval(AT_HWCAP2) & HWCAP2_I8MM;
  if (std::strcmp(isa, "neondot") == 0) return dot;
  if (std::strcmp(isa, "i8mm") == 0) return dot && matrix;
#endif
  return false;
}

}  // namespace pyengine
