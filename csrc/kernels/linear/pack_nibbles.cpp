#include <algorithm>
#include <cstring>

#include "kernels/linear/nibbles.h"
#include "parallel.h"

namespace pyengine {
namespace {

constexpr int kQuads = 4 * kPanel;  // bytes of 16 columns, 8 codes each
constexpr int64_t kBlock = 256;     // eights along K: their part of a panel stays in the first-level cache

// `count` bytes of a bitstream.
inline uint64_t load_word(const uint8_t* from, int64_t count) {
  uint64_t word = 0;
  for (int64_t i = 0; i < count; i++) word |= static_cast<uint64_t>(from[i]) << 8 * i;
  return word;
}

// Eight codes fill `bits` whole bytes. At the end of a row there may be fewer of both.
int64_t octet_bytes(int64_t K, int64_t octet, int bits) {
  return ((std::min<int64_t>(8, K - 8 * octet)) * bits + 7) / 8;
}

// From eight codes side by side to the four bytes of the layout: each code into a byte of its own, by halves; then the
// last four above the first four.
template <int kBits>
uint32_t spread(uint64_t word, int shift) {
  constexpr uint64_t kFour = (1u << 4 * kBits) - 1, kTwo = (1u << 2 * kBits) - 1, kOne = (1u << kBits) - 1;
  word = (word & kFour) | (word >> 4 * kBits & kFour) << 32;
  word = (word & kTwo * 0x100000001) | (word >> 2 * kBits & kTwo * 0x100000001) << 16;
  word = (word & kOne * 0x1000100010001) | (word >> kBits & kOne * 0x1000100010001) << 8;
  word <<= shift;
  return static_cast<uint32_t>(word | word >> 28);
}

// Eights [begin, end) of a row into its column of a panel.
template <int kBits>
void pack_column(const uint8_t* row, int64_t K, int64_t begin, int64_t end, int shift, uint8_t* column) {
  uint32_t quads[kBlock];
  const int64_t whole = std::min(end, K / 8);
  for (int64_t octet = begin; octet < whole; octet++)
    quads[octet - begin] = spread<kBits>(load_word(row + octet * kBits, kBits), shift);
  if (whole < end)
    quads[whole - begin] = spread<kBits>(load_word(row + whole * kBits, octet_bytes(K, whole, kBits)), shift);
  for (int64_t octet = begin; octet < end; octet++) std::memcpy(column + octet * kQuads, quads + (octet - begin), 4);
}

}  // namespace

void pack_nibbles(const uint8_t* qdata, int64_t N, int64_t K, int bits, int shift, uint8_t* codes) {
  const int64_t panels = (N + kPanel - 1) / kPanel, octets = (K + 7) / 8, row_bytes = (K * bits + 7) / 8;
  constexpr decltype(&pack_column<1>) kByBits[] = {pack_column<1>, pack_column<2>, pack_column<3>, pack_column<4>};
  const auto pack = kByBits[bits - 1];
  parallel_for(panels, 1 + (1 << 16) / (kPanel * (K + 1)), [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      uint8_t* panel = codes + p * octets * kQuads;
      const int64_t columns = std::min(kPanel, N - p * kPanel);
      if (columns < kPanel) std::memset(panel, 0, static_cast<size_t>(octets * kQuads));
      for (int64_t octet = 0; octet < octets; octet += kBlock)
        for (int64_t column = 0; column < columns; column++)
          pack(qdata + (p * kPanel + column) * row_bytes, K, octet, std::min(octets, octet + kBlock), shift,
               panel + 4 * column);
    }
  });
}

void unpack_nibbles(const uint8_t* codes, int64_t N, int64_t K, int bits, int shift, uint8_t* qdata) {
  const int64_t octets = (K + 7) / 8, row_bytes = (K * bits + 7) / 8;
  for (int64_t n = 0; n < N; n++) {
    const uint8_t* column = codes + n / kPanel * octets * 4 * kPanel + n % kPanel * 4;
    for (int64_t octet = 0; octet < octets; octet++) {
      uint32_t quad;
      std::memcpy(&quad, column + octet * 4 * kPanel, 4);
      uint64_t word = 0;
      for (int i = 0; i < 4; i++) {
        word |= static_cast<uint64_t>((quad >> (8 * i) & 15) >> shift) << (i * bits);
        word |= static_cast<uint64_t>((quad >> (8 * i + 4) & 15) >> shift) << ((i + 4) * bits);
      }
      std::memcpy(qdata + n * row_bytes + octet * bits, &word, static_cast<size_t>(octet_bytes(K, octet, bits)));
    }
  }
}

}  // namespace pyengine
