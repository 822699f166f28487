// The primitives that kernels are templates on, for NEON with the dot product of bytes. portable.h states what each one
// computes. A vector is two registers, so that what is written for eight lanes serves here too.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

template <class Register>
struct Two {
  Register low, high;
};

// f of each register of the arguments.
template <class Function, class... Vectors>
inline auto each(Function f, Vectors... x) -> Two<decltype(f(x.low...))> {
  return {f(x.low...), f(x.high...)};
}

struct Simd {
  static constexpr int kLanes = 8;
  // There are 32 registers: the sums of 4 rows and a panel take 16, those of 6 rows 24.
  static constexpr int kByteRows = 4, kBytePanels = 1, kTileRows = 4, kTilePanels = 1, kFloatRows = 6;
  using F = Two<float32x4_t>;
  using I = Two<int32x4_t>;

  static int8x16_t bytes(int32x4_t x) { return vreinterpretq_s8_s32(x); }
  static int32x4_t lanes(int8x16_t x) { return vreinterpretq_s32_s8(x); }
  static int32x4_t lanes(int16x8_t x) { return vreinterpretq_s32_s16(x); }
  static int32x4_t lanes(uint32x4_t x) { return vreinterpretq_s32_u32(x); }

  static F zero_f() { return set(0.0f); }
  static I zero_i() { return set_i(0); }
  static F set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void store(float* p, F x) {
    vst1q_f32(p, x.low);
    vst1q_f32(p + 4, x.high);
  }
  static I load_bytes(const void* p) {
    const int8_t* from = static_cast<const int8_t*>(p);
    return {lanes(vld1q_s8(from)), lanes(vld1q_s8(from + 16))};
  }
  static void store_bytes(void* p, I x) {
    int8_t* to = static_cast<int8_t*>(p);
    vst1q_s8(to, bytes(x.low));
    vst1q_s8(to + 16, bytes(x.high));
  }
  static void store_i(int32_t* p, I x) { store_bytes(p, x); }
  static I set_i(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
  static I load_u8(const uint8_t* p) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(p));
    return {lanes(vmovl_u16(vget_low_u16(wide))), lanes(vmovl_high_u16(wide))};
  }
  static I add_i(I a, I b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
  static I sub_i(I a, I b) { return {vsubq_s32(a.low, b.low), vsubq_s32(a.high, b.high)}; }
  static I mul_i(I a, I b) { return {vmulq_s32(a.low, b.low), vmulq_s32(a.high, b.high)}; }
  static I add_bytes(I sum, I x) { return dot4(sum, set_i(0x01010101), x); }
  static I broadcast4(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return set_i(four);
  }

  static F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static F mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static F div(F a, F b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
  static F fma(F a, F b, F c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
  // Not fmax and fmin: they take a bound of 0 over an x of -0.
  static F at_least(float bound, F x) {
    const float32x4_t b = vdupq_n_f32(bound);
    return each([=](float32x4_t v) { return vbslq_f32(vcltq_f32(v, b), b, v); }, x);
  }
  static F at_most(float bound, F x) {
    const float32x4_t b = vdupq_n_f32(bound);
    return each([=](float32x4_t v) { return vbslq_f32(vcgtq_f32(v, b), b, v); }, x);
  }
  static F abs(F x) { return {vabsq_f32(x.low), vabsq_f32(x.high)}; }
  static F negate(F x) { return {vnegq_f32(x.low), vnegq_f32(x.high)}; }
  static F copy_sign(F magnitude, F sign) {
    const uint32x4_t top = vdupq_n_u32(0x80000000u);
    return {vbslq_f32(top, sign.low, magnitude.low), vbslq_f32(top, sign.high, magnitude.high)};
  }
  static F round(F x) { return {vrndnq_f32(x.low), vrndnq_f32(x.high)}; }
  static F exp2_integer(F n) {
    const auto power = [](float32x4_t v) {
      const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(v), vdupq_n_s32(127));
      return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
    };
    return each(power, n);
  }
  static F to_float(I x) { return {vcvtq_f32_s32(x.low), vcvtq_f32_s32(x.high)}; }
  template <int Byte>
  static F byte_to_float(I x) {
    return to_float(each([](int32x4_t v) { return vshrq_n_s32(vshlq_n_s32(v, 24 - 8 * Byte), 24); }, x));
  }

  // sdot multiplies signed by signed bytes and adds four products in 32 bits: codes are taken as they are.
  static constexpr int32_t kWeightOffset = 0;
  static I load_weights(const uint8_t* p) { return load_bytes(p); }
  static I dot4(I sum, I w, I codes) {
    return {vdotq_s32(sum.low, bytes(w.low), bytes(codes.low)), vdotq_s32(sum.high, bytes(w.high), bytes(codes.high))};
  }

  static I split_bits(uint64_t word, int bits) {
    const I places = {{0, -1, -2, -3}, {-4, -5, -6, -7}};
    const uint32x4_t all = vdupq_n_u32(static_cast<uint32_t>(word)), mask = vdupq_n_u32((1u << bits) - 1);
    const auto cut = [=](int32x4_t at) { return lanes(vandq_u32(vshlq_u32(all, vmulq_n_s32(at, bits)), mask)); };
    return each(cut, places);
  }
  static I low_nibbles(I x) {
    return each([](int32x4_t v) { return vandq_s32(v, vdupq_n_s32(0x0f0f0f0f)); }, x);
  }
  static I high_nibbles(I x) {
    return each([](int32x4_t v) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4)); }, x);
  }
  template <int Shift>
  static F nibble_to_float(I x) {
    const auto nibble = [](int32x4_t v) {
      return lanes(vshrq_n_u32(vreinterpretq_u32_s32(vshlq_n_s32(v, 28 - Shift)), 28));
    };
    return to_float(each(nibble, x));
  }
  static constexpr int64_t kPartialQuads = 1 << 15;
  struct Partial {
    I lanes;
  };
  static int32_t code_of_partial(int32_t start) { return start; }
  static Partial start_partial(I code) { return {code}; }
  static Partial dot4_nibbles(Partial sum, I w, I a) { return {dot4(sum.lanes, w, a)}; }
  static I widen_partial(Partial p) { return p.lanes; }

  // The halves that dot2 multiplies stand apart: the first ones of all lanes in the low register, the second ones in
  // the high register. So a pair of weights times a pair of codes is one smlal by element for each.
  static I even_bytes(I x) { return widen(vuzp1q_s8(bytes(x.low), bytes(x.high))); }
  static I odd_bytes(I x) { return widen(vuzp2q_s8(bytes(x.low), bytes(x.high))); }
  // From two signed bytes per lane.
  static I widen(int8x16_t x) {
    const int16x8_t both = vreinterpretq_s16_s8(x);
    return {lanes(vshrq_n_s16(vshlq_n_s16(both, 8), 8)), lanes(vshrq_n_s16(both, 8))};
  }
  template <int Shift>
  static I nibbles_of_halves(I x) {
    const int8x16_t two = Shift < 8 ? vuzp1q_s8(bytes(x.low), bytes(x.high)) : vuzp2q_s8(bytes(x.low), bytes(x.high));
    const uint16x8_t both = vreinterpretq_u16_s8(two);
    const auto nibble = [](uint16x8_t v) { return vreinterpretq_s32_u16(vshrq_n_u16(v, 12)); };
    constexpr int kTop = 12 - Shift % 8;  // brings the first nibble to the top
    return {nibble(vshlq_n_u16(both, kTop)), nibble(vshlq_n_u16(both, kTop - 8))};
  }
  static I dot2(I sum, I w, I pair) {
    const int16x8_t first = vreinterpretq_s16_s32(w.low), second = vreinterpretq_s16_s32(w.high);
    const int16x4_t code = vget_low_s16(vreinterpretq_s16_s32(pair.low));
    sum.low = vmlal_lane_s16(sum.low, vget_low_s16(first), code, 0);
    sum.high = vmlal_high_lane_s16(sum.high, first, code, 0);
    return {vmlal_lane_s16(sum.low, vget_low_s16(second), code, 1), vmlal_high_lane_s16(sum.high, second, code, 1)};
  }

  static F load_bf16(const uint16_t* p) {
    const uint16x8_t x = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(x, 16))};
  }
  static F load_f16(const uint16_t* p) {
    const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(p));
    return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
  }
  static void store_bf16(uint16_t* p, F x) {
    const auto rounded = [](float32x4_t v) {
      const uint32x4_t word = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(word, 16), vdupq_n_u32(1));
      const uint32x4_t sum = vaddq_u32(word, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
      return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), sum, vdupq_n_u32(0x7fc00000u)), 16);
    };
    vst1_u16(p, rounded(x.low));
    vst1_u16(p + 4, rounded(x.high));
  }
  static void store_f16(uint16_t* p, F x) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high)));
  }

  static I max_magnitude_bits(I largest, F x) {
    const auto larger = [](int32x4_t a, float32x4_t v) { return vmaxq_s32(a, vreinterpretq_s32_f32(vabsq_f32(v))); };
    return each(larger, largest, x);
  }
  static int32_t reduce_max(I x) { return vmaxvq_s32(vmaxq_s32(x.low, x.high)); }
  static int32_t reduce_add(I x) { return vaddvq_s32(vaddq_s32(x.low, x.high)); }
  // Eight signed halves.
  static int16x8_t rounded(F x, F scale) {
    const I q = each([](float32x4_t v, float32x4_t s) { return vcvtnq_s32_f32(vmulq_f32(v, s)); }, x, scale);
    return vmovn_high_s32(vmovn_s32(q.low), q.high);
  }
  static I codes(const F (&x)[4], F scale) {
    const auto narrow = [&](int i) {
      return lanes(vmovn_high_s16(vmovn_s16(rounded(x[i], scale)), rounded(x[i + 1], scale)));
    };
    return {narrow(0), narrow(2)};
  }
  static I wide_codes(F low, F high, F scale) { return {lanes(rounded(low, scale)), lanes(rounded(high, scale))}; }
  static I swap_middle(I x) {
    const uint8x16_t order = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
    return each([=](int32x4_t v) { return lanes(vqtbl1q_s8(bytes(v), order)); }, x);
  }
};

}  // namespace
