// y[i] = scale * (code - zero): rows of a table of whole codes.
//
// The layout "canonical" of a weight (N, K), its tensors as a file has them, each from a multiple of 64 bytes on:
//
//   qdata  uint8 [N][ceil(K * bits / 8)]        rows are little-endian bitstreams
//   scale  float16 or float32 [N][groups]
//   zero   uint8 [N][groups]                    only where zero points are stored
#pragma once
#include <cstdint>

#include "dtypes.h"

namespace pyengine {

struct EmbeddingArgs {
  const int64_t* ids;     // (count)
  const uint8_t* layout;  // canonical
  void* y;                // (count, K) contiguous; float32, bfloat16 or float16
  int64_t count, N, K;
  DType y_type;
  // Of the weight: bits of a code; codes along K that share a scale, a multiple of 8 or at least K; the type of the
  // scales; the zero point of every group, or kZerosUint8; what codes are multiplied by, 1 or 2.
  int64_t bits, group;
  DType scale_type;
  int32_t zero, factor;
};

// Rows [begin, end) of y, of which every id lies in [0, N).
using EmbeddingKernel = void (*)(const EmbeddingArgs& args, int64_t begin, int64_t end);

// Returns the position of the first id outside [0, N), and then has written nothing; -1 if all are inside.
int64_t embedding(EmbeddingKernel kernel, const EmbeddingArgs& args);

#define PYENGINE_EMBEDDING(variant, isa) void embedding_##variant##_##isa(const EmbeddingArgs&, int64_t, int64_t);
#include "kernels/embedding/kernels.inc"
#undef PYENGINE_EMBEDDING

}  // namespace pyengine
