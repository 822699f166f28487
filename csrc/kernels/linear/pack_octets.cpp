#include <algorithm>
#include <cstring>

#include "kernels/linear/octets.h"
#include "parallel.h"

namespace pyengine {
namespace {

// Eight codes, of which `count` are there, from offset binary to two's complement or back.
void copy_codes(uint8_t* to, const uint8_t* from, int64_t count) {
  uint64_t octet;
  if (count == 8) {
    std::memcpy(&octet, from, 8);
    octet ^= 0x8080808080808080u;
    std::memcpy(to, &octet, 8);
  } else {
    for (int64_t i = 0; i < count; i++) to[i] = from[i] ^ 0x80;
  }
}

}  // namespace

void pack_octets(const uint8_t* qdata, const float* scale, int64_t N, int64_t K, uint8_t* layout) {
  const Octets octets(N, K);
  std::memset(layout, 0, static_cast<size_t>(octets.codes));
  std::memcpy(layout, scale, static_cast<size_t>(N) * 4);
  parallel_for(octets.count, 1 + (1 << 16) / (kPanel * (K + 1)), [=](int64_t begin, int64_t end) {
    std::memset(layout + octets.panel(begin), 0, static_cast<size_t>((end - begin) * kPanel * octets.depth));
    for (int64_t n = begin * kPanel; n < std::min(N, end * kPanel); n++) {
      uint8_t* column = layout + octets.panel(n / kPanel) + n % kPanel * 8;
      for (int64_t k = 0; k < K; k += 8) copy_codes(column + k * kPanel, qdata + n * K + k, std::min<int64_t>(8, K - k));
    }
  });
}

void unpack_octets(const uint8_t* layout, int64_t N, int64_t K, uint8_t* qdata, float* scale) {
  const Octets octets(N, K);
  std::memcpy(scale, layout, static_cast<size_t>(N) * 4);
  for (int64_t n = 0; n < N; n++) {
    const uint8_t* column = layout + octets.panel(n / kPanel) + n % kPanel * 8;
    for (int64_t k = 0; k < K; k += 8) copy_codes(qdata + n * K + k, column + k * kPanel, std::min<int64_t>(8, K - k));
  }
}

}  // namespace pyengine
