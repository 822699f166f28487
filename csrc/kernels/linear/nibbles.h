// The layout "nibbles16x8" of a weight (N, K) with codes of up to 4 bits, in groups of a multiple of 8 codes or one
// group per row, the same bytes for every instruction set:
//
//   scale   float16 or float32 [N / 16][groups][16]   0 in the padding; then padded to 64 bytes
//   zero    uint8 or float32 [N / 16][groups][16]     only if each group has a zero point; then padded to 64 bytes
//   codes   uint8 [N / 16][K / 8][16][4]              byte i of a column holds code i of 8 along K in its low and code
//                                                     i + 4 in its high bits; N padded to 16 and K to 8 with zeros
//
// The value of a code q is scale * (q - zero), with one zero point for all where none are stored. Codes of other
// encodings are turned into such: a binary code counts double.
#pragma once
#include <cstdint>

#include "kernels/linear/panels.h"

namespace pyengine {

namespace {  // see dtypes.h
struct Nibbles {
  int64_t count, groups, octets, zero, codes, bytes;  // number of panels, per row groups and eights, offsets in bytes

  Nibbles(int64_t N, int64_t K, int64_t group, int64_t scale_size, int64_t zero_size)
      : count((N + kPanel - 1) / kPanel),
        groups(K > 0 ? (K + group - 1) / group : 1),
        octets((K + 7) / 8),
        zero(round_up(count * groups * kPanel * scale_size)),
        codes(zero + round_up(count * groups * kPanel * zero_size)),
        bytes(codes + count * octets * 4 * kPanel) {}

  static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};
}  // namespace

// The codes of a layout, from and to rows of little-endian bitstreams of `bits` <= 4 bits per code, ceil(K * bits / 8)
// bytes each. A code q of the row is q << shift in the layout.
void pack_nibbles(const uint8_t* qdata, int64_t N, int64_t K, int bits, int shift, uint8_t* codes);
void unpack_nibbles(const uint8_t* codes, int64_t N, int64_t K, int bits, int shift, uint8_t* qdata);

}  // namespace pyengine
