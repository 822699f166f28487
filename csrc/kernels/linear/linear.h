// y = activation((q_x q_w^T) * (scale_x * scale_w) + bias): the arguments, and what a kernel provides.
#pragma once
#include <cstdint>

#include "dtypes.h"

namespace pyengine {

struct LinearArgs {
  const void* x;          // (M, K) contiguous; float32, bfloat16, float16, or codes of the kernel's activations
  const uint8_t* layout;  // the weight, see panels.h
  const float* bias;      // (N) or null
  void* y;                // (M, N) contiguous; float32, bfloat16, float16, or int32 for the bare sums of codes
  uint8_t* workspace;     // linear_workspace_bytes() of the kernel, 64-byte aligned
  int64_t M, N, K;
  DType x_type, y_type;
  Activation activation;
  // Of a weight in groups, see nibbles.h: codes along K that share a scale, at least 1; the type of the scales; the zero
  // point of every group, or what dtypes.h says of zero points in the layout.
  int64_t group;
  DType scale_type;
  int32_t zero;
};

// A kernel runs in two phases. Neither checks, allocates, starts a thread or keeps state: the ranges of one phase may
// run at the same time, in any order.
struct LinearKernel {
  // What the rows of x take in the workspace.
  int64_t (*workspace_bytes)(const LinearArgs& args);
  // Prepares rows [begin, end) of x in the workspace.
  void (*rows)(const LinearArgs& args, int64_t begin, int64_t end);
  // Computes the columns of the 16-wide panels [begin, end) of y, for all rows.
  void (*panels)(const LinearArgs& args, int64_t begin, int64_t end);
};

// Rows are taken in blocks of this many, which bounds the workspace and keeps the prepared rows in the caches.
constexpr int64_t kLinearRowBlock = 256;

int64_t linear_workspace_bytes(const LinearKernel& kernel, const LinearArgs& args);

// args.M rows in blocks, each phase split over torch's threads.
void linear(const LinearKernel& kernel, const LinearArgs& args);

#define PYENGINE_LINEAR(variant, isa) extern const LinearKernel linear_##variant##_##isa;
#include "kernels/linear/kernels.inc"
#undef PYENGINE_LINEAR

}  // namespace pyengine
