#include <immintrin.h>

#include "limits/read.inc"

namespace pyengine {
namespace {

// The compiler must take the value for a new one: what it knows to be the same it would compute once.
template <class Vector>
void renew(Vector& value) {
  asm volatile("" : "+x"(value));
}

// Eight chains of additions, enough to hide the latency of one: Step::add puts kMacs products onto a sum.
template <class Step>
int64_t chains(const LimitArgs& args) {
  using Vector = typename Step::Vector;
  Vector a{}, b{}, sum[8] = {};
  renew(b);
  for (int64_t round = 0; round < args.rounds; round++)
    for (Vector& each : sum) {
      each = Step::add(each, a, b);
      renew(each);
    }
  return args.rounds * 8 * Step::kMacs;
}

struct Fma {
  using Vector = __m256;
  static constexpr int64_t kMacs = 8;
  static Vector add(Vector sum, Vector& a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
};

struct Integer {
  using Vector = __m256i;
  static Vector bytes(Vector& a, Vector b) {
    renew(a);
    return _mm256_maddubs_epi16(a, b);
  }
  static Vector widened(Vector x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
};

struct Int16Dot2 : Integer {
  static constexpr int64_t kMacs = 16;
  static Vector add(Vector sum, Vector& a, Vector b) {
    renew(a);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  }
};

struct Int8Dot4 : Integer {
  static constexpr int64_t kMacs = 32;
  static Vector add(Vector sum, Vector& a, Vector b) { return _mm256_add_epi32(sum, widened(bytes(a, b))); }
};

struct Int8PairSum : Integer {
  static constexpr int64_t kMacs = 64;
  static Vector add(Vector sum, Vector& a, Vector b) {
    return _mm256_add_epi32(sum, widened(_mm256_add_epi16(bytes(a, b), bytes(a, b))));
  }
};

struct Int4Sum16 : Integer {
  static constexpr int64_t kMacs = 32;
  static Vector add(Vector sum, Vector& a, Vector b) { return _mm256_add_epi16(sum, bytes(a, b)); }
};

struct Lines {
  __m256i half0 = _mm256_setzero_si256(), half1 = _mm256_setzero_si256();
  void read(const uint8_t* p) {
    const __m256i* line = reinterpret_cast<const __m256i*>(p);
    half0 = _mm256_or_si256(half0, _mm256_loadu_si256(line));
    half1 = _mm256_or_si256(half1, _mm256_loadu_si256(line + 1));
  }
  void keep() {
    renew(half0);
    renew(half1);
  }
};

}  // namespace

int64_t limit_fma_avx2(const LimitArgs& args) { return chains<Fma>(args); }
int64_t limit_int16_dot2_avx2(const LimitArgs& args) { return chains<Int16Dot2>(args); }
int64_t limit_int8_dot4_avx2(const LimitArgs& args) { return chains<Int8Dot4>(args); }
int64_t limit_int8_pair_sum_avx2(const LimitArgs& args) { return chains<Int8PairSum>(args); }
int64_t limit_int4_sum16_avx2(const LimitArgs& args) { return chains<Int4Sum16>(args); }

int64_t limit_read_avx2(const LimitArgs& args) { return read_streams<Lines>(args); }

}  // namespace pyengine
