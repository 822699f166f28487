// Element types, epilogue functions and kinds of zero points, numbered as pyengine/backends/cpu.py passes them.
#pragma once
#include <cstdint>

namespace pyengine {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt32 = 4, kInt16 = 5 };
// The zero point of a weight's codes, where it is not one number for all: one per group in the layout, of that type.
constexpr int32_t kZerosUint8 = -1, kZerosFloat32 = -2;

enum class Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

// In an anonymous namespace, like all that a header defines for kernel files: each object has its own copy, compiled
// with its own flags.
namespace {
inline constexpr int64_t element_size(DType type) {
  return type == DType::kFloat32 || type == DType::kInt32 ? 4 : type == DType::kInt8 ? 1 : 2;
}
}  // namespace

}  // namespace pyengine
