// The layout "panels16x4" of an int8 weight (N, K), the same bytes for every instruction set:
//
//   scale   float32[N padded to 16]     0 in the padding
//   paired  uint8[N / 16]               1 where dot4_pair is exact for the panel; then padded to 64 bytes
//   panel   int8[N / 16][K / 4][16][4]  the codes of 16 rows of the weight, 4 along K at a time; N padded to 16 and
//                                       K to 8 with zeros
//
// A panel is paired if each column keeps, in every 8 codes along K, t0 + t1 + t4 + t5 <= 258 and
// t2 + t3 + t6 + t7 <= 258, where t = max(|w|, |~w|) is the larger magnitude that w ^ sign can have: 258 * 127 = 32766.
#pragma once
#include <cstdint>

namespace pyengine {

constexpr int64_t kPanel = 16;

namespace {  // see dtypes.h
struct Panels {
  int64_t count, depth, paired, codes, bytes;  // number of panels, padded K, and offsets in bytes

  Panels(int64_t N, int64_t K)
      : count((N + kPanel - 1) / kPanel),
        depth((K + 7) / 8 * 8),
        paired(count * kPanel * 4),
        codes((paired + count + 63) / 64 * 64),
        bytes(codes + count * kPanel * depth) {}
};
}  // namespace

// qdata: (N, K) offset-binary codes, value + 128. scale: (N).
void pack_panels(const uint8_t* qdata, const float* scale, int64_t N, int64_t K, uint8_t* layout);
void unpack_panels(const uint8_t* layout, int64_t N, int64_t K, uint8_t* qdata, float* scale);

}  // namespace pyengine
