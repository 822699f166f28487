// Elements of the types of dtypes.h from and to double, in plain arithmetic.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtypes.h"

using pyengine::DType;

inline bool is_float(DType type) { return type <= DType::kFloat16; }

inline float float_of_bits(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}

inline double half_to_double(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                          : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

// Towards zero; NaN and infinity stay what they are.
inline uint16_t half_of_double(double value) {
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (value != value) return 0x7e00;
  if (std::isinf(value)) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude >= 65504) return static_cast<uint16_t>(sign | 0x7bff);
  if (magnitude < 0x1p-14) return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, 24)));
  const int exponent = std::ilogb(magnitude);
  const int leading = static_cast<int>(std::ldexp(magnitude, 10 - exponent));  // 1024 to 2047
  return static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + leading));
}

inline double element(DType type, const void* array, int64_t i) {
  const char* at = static_cast<const char*>(array) + i * pyengine::element_size(type);
  uint32_t word = 0;
  std::memcpy(&word, at, static_cast<size_t>(pyengine::element_size(type)));
  switch (type) {
    case DType::kFloat32:
      return float_of_bits(word);
    case DType::kBFloat16:
      return float_of_bits(word << 16);
    case DType::kFloat16:
      return half_to_double(static_cast<uint16_t>(word));
    case DType::kInt8:
      return static_cast<int8_t>(word);
    case DType::kInt16:
      return static_cast<int16_t>(word);
    default:
      return static_cast<int32_t>(word);
  }
}

// Of floats the bits that do not fit are cut off.
inline void set_element(DType type, void* array, int64_t i, double value) {
  char* at = static_cast<char*>(array) + i * pyengine::element_size(type);
  const float single = static_cast<float>(value);
  const uint32_t word = type == DType::kFloat32    ? bits_of_float(single)
                        : type == DType::kBFloat16 ? bits_of_float(single) >> 16
                        : type == DType::kFloat16  ? half_of_double(value)
                                                   : static_cast<uint32_t>(static_cast<int32_t>(value));
  std::memcpy(at, &word, static_cast<size_t>(pyengine::element_size(type)));
}
