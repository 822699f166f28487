// The only file that knows Python. Pointers come in as integers: the caller (pyengine/backends/cpu.py) has checked
// types, shapes and devices, and keeps the tensors alive during the call.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu_features.h"
#include "kernels/embedding/embedding.h"
#include "kernels/linear/linear.h"
#include "kernels/linear/panels.h"
#include "parallel.h"

namespace py = pybind11;
using namespace pyengine;

namespace {

template <class Kernel>
struct Entry {
  const char* variant;
  const char* isa;
  Kernel kernel;
};

const Entry<const LinearKernel*> kLinear[] = {
#define PYENGINE_LINEAR(variant, isa) {#variant, #isa, &linear_##variant##_##isa},
#include "kernels/linear/kernels.inc"
};

const Entry<EmbeddingKernel> kEmbedding[] = {
#define PYENGINE_EMBEDDING(variant, isa) {#variant, #isa, embedding_##variant##_##isa},
#include "kernels/embedding/kernels.inc"
};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The kernel at `index`; an index that is not in the table, or an instruction set that this processor lacks, raises.
template <class Kernel, size_t kCount>
Kernel entry(const Entry<Kernel> (&table)[kCount], size_t index) {
  if (index >= kCount) throw py::index_error("no kernel at index " + std::to_string(index));
  if (!isa_supported(table[index].isa))
    throw std::runtime_error("this processor or operating system does not support " + std::string(table[index].isa));
  return table[index].kernel;
}

template <class Kernel, size_t kCount>
void list(py::list& rows, const char* op, const Entry<Kernel> (&table)[kCount]) {
  for (size_t i = 0; i < kCount; i++)
    rows.append(py::make_tuple(op, table[i].variant, table[i].isa, i, isa_supported(table[i].isa)));
}

py::list kernels() {
  py::list rows;
  list(rows, "linear", kLinear);
  list(rows, "embedding", kEmbedding);
  return rows;
}

// A workspace of at most this many bytes need not be passed.
constexpr int64_t kStackWorkspace = 16 << 10;

void run_linear(size_t index, uintptr_t x, int x_type, int64_t M, uintptr_t layout, int64_t N, int64_t K,
                uintptr_t bias, uintptr_t y, int y_type, int activation, uintptr_t workspace) {
  const LinearKernel* kernel = entry(kLinear, index);
  LinearArgs args{};
  args.x = pointer<const void>(x);
  args.layout = pointer<const uint8_t>(layout);
  args.bias = pointer<const float>(bias);
  args.y = pointer<void>(y);
  alignas(64) uint8_t stack[kStackWorkspace];
  if (!workspace && linear_workspace_bytes(M, K) > kStackWorkspace) throw py::value_error("no workspace");
  args.workspace = workspace ? pointer<uint8_t>(workspace) : stack;
  args.M = M;
  args.N = N;
  args.K = K;
  args.x_type = static_cast<DType>(x_type);
  args.y_type = static_cast<DType>(y_type);
  args.activation = static_cast<Activation>(activation);
  py::gil_scoped_release release;
  linear(*kernel, args);
}

int64_t run_embedding(size_t index, uintptr_t ids, int64_t count, uintptr_t layout, int64_t N, int64_t K, uintptr_t y,
                      int y_type) {
  const EmbeddingKernel kernel = entry(kEmbedding, index);
  EmbeddingArgs args{};
  args.ids = pointer<const int64_t>(ids);
  args.layout = pointer<const uint8_t>(layout);
  args.y = pointer<void>(y);
  args.count = count;
  args.N = N;
  args.K = K;
  args.y_type = static_cast<DType>(y_type);
  py::gil_scoped_release release;
  return embedding(kernel, args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of pyengine; see csrc/README.md";
  m.def("kernels", &kernels, "(op, variant, isa, index, supported) of every kernel in this build");
  m.def("isa_supported", [](const std::string& isa) { return isa_supported(isa.c_str()); });
  m.def("set_parallel_for", [](uintptr_t function) { set_parallel_for(reinterpret_cast<TorchParallelFor>(function)); });
  m.attr("STACK_WORKSPACE") = kStackWorkspace;
  m.def("linear", &run_linear);
  m.def("linear_workspace_bytes", &linear_workspace_bytes);
  m.def("embedding", &run_embedding);
  m.def("panels_bytes", [](int64_t N, int64_t K) { return Panels(N, K).bytes; });
  m.def("pack_panels", [](uintptr_t qdata, uintptr_t scale, int64_t N, int64_t K, uintptr_t layout) {
    py::gil_scoped_release release;
    pack_panels(pointer<const uint8_t>(qdata), pointer<const float>(scale), N, K, pointer<uint8_t>(layout));
  });
  m.def("unpack_panels", [](uintptr_t layout, int64_t N, int64_t K, uintptr_t qdata, uintptr_t scale) {
    py::gil_scoped_release release;
    unpack_panels(pointer<const uint8_t>(layout), N, K, pointer<uint8_t>(qdata), pointer<float>(scale));
  });
}
