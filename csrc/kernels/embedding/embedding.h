// y[i] = scale[id] * (code[id] - 128): rows of an int8 table.
//
// The layout "rows8" of a weight (N, K): float32 scale[N], padded to 64 bytes; uint8 codes[N][K], offset binary.
#pragma once
#include <cstdint>

#include "dtypes.h"

namespace pyengine {

struct EmbeddingArgs {
  const int64_t* ids;     // (count)
  const uint8_t* layout;  // rows8
  void* y;                // (count, K) contiguous; float32, bfloat16 or float16
  int64_t count, N, K;
  DType y_type;
};

// Rows [begin, end) of y, of which every id lies in [0, N).
using EmbeddingKernel = void (*)(const EmbeddingArgs& args, int64_t begin, int64_t end);

// Returns the position of the first id outside [0, N), and then has written nothing; -1 if all are inside.
int64_t embedding(EmbeddingKernel kernel, const EmbeddingArgs& args);

#define PYENGINE_EMBEDDING(variant, isa) void embedding_##variant##_##isa(const EmbeddingArgs&, int64_t, int64_t);
#include "kernels/embedding/kernels.inc"
#undef PYENGINE_EMBEDDING

}  // namespace pyengine
