// The primitives for AVX-512 with VNNI (F, BW, DQ, VL): 16 lanes, 32 registers. portable.h states what each one
// computes. Not for embeddings, which wait for memory: they run the kernels of AVX2.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kByteRows = 8, kBytePanels = 2, kTileRows = 8, kTilePanels = 1, kFloatRows = 8;
  using F = __m512;
  using I = __m512i;

  static F zero_f() { return _mm512_setzero_ps(); }
  static I zero_i() { return _mm512_setzero_si512(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static I load_bytes(const void* p) { return _mm512_loadu_si512(p); }
  static void store_i(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  static I set_i(int32_t x) { return _mm512_set1_epi32(x); }
  static void store_bytes(void* p, I x) { _mm512_storeu_si512(p, x); }
  static I load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I add_bytes(I sum, I x) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), x); }
  static I broadcast4(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // vmaxps and vminps return their second operand when either is NaN.
  static F at_least(float bound, F x) { return _mm512_max_ps(set(bound), x); }
  static F at_most(float bound, F x) { return _mm512_min_ps(set(bound), x); }
  static F abs(F x) { return _mm512_andnot_ps(set(-0.0f), x); }
  static F negate(F x) { return _mm512_xor_ps(set(-0.0f), x); }
  static F copy_sign(F magnitude, F sign) {
    return _mm512_or_ps(_mm512_andnot_ps(set(-0.0f), magnitude), _mm512_and_ps(set(-0.0f), sign));
  }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F exp2_integer(F n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), set_i(127)), 23));
  }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  template <int Byte>
  static F byte_to_float(I x) {
    return to_float(_mm512_srai_epi32(Byte == 3 ? x : _mm512_slli_epi32(x, 24 - 8 * Byte), 24));
  }

  // As in avxvnni.h: the weight + 128 is the unsigned operand of vpdpbusd.
  static constexpr int32_t kWeightOffset = 128;
  static I load_weights(const uint8_t* p) { return _mm512_xor_si512(load_bytes(p), _mm512_set1_epi8(-128)); }
  static I dot4(I sum, I w, I codes) { return in_order(_mm512_dpbusd_epi32(sum, w, codes)); }

  static I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static I high_nibbles(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
  template <int Shift>
  static F nibble_to_float(I x) {
    const I low = Shift ? _mm512_srli_epi32(x, Shift) : x;
    return to_float(Shift == 28 ? low : _mm512_and_si512(low, set_i(15)));
  }
  static constexpr int64_t kPartialQuads = 1 << 15;
  struct Partial {
    I lanes;
  };
  static int32_t code_of_partial(int32_t start) { return start; }
  static Partial start_partial(I code) { return {code}; }
  static Partial dot4_nibbles(Partial sum, I w, I a) { return {dot4(sum.lanes, w, a)}; }
  static I widen_partial(Partial p) { return p.lanes; }

  static I even_bytes(I x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
  static I odd_bytes(I x) { return _mm512_srai_epi16(x, 8); }
  template <int Shift>
  static I nibbles_of_halves(I x) {
    const I low = Shift ? _mm512_srli_epi16(x, Shift) : x;
    return Shift == 12 ? low : _mm512_and_si512(low, _mm512_set1_epi16(15));
  }
  static I dot2(I sum, I a, I b) { return in_order(_mm512_dpwssd_epi32(sum, a, b)); }

  static F load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_bf16(uint16_t* p, F x) {
    const I bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set_i(1));
    const I rounded = add_i(bits, add_i(odd, set_i(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const I word = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, set_i(0x7fc00000)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(word));
  }
  static void store_f16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static I max_magnitude_bits(I largest, F x) { return _mm512_max_epi32(largest, _mm512_castps_si512(abs(x))); }
  static int32_t reduce_max(I x) { return _mm512_reduce_max_epi32(x); }
  static int32_t reduce_add(I x) { return _mm512_reduce_add_epi32(x); }
  static I codes(const F (&x)[4], F scale) {
    const __m128i a = narrow(x[0], scale), b = narrow(x[1], scale), c = narrow(x[2], scale), d = narrow(x[3], scale);
    const I low = _mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(low, c, 2), d, 3);
  }
  static I wide_codes(F low, F high, F scale) {
    const __m256i first = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(mul(low, scale)));
    const __m256i second = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(mul(high, scale)));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  }
  static I swap_middle(I x) { return _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(x, 0xd8), 0xd8); }

 private:
  // As in avxvnni.h.
  static I in_order(I sum) {
    __asm__("" : "+v"(sum));
    return sum;
  }
  static __m128i narrow(F x, F scale) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(mul(x, scale))); }
};

}  // namespace
