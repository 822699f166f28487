// The primitives that kernels are templates on, in plain C++: the statement of what each one computes, and the path
// for processors without a file of their own. A vector is kLanes 32-bit lanes, 4, 8 or 16 of them: here 8.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Simd {
  static constexpr int kLanes = 8;
  // Rows and panels of a tile, as many as the registers hold: of int8 with int8 activations, of the other kernels with
  // integer activations; and rows with float ones.
  static constexpr int kByteRows = 2, kBytePanels = 2, kTileRows = 4, kTilePanels = 1, kFloatRows = 6;
  struct F {
    float lane[8];
  };
  struct I {
    int32_t lane[8];
  };

  template <class Function>
  static F each(Function f) {
    F y;
    for (int i = 0; i < 8; i++) y.lane[i] = f(i);
    return y;
  }
  static int byte_of(int32_t word, int index) { return static_cast<int8_t>(static_cast<uint32_t>(word) >> (8 * index)); }
  static int half_of(int32_t word, int index) {
    return static_cast<int16_t>(static_cast<uint32_t>(word) >> (16 * index));
  }
  static int32_t halves(int low, int high) {
    return static_cast<int32_t>(static_cast<uint16_t>(low) | static_cast<uint32_t>(high) << 16);
  }
  template <class To, class From>
  static To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
  }

  static F zero_f() { return F{}; }
  static I zero_i() { return I{}; }
  static F set(float x) {
    return each([&](int) { return x; });
  }
  static F load(const float* p) { return each([&](int i) { return p[i]; }); }
  static void store(float* p, F x) { std::memcpy(p, x.lane, sizeof(x)); }
  static I load_bytes(const void* p) {
    I y;
    std::memcpy(y.lane, p, sizeof(y));
    return y;
  }
  static void store_i(int32_t* p, I x) { std::memcpy(p, x.lane, sizeof(x)); }
  static I set_i(int32_t x) {
    I y;
    for (int i = 0; i < 8; i++) y.lane[i] = x;
    return y;
  }
  static void store_bytes(void* p, I x) { std::memcpy(p, x.lane, sizeof(x)); }
  // kLanes unsigned bytes, one per lane.
  static I load_u8(const uint8_t* p) {
    I y;
    for (int i = 0; i < 8; i++) y.lane[i] = p[i];
    return y;
  }
  static I sub_i(I a, I b) {
    for (int i = 0; i < 8; i++) a.lane[i] -= b.lane[i];
    return a;
  }
  static I mul_i(I a, I b) {
    for (int i = 0; i < 8; i++) a.lane[i] *= b.lane[i];
    return a;
  }
  // sum + the four signed bytes of each lane.
  static I add_bytes(I sum, I x) {
    for (int i = 0; i < 8; i++)
      for (int b = 0; b < 4; b++) sum.lane[i] += byte_of(x.lane[i], b);
    return sum;
  }
  static I add_i(I a, I b) {
    for (int i = 0; i < 8; i++) a.lane[i] += b.lane[i];
    return a;
  }
  // The same four bytes in each lane.
  static I broadcast4(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    I y;
    for (int i = 0; i < 8; i++) y.lane[i] = word;
    return y;
  }

  static F add(F a, F b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static F mul(F a, F b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
  static F div(F a, F b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
  // a * b + c, in one or two roundings.
  static F fma(F a, F b, F c) { return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
  // max(bound, x) and min(bound, x); a NaN in x stays a NaN.
  static F at_least(float bound, F x) { return each([&](int i) { return x.lane[i] < bound ? bound : x.lane[i]; }); }
  static F at_most(float bound, F x) { return each([&](int i) { return x.lane[i] > bound ? bound : x.lane[i]; }); }
  static F abs(F x) { return each([&](int i) { return std::fabs(x.lane[i]); }); }
  static F negate(F x) { return each([&](int i) { return -x.lane[i]; }); }
  static F copy_sign(F magnitude, F sign) {
    return each([&](int i) { return std::copysign(magnitude.lane[i], sign.lane[i]); });
  }
  // Half to even, for |x| < 2^22: the sum has no bits left for a fraction.
  static F round(F x) { return each([&](int i) { return (x.lane[i] + 12582912.0f) - 12582912.0f; }); }
  // 2^n for a whole n in [-126, 127], infinity for 128; anything for a NaN.
  static F exp2_integer(F n) {
    return each([&](int i) {
      const int32_t exponent = n.lane[i] == n.lane[i] ? static_cast<int32_t>(n.lane[i]) : 0;
      return bits<float>((exponent + 127) << 23);
    });
  }
  static F to_float(I x) { return each([&](int i) { return static_cast<float>(x.lane[i]); }); }
  // Signed byte number `Byte` of each lane.
  template <int Byte>
  static F byte_to_float(I x) {
    return each([&](int i) { return static_cast<float>(byte_of(x.lane[i], Byte)); });
  }

  // kLanes times four weights of int8 as dot4 wants them, which is kWeightOffset too large.
  static constexpr int32_t kWeightOffset = 0;
  static I load_weights(const uint8_t* p) { return load_bytes(p); }
  // sum + the sum over the four bytes of each lane of w, from load_weights, times a code in [-127, 127].
  static I dot4(I sum, I w, I codes) {
    for (int i = 0; i < 8; i++)
      for (int b = 0; b < 4; b++) sum.lane[i] += byte_of(w.lane[i], b) * byte_of(codes.lane[i], b);
    return sum;
  }

  // kLanes numbers of `bits` <= 4 bits, from the lowest up.
  static I split_bits(uint64_t word, int bits) {
    I y;
    for (int i = 0; i < 8; i++) y.lane[i] = static_cast<int32_t>(word >> (i * bits) & ((1u << bits) - 1));
    return y;
  }
  // The low, and the high, four bits of each byte.
  static I low_nibbles(I x) {
    for (int i = 0; i < 8; i++) x.lane[i] &= 0x0f0f0f0f;
    return x;
  }
  static I high_nibbles(I x) {
    for (int i = 0; i < 8; i++) x.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(x.lane[i]) >> 4 & 0x0f0f0f0fu);
    return x;
  }
  // The four bits from bit Shift on of each lane.
  template <int Shift>
  static F nibble_to_float(I x) {
    return each([&](int i) { return static_cast<float>(static_cast<uint32_t>(x.lane[i]) >> Shift & 15u); });
  }
  // A sum over at most kPartialQuads calls of dot4_nibbles, in whatever form is cheap: per lane, four products of a byte
  // of w in [0, 15] and a signed byte of a in [-127, 127] each. It starts with -zero times the sum of these a, zero <= 8,
  // which is given to all lanes as code_of_partial() of it; or with 0.
  static constexpr int64_t kPartialQuads = 1 << 15;
  struct Partial {
    I lanes;
  };
  static int32_t code_of_partial(int32_t start) { return start; }
  static Partial start_partial(I code) { return {code}; }
  static Partial dot4_nibbles(Partial sum, I w, I a) {
    for (int i = 0; i < 8; i++)
      for (int b = 0; b < 4; b++) sum.lanes.lane[i] += byte_of(w.lane[i], b) * byte_of(a.lane[i], b);
    return sum;
  }
  static I widen_partial(Partial p) { return p.lanes; }

  // The signed bytes 0 and 2, and the signed bytes 1 and 3, of each lane as two signed halves, as dot2 wants them.
  static I even_bytes(I x) {
    for (int i = 0; i < 8; i++) x.lane[i] = halves(byte_of(x.lane[i], 0), byte_of(x.lane[i], 2));
    return x;
  }
  static I odd_bytes(I x) {
    for (int i = 0; i < 8; i++) x.lane[i] = halves(byte_of(x.lane[i], 1), byte_of(x.lane[i], 3));
    return x;
  }
  // The four bits from bit Shift on of each half of each lane, likewise.
  template <int Shift>
  static I nibbles_of_halves(I x) {
    for (int i = 0; i < 8; i++)
      x.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(x.lane[i]) >> Shift & 0x000f000fu);
    return x;
  }
  // sum + the exact sum of the two products of signed halves of each lane, where `pair` is the same in each; not for
  // -32768 four times.
  static I dot2(I sum, I w, I pair) {
    for (int i = 0; i < 8; i++)
      for (int h = 0; h < 2; h++) sum.lane[i] += half_of(w.lane[i], h) * half_of(pair.lane[i], h);
    return sum;
  }

  static F load_bf16(const uint16_t* p) {
    return each([&](int i) { return bits<float>(static_cast<uint32_t>(p[i]) << 16); });
  }
  static F load_f16(const uint16_t* p) {
    return each([&](int i) {
      const uint32_t sign = (p[i] & 0x8000u) << 16, exponent = (p[i] >> 10) & 31u, mantissa = p[i] & 0x3ffu;
      if (exponent == 31) return bits<float>(sign | 0x7f800000u | mantissa << 13);
      if (exponent) return bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
      const float value = static_cast<float>(mantissa) * 0x1p-24f;  // a denormal half
      return bits<float>(bits<uint32_t>(value) | sign);
    });
  }
  // Half to even; a NaN becomes the quiet NaN.
  static void store_bf16(uint16_t* p, F x) {
    for (int i = 0; i < 8; i++) {
      const uint32_t word = bits<uint32_t>(x.lane[i]);
      p[i] = x.lane[i] != x.lane[i] ? 0x7fc0 : static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
    }
  }
  static void store_f16(uint16_t* p, F x) {
    for (int i = 0; i < 8; i++) {
      const uint32_t word = bits<uint32_t>(x.lane[i]), magnitude = word & 0x7fffffffu;
      uint32_t half;
      if (magnitude > 0x7f800000u) {
        half = 0x7e00;
      } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        half = 0x7c00;
      } else if (magnitude >= 0x38800000u) {  // normal halves
        half = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
      } else {  // denormal halves: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        half = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
      }
      p[i] = static_cast<uint16_t>(half | (word >> 16 & 0x8000u));
    }
  }

  // The larger of each lane and the bits of |x|: they order as the values do, with infinity and NaN on top.
  static I max_magnitude_bits(I largest, F x) {
    for (int i = 0; i < 8; i++) {
      const int32_t magnitude = bits<int32_t>(x.lane[i]) & 0x7fffffff;
      if (magnitude > largest.lane[i]) largest.lane[i] = magnitude;
    }
    return largest;
  }
  static int32_t reduce_max(I x) {
    int32_t largest = x.lane[0];
    for (int i = 1; i < 8; i++) largest = x.lane[i] > largest ? x.lane[i] : largest;
    return largest;
  }
  static int32_t reduce_add(I x) {
    int32_t sum = 0;
    for (int i = 0; i < 8; i++) sum += x.lane[i];
    return sum;
  }
  // 4 * kLanes signed bytes q = round-half-even(x * scale), where |x * scale| < 127.5.
  static I codes(const F (&x)[4], F scale) {
    int8_t q[32];
    for (int i = 0; i < 32; i++) q[i] = static_cast<int8_t>(round(mul(x[i / 8], scale)).lane[i % 8]);
    return load_bytes(q);
  }
  // 2 * kLanes signed halves q = round-half-even(x * scale), where |x * scale| < 32767.5.
  static I wide_codes(F low, F high, F scale) {
    int16_t q[16];
    for (int i = 0; i < 16; i++) q[i] = static_cast<int16_t>(round(mul(i < 8 ? low : high, scale)).lane[i % 8]);
    return load_bytes(q);
  }
  // Of every four halves, the middle two change places.
  static I swap_middle(I x) {
    for (int i = 0; i < 8; i += 2) {
      const int32_t first = x.lane[i], second = x.lane[i + 1];
      x.lane[i] = halves(half_of(first, 0), half_of(second, 0));
      x.lane[i + 1] = halves(half_of(first, 1), half_of(second, 1));
    }
    return x;
  }
};

}  // namespace
