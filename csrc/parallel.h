// parallel_for on torch's own thread pool, without linking to torch or OpenMP.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace pyengine {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
// The plain C function that libtorch_cpu exports since 2.10 (torch/csrc/stable/c/shim.h).
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

// Null means serial: before Python hands over torch's function, and in forked children, where torch's pool is gone.
void set_parallel_for(TorchParallelFor function);
TorchParallelFor get_parallel_for();

// IEEE arithmetic for the lifetime of the object: round to nearest, no flush to zero, no denormals as zero. Results
// then do not depend on torch.set_flush_denormal or on what another library left in the control register.
class FloatEnvironment {
 public:
#if defined(__x86_64__)
  FloatEnvironment() : saved_(_mm_getcsr()) {
    if ((saved_ & ~kStatus) != kDefault) _mm_setcsr(kDefault);
  }
  ~FloatEnvironment() {
    if ((saved_ & ~kStatus) != kDefault) _mm_setcsr(saved_);
  }

 private:
  static constexpr unsigned kStatus = 0x3f, kDefault = 0x1f80;
  unsigned saved_;
#elif defined(__aarch64__)
  FloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    if (saved_) set(0);
  }
  ~FloatEnvironment() {
    if (saved_) set(saved_);
  }

 private:
  // All bits of FPCR ask for something else than IEEE: flush to zero, other roundings, the default NaN, other halves.
  static void set(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
  uint64_t saved_;
#else
  FloatEnvironment() {}
#endif
};

// Calls body(begin, end) on disjoint ranges that cover [0, count), each of at least `grain` items.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  const ParallelBody call = [](int64_t begin, int64_t end, void* context) {
    FloatEnvironment environment;
    (*static_cast<const Body*>(context))(begin, end);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&body));
  const TorchParallelFor torch = count > grain ? get_parallel_for() : nullptr;
  if (!torch || torch(0, count, grain, call, context) != 0) call(0, count, context);
}

}  // namespace pyengine
