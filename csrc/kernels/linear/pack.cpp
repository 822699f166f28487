#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/linear/panels.h"
#include "parallel.h"

namespace pyengine {
namespace {

constexpr int kQuads = 4 * kPanel;          // bytes of 16 columns, 4 codes each
constexpr int64_t kBlock = 256;             // codes along K: their part of a panel stays in the first-level cache
constexpr uint32_t kSignBits = 0x80808080;  // offset binary to two's complement and back

// `depth` codes of a row of the weight into its column of a panel: four codes go to every 64th byte.
void pack_column(const uint8_t* row, int64_t depth, uint8_t* column) {
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    uint32_t quad;
    std::memcpy(&quad, row + k, 4);
    quad ^= kSignBits;
    std::memcpy(column + k * kPanel, &quad, 4);
  }
  for (int64_t i = 0; k + i < depth; i++) column[k * kPanel + i] = row[k + i] ^ 0x80;
}

// The largest sums of the squares of t, of the eight codes of a column whose products are added up in one word; of both
// kinds, over the columns of one group of a panel. Plain loops over fixed counts, which the compiler turns into vectors.
void raise_energies(const int8_t* group, int32_t (&largest)[2]) {
  uint32_t energy[kQuads / 2] = {};  // of pairs of codes: even ones belong to the first kind, odd ones to the second
  for (int quad = 0; quad < 4; quad++, group += kQuads) {
    uint16_t square[kQuads];  // at most 128 * 128
    for (int i = 0; i < kQuads; i++) {
      const auto t = static_cast<uint8_t>((group[i] < 0 ? ~group[i] : group[i]) + 1);
      square[i] = static_cast<uint16_t>(t * t);
    }
    uint32_t pairs[kQuads / 2];
    std::memcpy(pairs, square, sizeof(pairs));
    for (int i = 0; i < kQuads / 2; i++) energy[i] += (pairs[i] & 0xffff) + (pairs[i] >> 16);
  }
  for (int i = 0; i < kQuads / 2; i++) largest[i % 2] = std::max(largest[i % 2], static_cast<int32_t>(energy[i]));
}

// At most 65534: kernels add up squares with saturation, and 65535 must be beyond.
uint16_t limit_of(int32_t energy) { return static_cast<uint16_t>(std::min(65534, 32767 * 32767 / std::max(energy, 1))); }

}  // namespace

void pack_panels(const uint8_t* qdata, const float* scale, int64_t N, int64_t K, uint8_t* layout) {
  const Panels panels(N, K);
  std::memset(layout, 0, static_cast<size_t>(panels.codes));
  if (N) std::memcpy(layout, scale, static_cast<size_t>(N) * 4);  // of no rows the pointer may be null
  uint8_t* codes = layout + panels.codes;
  parallel_for(panels.count, 1 + (1 << 16) / (kPanel * (panels.depth + 1)), [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      uint8_t* panel = codes + p * kPanel * panels.depth;
      const int64_t columns = std::min(kPanel, N - p * kPanel);
      if (columns < kPanel || K < panels.depth) std::memset(panel, 0, static_cast<size_t>(kPanel * panels.depth));
      for (int64_t k = 0; k < K; k += kBlock)
        for (int64_t column = 0; column < columns; column++)
          pack_column(qdata + (p * kPanel + column) * K + k, std::min(kBlock, K - k), panel + k * kPanel + 4 * column);
    }
  });
  const auto limits = reinterpret_cast<uint16_t*>(layout + panels.limits);
  parallel_for(panels.depth / kGroup, 1 + (1 << 12) / (panels.count + 1), [=](int64_t begin, int64_t end) {
    std::vector<int32_t[2]> largest(static_cast<size_t>(end - begin));
    for (int64_t p = 0; p < panels.count; p++)
      for (int64_t g = begin; g < end; g++)
        raise_energies(reinterpret_cast<const int8_t*>(codes) + (p * panels.depth + g * kGroup) * kPanel,
                       largest[static_cast<size_t>(g - begin)]);
    for (int64_t g = begin; g < end; g++)
      for (int odd = 0; odd < 2; odd++) limits[2 * g + odd] = limit_of(largest[static_cast<size_t>(g - begin)][odd]);
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
      std::memcpy(qdata + n * K + k, &quad, static_cast<size_t>(std::min<int64_t>(4, K - k)));
    }
  }
}

}  // namespace pyengine
