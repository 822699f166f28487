// The layout "panels16x8" of an int8 weight (N, K), for instructions that multiply matrices of rows of eight bytes:
//
//   scale   float32[N padded to 16]     0 in the padding; then padded to 64 bytes
//   panel   int8[N / 16][K / 8][16][8]  the codes of 16 rows of the weight, 8 along K at a time; N padded to 16 and K to 8
//                                       with zeros
#pragma once
#include <cstdint>

#include "kernels/linear/panels.h"

namespace pyengine {

namespace {  // see dtypes.h
struct Octets {
  int64_t count, depth, codes, bytes;  // number of panels, padded K, and offsets in bytes

  Octets(int64_t N, int64_t K)
      : count((N + kPanel - 1) / kPanel),
        depth((K + 7) / 8 * 8),
        codes((count * kPanel * 4 + 63) / 64 * 64),
        bytes(codes + count * kPanel * depth) {}

  int64_t panel(int64_t index) const { return codes + index * kPanel * depth; }
};
}  // namespace

// qdata: (N, K) offset-binary codes, value + 128. scale: (N).
void pack_octets(const uint8_t* qdata, const float* scale, int64_t N, int64_t K, uint8_t* layout);
void unpack_octets(const uint8_t* layout, int64_t N, int64_t K, uint8_t* qdata, float* scale);

}  // namespace pyengine
