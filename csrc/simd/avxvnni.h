// The primitives for AVX-VNNI: those of AVX2, but for the products of codes. portable.h states what each one computes.
#pragma once
#define Simd Avx2  // the base takes another name here
#include "simd/avx2.h"
#undef Simd

namespace {

struct Simd : Avx2 {
  static constexpr int kByteRows = 4, kBytePanels = 1, kTileRows = 4, kTilePanels = 1;

  // Volatile, so that GCC loads a code for each column of a tile again: kept for all of them, they would leave no registers
  // for the sums.
  static I broadcast4(const void* p) {
    using Word [[gnu::may_alias, gnu::aligned(1)]] = int32_t;
    I y;
    __asm__ volatile("vpbroadcastd %1, %0" : "=x"(y) : "m"(*static_cast<const Word*>(p)));
    return y;
  }
  static I add_bytes(I sum, I x) { return _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), x); }

  // vpdpbusd adds the products of four unsigned with four signed bytes to a lane, modulo 2^32. The weight is the unsigned
  // one: w ^ 0x80 is w + 128, so that a sum has 128 times the sum of its codes too much, one number per row.
  static constexpr int32_t kWeightOffset = 128;
  static I load_weights(const uint8_t* p) { return _mm256_xor_si256(load_bytes(p), _mm256_set1_epi8(-128)); }
  static I dot4(I sum, I w, I codes) { return in_order(_mm256_dpbusd_avx_epi32(sum, w, codes)); }

  static constexpr int64_t kPartialQuads = 1 << 15;
  struct Partial {
    I lanes;
  };
  static int32_t code_of_partial(int32_t start) { return start; }
  static Partial start_partial(I code) { return {code}; }
  static Partial dot4_nibbles(Partial sum, I w, I a) { return {dot4(sum.lanes, w, a)}; }
  static I widen_partial(Partial p) { return p.lanes; }

  static I dot2(I sum, I a, I b) { return in_order(_mm256_dpwssd_avx_epi32(sum, a, b)); }

 private:
  // An empty statement that may change the sum: else GCC moves products of a step past each other, and keeps sums on the
  // stack.
  static I in_order(I sum) {
    __asm__("" : "+x"(sum));
    return sum;
  }
};

}  // namespace
