// What a processor can do at most: loops of nothing but the instructions that a kernel cannot do without, on operands
// in registers, and loops that only read. A benchmark holds the kernels against them.
#pragma once
#include <cstdint>

namespace pyengine {

struct LimitArgs {
  const uint8_t* data;  // read by `read` alone: a multiple of 64 * streams bytes
  int64_t bytes, streams;
  int64_t rounds;  // how often the data is read, or the loop of instructions is run
};

// Returns how many bytes have been read, or how many multiply-accumulates have been done.
using Limit = int64_t (*)(const LimitArgs&);

// The same on every thread at once, each with a part of the data of its own; returns the sum.
int64_t run_limit(Limit limit, const LimitArgs& args, int64_t threads);

#define PYENGINE_LIMIT(name, isa) int64_t limit_##name##_##isa(const LimitArgs&);
#include "limits/limits.inc"
#undef PYENGINE_LIMIT

}  // namespace pyengine
