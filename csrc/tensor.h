// What torch says of a tensor, through the table of C functions that DLPack 1.3 defines and torch.Tensor has had since
// 2.10 (__dlpack_c_exchange_api__): a few nanoseconds a tensor, without linking to torch. ATen/dlpack.h states both.
#pragma once
#include <cstdint>

#include "dtypes.h"

namespace pyengine {

struct Tensor {
  void* data;
  int32_t device, device_index;
  int32_t dims;
  uint8_t kind, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;

  bool is_cpu() const { return device == 1; }
  bool is_float32() const { return kind == kFloat && bits == 32; }
  bool is_uint8() const { return kind == kUInt && bits == 8; }
  bool is_vector(int64_t size) const { return dims == 1 && shape[0] == size; }

  // Whether it is one of the types of activations and results, and which.
  bool float_type(DType& type) const {
    const bool half = kind == kFloat && bits == 16, bfloat = kind == kBfloat && bits == 16;
    type = half ? DType::kFloat16 : bfloat ? DType::kBFloat16 : DType::kFloat32;
    return half || bfloat || is_float32();
  }

  // Of the first `count` dimensions.
  int64_t elements(int count) const {
    int64_t product = 1;
    for (int i = 0; i < count; i++) product *= shape[i];
    return product;
  }

  bool is_contiguous() const {
    bool in_order = true;
    int64_t inner = 1;
    for (int i = dims - 1; i >= 0; inner *= shape[i--]) in_order &= shape[i] == 1 || strides[i] == inner;
    return in_order || !inner;
  }

 private:
  enum Kind : uint8_t { kUInt = 1, kFloat = 2, kBfloat = 4 };
};
static_assert(sizeof(Tensor) == 48, "DLTensor has 48 bytes");

struct TensorApi {
  uint32_t major, minor;
  const void* previous;
  void (*unused[3])();
  int (*read)(void* object, Tensor* tensor);  // 0, or a Python exception is set; borrows
  void (*stream)();
};

}  // namespace pyengine
