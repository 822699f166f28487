// Functions of vectors that are the same on every instruction set. Include after one of the simd/<isa>.h files.
#pragma once
#include "dtypes.h"

namespace {

using pyengine::Activation;
using pyengine::DType;
using pyengine::element_size;

// c[0] x^(n-1) + ... + c[n-1], by Horner's rule.
template <int n>
inline Simd::F polynomial(Simd::F x, const float (&c)[n]) {
  Simd::F p = Simd::set(c[0]);
  for (int i = 1; i < n; i++) p = Simd::fma(p, x, Simd::set(c[i]));
  return p;
}

// exp(x) to about 2 ulp, infinity above 88.8; x below -87 counts as -87 (Cephes expf: n ln 2 is taken off in two parts).
inline Simd::F exp(Simd::F x) {
  x = Simd::at_most(89.0f, Simd::at_least(-87.0f, x));
  const Simd::F n = Simd::round(Simd::mul(x, Simd::set(1.44269504f)));
  Simd::F r = Simd::fma(n, Simd::set(-0.693359375f), x);
  r = Simd::fma(n, Simd::set(2.12194440e-4f), r);
  constexpr float kTail[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                             4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const Simd::F value = Simd::fma(polynomial(r, kTail), Simd::mul(r, r), Simd::add(r, Simd::set(1.0f)));
  return Simd::mul(value, Simd::exp2_integer(n));
}

// x (1 + erf(x / sqrt 2)) / 2, with erf within 1.5e-7 (Abramowitz and Stegun 7.1.26).
inline Simd::F gelu(Simd::F x) {
  const Simd::F z = Simd::mul(Simd::abs(x), Simd::set(0.70710678f));
  const Simd::F t = Simd::div(Simd::set(1.0f), Simd::fma(Simd::set(0.3275911f), z, Simd::set(1.0f)));
  constexpr float kErf[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  const Simd::F tail = Simd::mul(Simd::mul(polynomial(t, kErf), t), exp(Simd::mul(Simd::mul(z, z), Simd::set(-1.0f))));
  const Simd::F erf = Simd::copy_sign(Simd::fma(tail, Simd::set(-1.0f), Simd::set(1.0f)), x);
  return Simd::mul(Simd::mul(x, Simd::set(0.5f)), Simd::add(erf, Simd::set(1.0f)));
}

// x / (1 + exp(-x)).
inline Simd::F silu(Simd::F x) {
  return Simd::div(x, Simd::add(Simd::set(1.0f), exp(Simd::mul(x, Simd::set(-1.0f)))));
}

inline Simd::F activate(Activation activation, Simd::F x) {
  switch (activation) {
    case Activation::kRelu:
      return Simd::at_least(0.0f, x);
    case Activation::kGelu:
      return gelu(x);
    case Activation::kSilu:
      return silu(x);
    default:
      return x;
  }
}

// A vector of floats from, and to, elements of a float type.
inline Simd::F load_as(DType type, const void* p) {
  switch (type) {
    case DType::kBFloat16:
      return Simd::load_bf16(static_cast<const uint16_t*>(p));
    case DType::kFloat16:
      return Simd::load_f16(static_cast<const uint16_t*>(p));
    default:
      return Simd::load(static_cast<const float*>(p));
  }
}

inline void store_as(DType type, void* p, Simd::F x) {
  switch (type) {
    case DType::kBFloat16:
      return Simd::store_bf16(static_cast<uint16_t*>(p), x);
    case DType::kFloat16:
      return Simd::store_f16(static_cast<uint16_t*>(p), x);
    default:
      return Simd::store(static_cast<float*>(p), x);
  }
}

// The first `count` < Simd::kLanes of them; the rest of the vector is 0 and is not stored.
inline Simd::F load_part_as(DType type, const void* p, int64_t count) {
  alignas(64) char part[4 * Simd::kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(count * element_size(type)));
  return load_as(type, part);
}

inline void store_part_as(DType type, void* p, Simd::F x, int64_t count) {
  alignas(64) char part[4 * Simd::kLanes];
  store_as(type, part, x);
  std::memcpy(p, part, static_cast<size_t>(count * element_size(type)));
}

}  // namespace
