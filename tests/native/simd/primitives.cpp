// Compares the primitives of one instruction set, the header PYENGINE_SIMD, with those of portable.h on random and on
// hostile numbers. Prints the names of those that differ, and then exits with 1.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace portable {
#include "simd/portable.h"
}
#include PYENGINE_SIMD

namespace {

constexpr int kCount = 64;  // elements of an array: whole vectors, whatever their width
constexpr int kColumns = 16;

struct Inputs {
  float x[kCount], y[kCount];           // any bits
  float small[kCount], whole[kCount];   // |small| < 127.5; whole numbers in [-126, 128]
  int32_t i[kCount], j[kCount];         // any bits
  uint16_t half[kCount];                // any bits
  uint8_t bytes[4 * kCount];            // any bits
  int8_t codes[kCount];                 // in [-127, 127]
  int16_t wide[kCount];                 // in [-32767, 32767]
};

// What the primitives make of the inputs, by name.
using Results = std::map<std::string, std::vector<uint32_t>>;

template <class S, class = void>
constexpr bool kDotsBytes = false;
template <class S>
constexpr bool kDotsBytes<S, std::void_t<decltype(&S::load_weights)>> = true;

template <class S>
class Run {
  using F = typename S::F;
  using I = typename S::I;

 public:
  explicit Run(const Inputs& in) : in_(in) {}

  Results results() {
    for (int n = 0; n < kCount; n += S::kLanes) by_lane(n);
    for (int n = 0; n < kCount; n += 4 * S::kLanes) {
      F x[4];
      for (int q = 0; q < 4; q++) x[q] = S::load(in_.small + n + q * S::kLanes);
      put("codes", S::codes(x, S::set(1.0f)));
      put("wide_codes", S::wide_codes(x[0], x[1], S::set(257.0f)));
      put("wide_codes", S::wide_codes(x[2], x[3], S::set(257.0f)));
    }
    quads();
    halves();
    return out_;
  }

 private:
  const Inputs& in_;
  Results out_;

  void put(const std::string& name, I x) {
    uint32_t lane[S::kLanes];
    S::store_bytes(lane, x);
    out_[name].insert(out_[name].end(), lane, lane + S::kLanes);
  }
  // One NaN is as good as another, and a zero as good as the other where `zeros` says so.
  void put(const std::string& name, F x, bool zeros = false) {
    float lane[S::kLanes];
    S::store(lane, x);
    for (float value : lane) {
      if (value != value) value = NAN;
      if (zeros && value == 0) value = 0;
      uint32_t word;
      std::memcpy(&word, &value, 4);
      out_[name].push_back(word);
    }
  }
  void put(const std::string& name, int32_t x) { out_[name].push_back(static_cast<uint32_t>(x)); }

  void by_lane(int n) {
    const F x = S::load(in_.x + n), y = S::load(in_.y + n);
    const F small = S::load(in_.small + n), whole = S::load(in_.whole + n);
    const I i = S::load_bytes(in_.i + n), j = S::load_bytes(in_.j + n);
    put("add", S::add(x, y));
    put("mul", S::mul(x, y));
    put("div", S::div(x, y));
    put("fma", S::fma(small, whole, whole));
    put("at_least", S::at_least(0.0f, x));
    put("at_most", S::at_most(0.0f, x));
    put("abs", S::abs(x));
    put("negate", S::negate(x));
    put("copy_sign", S::copy_sign(x, y));
    put("round", S::round(small), true);
    put("exp2_integer", S::exp2_integer(whole));
    put("to_float", S::to_float(i));
    put("add_i", S::add_i(i, j));
    put("sub_i", S::sub_i(i, j));
    put("mul_i", S::mul_i(i, j));
    put("load_u8", S::load_u8(in_.bytes + n));
    if constexpr (S::kLanes == 8)  // of embeddings, which take eight codes at a time
      for (int bits = 1; bits <= 4; bits++) {
        uint64_t word;
        std::memcpy(&word, in_.bytes + n * bits / 8, 8);
        put("split_bits", S::split_bits(word, bits));
      }
    put("byte_to_float", S::template byte_to_float<0>(i));
    put("byte_to_float", S::template byte_to_float<1>(i));
    put("byte_to_float", S::template byte_to_float<2>(i));
    put("byte_to_float", S::template byte_to_float<3>(i));
    put("low_nibbles", S::low_nibbles(i));
    put("high_nibbles", S::high_nibbles(i));
    put("nibble_to_float", S::template nibble_to_float<0>(i));
    put("nibble_to_float", S::template nibble_to_float<4>(i));
    put("nibble_to_float", S::template nibble_to_float<28>(i));
    put("max_magnitude_bits", S::max_magnitude_bits(S::max_magnitude_bits(S::zero_i(), x), y));
    put("load_bf16", S::load_bf16(in_.half + n));
    put("load_f16", S::load_f16(in_.half + n));
    put("swap_middle", S::swap_middle(i));
    uint16_t half[S::kLanes];
    S::store_bf16(half, x);
    put("store_bf16", S::load_bf16(half));
    S::store_f16(half, x);
    put("store_f16", S::load_f16(half));
  }

  // Sums over all codes of a row, and over its nibbles, for kColumns columns.
  void quads() {
    I of_bytes = S::zero_i(), largest = S::zero_i();
    for (int n = 0; n < kCount; n += 4 * S::kLanes) of_bytes = S::add_bytes(of_bytes, S::load_bytes(in_.codes + n));
    for (int n = 0; n < kCount; n += S::kLanes) largest = S::max_magnitude_bits(largest, S::load(in_.x + n));
    put("reduce_max", S::reduce_max(largest));
    put("add_bytes", S::reduce_add(of_bytes));
    for (int column = 0; column < kColumns; column += S::kLanes) {
      const uint8_t* any = in_.bytes + 4 * column;
      put("dot4", sum_of_products(any));
      int32_t sum = 0;
      for (int k = 0; k < 32; k++) sum += in_.codes[k];
      typename S::Partial nibbles = S::start_partial(S::set_i(S::code_of_partial(-8 * sum)));
      for (int k = 0; k < 32; k += 8) {  // a partial sum holds eight products
        nibbles = S::dot4_nibbles(nibbles, S::low_nibbles(S::load_bytes(any)), S::broadcast4(in_.codes + k));
        nibbles = S::dot4_nibbles(nibbles, S::high_nibbles(S::load_bytes(any)), S::broadcast4(in_.codes + k + 4));
      }
      put("dot4_nibbles", S::widen_partial(nibbles));
    }
  }

  // Each quad of codes times the same weights, with the primitives that the instruction set has.
  I sum_of_products(const uint8_t* weights) {
    I sum = S::zero_i();
    if constexpr (kDotsBytes<S>) {
      int32_t total = 0;
      for (int k = 0; k < kCount; k += 4) {
        sum = S::dot4(sum, S::load_weights(weights), S::broadcast4(in_.codes + k));
        for (int i = 0; i < 4; i++) total += in_.codes[k + i];
      }
      return S::add_i(sum, S::set_i(-S::kWeightOffset * total));
    } else {
      I negative = S::zero_i();
      uint8_t row[2 * kCount];
      for (int n = 0; n < kCount; n += 4 * S::kLanes)
        negative = S::store_signs_and_magnitudes(negative, S::load_bytes(in_.codes + n), row + 2 * n);
      for (int k = 0; k < 2 * kCount; k += 8) {
        const I flipped = S::flip(S::load_bytes(weights), S::broadcast4(row + k));
        sum = S::add_widened(sum, S::products(S::broadcast4(row + k + 4), flipped));
      }
      return S::add_i(sum, S::set_i(S::reduce_add(negative)));
    }
  }

  void halves() {
    I total = S::zero_i();
    for (int n = 0; n < kCount; n += 2 * S::kLanes)
      total = S::dot2(total, S::load_bytes(in_.wide + n), S::set_i(0x00010001));
    put("dot2", S::reduce_add(total));
    for (int n = 0; n < kCount; n += S::kLanes) {
      const I i = S::load_bytes(in_.i + n), j = S::load_bytes(in_.j + n);
      for (int pair = 0; pair < kCount; pair += 2) {
        const I codes = S::broadcast4(in_.wide + pair);
        put("even_bytes", S::dot2(j, S::even_bytes(i), codes));
        put("odd_bytes", S::dot2(j, S::odd_bytes(i), codes));
        put("nibbles_of_halves", S::dot2(j, S::template nibbles_of_halves<0>(i), codes));
        put("nibbles_of_halves", S::dot2(j, S::template nibbles_of_halves<4>(i), codes));
        put("nibbles_of_halves", S::dot2(j, S::template nibbles_of_halves<8>(i), codes));
        put("nibbles_of_halves", S::dot2(j, S::template nibbles_of_halves<12>(i), codes));
      }
    }
  }
};

template <class T, size_t kSize>
void fill(std::mt19937& random, T (&values)[kSize]) {
  for (T& value : values) {
    const uint32_t word = static_cast<uint32_t>(random());
    std::memcpy(&value, &word, sizeof(value));
  }
}

Inputs inputs(std::mt19937& random) {
  // Zeros, denormals, the limits of float16 and bfloat16 and what rounds to them, infinities and a NaN.
  constexpr float kHostile[] = {0.0f,       -0.0f,     0x1p-149f, -0x1p-130f, 0x1p-24f,  0x1p-25f, 0x1.8p-25f, 65504.0f,
                                65519.9f,   -65520.0f, 0x1.01p0f, INFINITY,   -INFINITY, NAN,      -NAN,
                                3.402823e38f};
  // Each keeps the bound of panels.h with any of the others.
  Inputs in;
  fill(random, in.x);
  fill(random, in.y);
  fill(random, in.i);
  fill(random, in.j);
  fill(random, in.half);
  fill(random, in.bytes);
  const bool is_signed = random() % 2;
  for (int n = 0; n < kCount; n++) {
    if (random() % 2) in.x[n] = kHostile[random() % 16];
    if (random() % 2) in.y[n] = kHostile[random() % 16];
    if (random() % 4 == 0) std::memset(in.bytes + 4 * n, random() % 2 ? -128 : 127, 4);
    in.small[n] = static_cast<float>(static_cast<int>(random() % 1017) - 508) / 4;  // halves round to even
    in.whole[n] = static_cast<float>(static_cast<int>(random() % 255) - 126);
    const int code = random() % 4 ? static_cast<int>(random() % 128) : 127;
    in.codes[n] = static_cast<int8_t>(is_signed && random() % 2 ? -code : code);
    in.wide[n] = static_cast<int16_t>(random() % 4 ? static_cast<int>(random() % 65535) - 32767 : -32767);
  }
  return in;
}

}  // namespace

int main() {
  std::mt19937 random(0);
  std::map<std::string, int> differ;
  for (int round = 0; round < 300; round++) {
    const Inputs in = inputs(random);
    const Results expected = Run<portable::Simd>(in).results(), actual = Run<Simd>(in).results();
    for (const auto& [name, values] : actual) differ[name] += expected.at(name) != values;
  }
  int failures = 0;
  for (const auto& [name, count] : differ) {
    if (count) std::printf("%s differs in %d of 300 rounds\n", name.c_str(), count);
    failures += count > 0;
  }
  std::printf("%zu primitives, %d of them differ from portable.h\n", differ.size(), failures);
  return failures > 0;
}
