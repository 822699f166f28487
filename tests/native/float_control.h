// The control register as another library may leave it: denormals are flushed to zero and numbers rounded towards zero,
// for the lifetime of the object.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

class OtherFloatControl {
 public:
  OtherFloatControl() : saved_(read()) { write(saved_ | kOther); }
  ~OtherFloatControl() { write(saved_); }
  bool intact() const { return (read() & kOther) == kOther; }

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kOther = 0xe040;  // FTZ, RC, DAZ
  static uint64_t read() { return _mm_getcsr(); }
  static void write(uint64_t bits) { _mm_setcsr(static_cast<unsigned>(bits)); }
#else
  static constexpr uint64_t kOther = 7 << 22;  // FZ, RMode
  static uint64_t read() {
    uint64_t bits;
    __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void write(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
#endif
  uint64_t saved_;
};
