#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels/linear/panels.h"
#include "parallel.h"

namespace pyengine {
namespace {

constexpr uint32_t kSignBits = 0x80808080u;  // offset binary to two's complement and back

// One row of the weight into its column of a panel: four codes go to every 64th byte.
void pack_column(const uint8_t* row, int64_t K, uint8_t* column) {
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    uint32_t quad;
    std::memcpy(&quad, row + k, 4);
    quad ^= kSignBits;
    std::memcpy(column + k * kPanel, &quad, 4);
  }
  for (int64_t i = 0; k + i < K; i++) column[k * kPanel + i] = row[k + i] ^ 0x80;
}

// Plain loops over fixed counts, which the compiler turns into vectors.
bool is_paired(const int8_t* panel, int64_t depth) {
  constexpr int kQuads = 4 * kPanel;  // bytes of 16 columns, 4 codes each
  int largest = 0;
  for (int64_t k = 0; k < depth; k += 8, panel += 2 * kQuads) {
    int16_t sum[kQuads];
    for (int i = 0; i < kQuads; i++) {
      const int low = panel[i], high = panel[i + kQuads];
      sum[i] = static_cast<int16_t>(std::max(-low, low + 1) + std::max(-high, high + 1));
    }
    for (int i = 0; i < kQuads; i += 2) largest = std::max(largest, sum[i] + sum[i + 1]);
  }
  return largest <= 258;
}

}  // namespace

void pack_panels(const uint8_t* qdata, const float* scale, int64_t N, int64_t K, uint8_t* layout) {
  const Panels panels(N, K);
  std::memset(layout, 0, static_cast<size_t>(panels.codes));
  std::memcpy(layout, scale, static_cast<size_t>(N) * 4);
  parallel_for(panels.count, 1 + (1 << 16) / (kPanel * (panels.depth + 1)), [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      uint8_t* panel = layout + panels.codes + p * kPanel * panels.depth;
      const int64_t columns = std::min(kPanel, N - p * kPanel);
      if (columns < kPanel || K < panels.depth) std::memset(panel, 0, static_cast<size_t>(kPanel * panels.depth));
      for (int64_t column = 0; column < columns; column++)
        pack_column(qdata + (p * kPanel + column) * K, K, panel + 4 * column);
      layout[panels.paired + p] = is_paired(reinterpret_cast<const int8_t*>(panel), panels.depth);
    }
  });
}

void unpack_panels(const uint8_t* layout, int64_t N, int64_t K, uint8_t* qdata, float* scale) {
  const Panels panels(N, K);
  std::memcpy(scale, layout, static_cast<size_t>(N) * 4);
  for (int64_t n = 0; n < N; n++) {
    const uint8_t* column = layout + panels.codes + n / kPanel * kPanel * panels.depth + n % kPanel * 4;
    for (int64_t k = 0; k < K; k += 4) {
      uint32_t quad;
      std::memcpy(&quad, column + k * kPanel, 4);
      quad ^= kSignBits;
      std::memcpy(qdata + n * K + k, &quad, static_cast<size_t>(K - k < 4 ? K - k : 4));
    }
  }
}

}  // namespace pyengine
