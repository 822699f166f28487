#include <algorithm>
#include <cstring>

#include "kernels/linear/nibbles.h"
#include "parallel.h"

namespace pyengine {
namespace {

// Eight codes fill `bits` whole bytes. At the end of a row there may be fewer of both.
int64_t octet_bytes(int64_t K, int64_t octet, int bits) {
  return ((std::min<int64_t>(8, K - 8 * octet)) * bits + 7) / 8;
}

uint64_t load_octet(const uint8_t* row, int64_t K, int64_t octet, int bits) {
  uint64_t word = 0;
  std::memcpy(&word, row + octet * bits, static_cast<size_t>(octet_bytes(K, octet, bits)));
  return word;
}

}  // namespace

void pack_nibbles(const uint8_t* qdata, int64_t N, int64_t K, int bits, int shift, uint8_t* codes) {
  const int64_t panels = (N + kPanel - 1) / kPanel, octets = (K + 7) / 8, row_bytes = (K * bits + 7) / 8;
  const uint64_t mask = (1u << bits) - 1;
  parallel_for(panels, 1 + (1 << 16) / (kPanel * (K + 1)), [=](int64_t begin, int64_t end) {
    std::memset(codes + begin * octets * 4 * kPanel, 0, static_cast<size_t>((end - begin) * octets * 4 * kPanel));
    for (int64_t n = begin * kPanel; n < std::min(N, end * kPanel); n++) {
      uint8_t* column = codes + n / kPanel * octets * 4 * kPanel + n % kPanel * 4;
      for (int64_t octet = 0; octet < octets; octet++) {
        const uint64_t word = load_octet(qdata + n * row_bytes, K, octet, bits);
        uint32_t quad = 0;
        for (int i = 0; i < 4; i++) {
          quad |= static_cast<uint32_t>(((word >> (i * bits)) & mask) << shift) << (8 * i);
          quad |= static_cast<uint32_t>(((word >> ((i + 4) * bits)) & mask) << shift) << (8 * i + 4);
        }
        std::memcpy(column + octet * 4 * kPanel, &quad, 4);
      }
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
