// The primitives that kernels are templates on, for AVX2 with FMA and F16C. portable.h states what each one computes.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kByteRows = 2, kBytePanels = 2, kTileRows = 4, kTilePanels = 1, kFloatRows = 6;
  using F = __m256;
  using I = __m256i;

  static F zero_f() { return _mm256_setzero_ps(); }
  static I zero_i() { return _mm256_setzero_si256(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static I load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_i(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static I set_i(int32_t x) { return _mm256_set1_epi32(x); }
  static void store_bytes(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static I load_u8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I mul_i(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I add_bytes(I sum, I x) {
    const I pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I broadcast4(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // vmaxps and vminps return their second operand when either is NaN.
  static F at_least(float bound, F x) { return _mm256_max_ps(set(bound), x); }
  static F at_most(float bound, F x) { return _mm256_min_ps(set(bound), x); }
  static F abs(F x) { return _mm256_andnot_ps(set(-0.0f), x); }
  static F negate(F x) { return _mm256_xor_ps(set(-0.0f), x); }
  static F copy_sign(F magnitude, F sign) {
    return _mm256_or_ps(_mm256_andnot_ps(set(-0.0f), magnitude), _mm256_and_ps(set(-0.0f), sign));
  }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F exp2_integer(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  template <int Byte>
  static F byte_to_float(I x) {
    return to_float(_mm256_srai_epi32(Byte == 3 ? x : _mm256_slli_epi32(x, 24 - 8 * Byte), 24));
  }

  // ---- for kernels/linear/int8_a8_words.inc, which says what they are for ----

  // In each word, the sum of two products of an unsigned byte and a signed one, with saturation.
  static I products(I magnitude, I w) { return _mm256_maddubs_epi16(magnitude, w); }
  static I flip(I w, I sign) { return _mm256_xor_si256(w, sign); }
  static I add_words(I a, I b) {
    a = _mm256_add_epi16(a, b);
    __asm__("" : "+x"(a));  // see dot2
    return a;
  }
  // sum + the two signed words of each lane.
  static I add_widened(I sum, I words) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    __asm__("" : "+x"(sum));  // see dot2
    return sum;
  }
  // 32 codes as 8 times {4 signs, 4 magnitudes}: sign 0 or 0xff. Returns negative + the magnitudes of the negative codes,
  // spread over the lanes.
  static I store_signs_and_magnitudes(I negative, I codes, uint8_t* to) {
    const I sign = _mm256_cmpgt_epi8(zero_i(), codes), magnitude = _mm256_abs_epi8(codes);
    const I first = _mm256_unpacklo_epi32(sign, magnitude), second = _mm256_unpackhi_epi32(sign, magnitude);
    store_bytes(to, _mm256_permute2x128_si256(first, second, 0x20));
    store_bytes(to + 32, _mm256_permute2x128_si256(first, second, 0x31));
    return _mm256_add_epi32(negative, _mm256_sad_epu8(_mm256_and_si256(sign, magnitude), zero_i()));
  }
  // Of two groups of 16 codes, or of the first: bit 0 and 1 where the sums of squares are beyond their limits. A code -128
  // counts as beyond any.
  static unsigned beyond_limits(I codes, const uint16_t* limits, bool both) {
    const I magnitude = _mm256_abs_epi8(codes);
    I energy = _mm256_maddubs_epi16(magnitude, magnitude);
    energy = _mm256_adds_epu16(energy, _mm256_shuffle_epi32(energy, 0x4e));
    energy = _mm256_adds_epu16(energy, _mm256_shuffle_epi32(energy, 0xb1));
    uint64_t pairs = 0;
    std::memcpy(&pairs, limits, both ? 8 : 4);
    const I spread = _mm256_castsi128_si256(_mm_cvtsi64_si128(static_cast<int64_t>(pairs)));
    const I limit = _mm256_permutevar8x32_epi32(spread, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    const I within = _mm256_cmpeq_epi64(_mm256_subs_epu16(energy, limit), zero_i());
    const unsigned mask = static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(within)));
    return (~mask & 1u) | (~mask >> 1 & 2u);
  }

  static I split_bits(uint64_t word, int bits) {
    const I places = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
    return _mm256_and_si256(_mm256_srlv_epi32(set_i(static_cast<int32_t>(word)), places), set_i((1 << bits) - 1));
  }
  static I low_nibbles(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static I high_nibbles(I x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
  template <int Shift>
  static F nibble_to_float(I x) {
    const I low = Shift ? _mm256_srli_epi32(x, Shift) : x;
    return to_float(Shift == 28 ? low : _mm256_and_si256(low, _mm256_set1_epi32(15)));
  }
  // Sums of pairs in 16 bits: 8 quads of 2 * 15 * 127 each are at most 30480. The first word of a lane has the start as
  // well, and ends at the sum of 16 (w - zero) a less zero times 16 other a: at most (8 + 8) * 16 * 127 = 32512, whatever
  // wraps on the way.
  static constexpr int64_t kPartialQuads = 8;
  struct Partial {
    I pairs;
  };
  static int32_t code_of_partial(int32_t start) { return start & 0xffff; }
  static Partial start_partial(I code) { return {code}; }
  static Partial dot4_nibbles(Partial sum, I w, I a) {
    sum.pairs = _mm256_add_epi16(sum.pairs, _mm256_maddubs_epi16(w, a));
    __asm__("" : "+x"(sum.pairs));  // see dot2
    return sum;
  }
  static I widen_partial(Partial p) { return _mm256_madd_epi16(p.pairs, _mm256_set1_epi16(1)); }

  static I even_bytes(I x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
  static I odd_bytes(I x) { return _mm256_srai_epi16(x, 8); }
  template <int Shift>
  static I nibbles_of_halves(I x) {
    const I low = Shift ? _mm256_srli_epi16(x, Shift) : x;
    return Shift == 12 ? low : _mm256_and_si256(low, _mm256_set1_epi16(15));
  }
  static I dot2(I sum, I a, I b) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    // An empty statement that may change the sum: else GCC does all multiplications of a step before the additions,
    // and keeps their results on the stack.
    __asm__("" : "+x"(sum));
    return sum;
  }

  static F load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bf16(uint16_t* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i word = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(word, word), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static I max_magnitude_bits(I largest, F x) {
    return _mm256_max_epi32(largest, _mm256_castps_si256(abs(x)));
  }
  static int32_t reduce_max(I x) {
    alignas(32) int32_t lane[8];
    store_i(lane, x);
    int32_t largest = lane[0];
    for (int i = 1; i < 8; i++) largest = lane[i] > largest ? lane[i] : largest;
    return largest;
  }
  static int32_t reduce_add(I x) {
    alignas(32) int32_t lane[8];
    store_i(lane, x);
    int32_t sum = 0;
    for (int i = 0; i < 8; i++) sum += lane[i];
    return sum;
  }
  static I codes(const F (&x)[4], F scale) {
    const I low = _mm256_packs_epi32(_mm256_cvtps_epi32(mul(x[0], scale)), _mm256_cvtps_epi32(mul(x[1], scale)));
    const I high = _mm256_packs_epi32(_mm256_cvtps_epi32(mul(x[2], scale)), _mm256_cvtps_epi32(mul(x[3], scale)));
    // The two packs interleave 128-bit halves; one permutation of words puts the 32 codes back in order.
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  }
  static I wide_codes(F low, F high, F scale) {
    const I packed = _mm256_packs_epi32(_mm256_cvtps_epi32(mul(low, scale)), _mm256_cvtps_epi32(mul(high, scale)));
    return _mm256_permute4x64_epi64(packed, 0xd8);  // the pack interleaves 128-bit halves
  }
  static I swap_middle(I x) { return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(x, 0xd8), 0xd8); }
};

}  // namespace
