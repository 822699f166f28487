// The layout "panels16x4" of an int8 weight (N, K), the same bytes for every instruction set:
//
//   scale   float32[N padded to 16]     0 in the padding
//   limits  uint16[K / 16][2]           see below; then padded to 64 bytes
//   panel   int8[N / 16][K / 4][16][4]  the codes of 16 rows of the weight, 4 along K at a time; N padded to 16 and K to 16
//                                       with zeros
//
// limits: for every 16 codes along K, how large the sum of the squares of eight codes of activations may be for their
// products with t = max(|w|, |~w|) of any row to add up to at most 32767: 32767^2 / the largest sum of t^2, at most
// 65534. The first number is for the codes 0, 1, 4, 5, 8, 9, 12, 13, the second for the others.
#pragma once
#include <cstdint>

namespace pyengine {

constexpr int64_t kPanel = 16, kGroup = 16;

namespace {  // see dtypes.h
struct Panels {
  int64_t count, depth, limits, codes, bytes;  // number of panels, padded K, and offsets in bytes

  Panels(int64_t N, int64_t K)
      : count((N + kPanel - 1) / kPanel),
        depth((K + kGroup - 1) / kGroup * kGroup),
        limits(count * kPanel * 4),
        codes((limits + depth / kGroup * 4 + 63) / 64 * 64),
        bytes(codes + count * kPanel * depth) {}
};
}  // namespace

// qdata: (N, K) offset-binary codes, value + 128. scale: (N).
void pack_panels(const uint8_t* qdata, const float* scale, int64_t N, int64_t K, uint8_t* layout);
void unpack_panels(const uint8_t* layout, int64_t N, int64_t K, uint8_t* qdata, float* scale);

}  // namespace pyengine
