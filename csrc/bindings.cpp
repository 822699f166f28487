// The only file that knows Python. Pointers come in as integers: the caller (pyengine/backends/cpu.py) has checked
// types, shapes and devices, and keeps the tensors alive during the call.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_features.h"
#include "kernels/embedding/embedding.h"
#include "kernels/linear/linear.h"
#include "kernels/linear/nibbles.h"
#include "kernels/linear/octets.h"
#include "kernels/linear/panels.h"
#include "limits/limits.h"
#include "parallel.h"
#include "tensor.h"

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

const Entry<Limit> kLimits[] = {
#define PYENGINE_LIMIT(name, isa) {#name, #isa, limit_##name##_##isa},
#include "limits/limits.inc"
};

// Functions in Python's vectorcall convention: pybind11's look at overloads and keywords would take a tenth of a small
// layer's time.
using Vectorcall = PyObject* (*)(PyObject* self, PyObject* const* args, Py_ssize_t count);

PyMethodDef method(const char* name, Vectorcall call) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr};
}

// What body() returns; of an exception null, as Python wants it.
template <class Body>
PyObject* raising(const Body& body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A function of integers.
template <auto kFunction>
struct Fast;

template <class Result, class... Args, Result (*kFunction)(Args...)>
struct Fast<kFunction> {
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return raising([&] {
      if (count != sizeof...(Args)) throw py::type_error("takes " + std::to_string(sizeof...(Args)) + " integers");
      return call(args, std::index_sequence_for<Args...>());
    });
  }

  template <size_t... kIndex>
  static PyObject* call(PyObject* const* args, std::index_sequence<kIndex...>) {
    const int64_t values[] = {PyLong_AsLongLong(args[kIndex])...};
    if (PyErr_Occurred()) throw py::error_already_set();
    if constexpr (std::is_void_v<Result>) {
      kFunction(static_cast<Args>(values[kIndex])...);
      Py_RETURN_NONE;
    } else {
      return PyLong_FromLongLong(kFunction(static_cast<Args>(values[kIndex])...));
    }
  }

  static py::object define(const char* name) {
    static PyMethodDef definition = method(name, &call);
    return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
  }
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

// Memory for a workspace: on the stack where it fits, since allocating costs as much as a small kernel.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes <= static_cast<int64_t>(sizeof(stack_))) return;
    heap_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64))));
    if (!heap_) throw std::bad_alloc();
  }
  uint8_t* data() { return heap_ ? heap_.get() : stack_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t[], Free> heap_;
  alignas(64) uint8_t stack_[16 << 10];
};

// Without the GIL. A workspace of null is allocated for the time of the call.
void run(const LinearKernel& kernel, LinearArgs& args) {
  py::gil_scoped_release release;
  Workspace own(args.workspace ? 0 : linear_workspace_bytes(kernel, args));
  if (!args.workspace) args.workspace = own.data();
  linear(kernel, args);
}

void run_linear(size_t index, uintptr_t x, int x_type, int64_t M, uintptr_t layout, int64_t N, int64_t K,
                uintptr_t bias, uintptr_t y, int y_type, int activation, int64_t group, int scale_type, int zero,
                uintptr_t workspace) {
  const LinearKernel* kernel = entry(kLinear, index);
  LinearArgs args{};
  args.x = pointer<const void>(x);
  args.layout = pointer<const uint8_t>(layout);
  args.bias = pointer<const float>(bias);
  args.y = pointer<void>(y);
  args.workspace = pointer<uint8_t>(workspace);
  args.M = M;
  args.N = N;
  args.K = K;
  args.x_type = static_cast<DType>(x_type);
  args.y_type = static_cast<DType>(y_type);
  args.activation = static_cast<Activation>(activation);
  args.group = group;
  args.scale_type = static_cast<DType>(scale_type);
  args.zero = zero;
  run(*kernel, args);
}

// torch's functions on tensors, once Python has handed them over.
const TensorApi* tensor_api = nullptr;

void set_tensor_api(const py::capsule& capsule) {
  const auto* api = static_cast<const TensorApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->major != 1) throw std::runtime_error("DLPack " + std::to_string(api->major) + " instead of 1");
  tensor_api = api;
}

// False for what is no tensor in order in the memory of the CPU; a tensor may also have lost its memory, or never had any.
bool read(PyObject* object, Tensor& tensor) {
  if (tensor_api->read(object, &tensor) == 0)
    return tensor.is_cpu() && tensor.is_contiguous() && (tensor.data || !tensor.elements(tensor.dims));
  PyErr_Clear();
  return false;
}

// x.new_empty(*x.shape[:-1], N)
py::object new_rows(PyObject* x, const Tensor& shape, int64_t N) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty");
  std::vector<PyObject*> arguments(static_cast<size_t>(1 + shape.dims), x);
  for (int i = 1; i <= shape.dims; i++)
    arguments[static_cast<size_t>(i)] = PyLong_FromLongLong(i < shape.dims ? shape.shape[i - 1] : N);
  PyObject* y = PyObject_VectorcallMethod(name, arguments.data(), arguments.size(), nullptr);
  for (size_t i = 1; i < arguments.size(); i++) Py_DECREF(arguments[i]);
  if (!y) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(y);
}

// A kernel and all that is known of its calls before there is one.
struct BoundLinear {
  const LinearKernel* kernel;
  LinearArgs args;
  int64_t layout_bytes;

  // (x, layout, bias or None, activation) -> y, or None if something is not as the kernel wants it: all that it reads
  // and writes is looked at here.
  py::object operator()(PyObject* x, PyObject* layout, PyObject* bias, PyObject* activation) const {
    LinearArgs call = args;
    Tensor tensor;
    if (!read(layout, tensor) || !tensor.is_uint8() || !tensor.is_vector(layout_bytes)) return py::none();
    call.layout = static_cast<const uint8_t*>(tensor.data);
    if (bias != Py_None) {
      if (!read(bias, tensor) || !tensor.is_float32() || !tensor.is_vector(args.N)) return py::none();
      call.bias = static_cast<const float*>(tensor.data);
    }
    const long code = PyLong_AsLong(activation);
    if (code == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (code < 0 || code > static_cast<long>(Activation::kSilu)) return py::none();
    call.activation = static_cast<Activation>(code);
    if (!read(x, tensor) || !tensor.float_type(call.x_type) || !tensor.dims || tensor.shape[tensor.dims - 1] != args.K)
      return py::none();
    call.x = tensor.data;
    call.M = tensor.elements(tensor.dims - 1);
    py::object y = new_rows(x, tensor, args.N);
    Tensor result;
    const bool usable = read(y.ptr(), result) && result.float_type(call.y_type);
    if (!usable || result.elements(result.dims) != call.M * args.N) return py::none();
    call.y = result.data;
    run(*kernel, call);
    return y;
  }

  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    return raising([&] {
      if (count != 4) throw py::type_error("takes x, layout, bias, activation");
      const auto* bound = static_cast<const BoundLinear*>(PyCapsule_GetPointer(self, nullptr));
      return (*bound)(args[0], args[1], args[2], args[3]).release().ptr();
    });
  }
};

py::object bind_linear(size_t index, int64_t N, int64_t K, int64_t group, int scale_type, int zero,
                       int64_t layout_bytes) {
  static PyMethodDef definition = method("linear", &BoundLinear::call);
  LinearArgs args{};
  args.N = N;
  args.K = K;
  args.group = group;
  args.scale_type = static_cast<DType>(scale_type);
  args.zero = zero;
  auto bound = std::make_unique<BoundLinear>(BoundLinear{entry(kLinear, index), args, layout_bytes});
  const py::capsule self(bound.get(), [](void* address) { delete static_cast<BoundLinear*>(address); });
  bound.release();
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, self.ptr()));
}

int64_t run_embedding(size_t index, uintptr_t ids, int64_t count, uintptr_t layout, int64_t N, int64_t K, uintptr_t y,
                      int y_type, int64_t bits, int64_t group, int scale_type, int zero, int factor) {
  const EmbeddingKernel kernel = entry(kEmbedding, index);
  EmbeddingArgs args{};
  args.ids = pointer<const int64_t>(ids);
  args.layout = pointer<const uint8_t>(layout);
  args.y = pointer<void>(y);
  args.count = count;
  args.N = N;
  args.K = K;
  args.y_type = static_cast<DType>(y_type);
  args.bits = bits;
  args.group = group;
  args.scale_type = static_cast<DType>(scale_type);
  args.zero = zero;
  args.factor = factor;
  py::gil_scoped_release release;
  return embedding(kernel, args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of pyengine; see csrc/README.md";
  m.def("kernels", &kernels, "(op, variant, isa, index, supported) of every kernel in this build");
  m.def("isa_supported", [](const std::string& isa) { return isa_supported(isa.c_str()); });
  m.def("set_parallel_for", [](uintptr_t function) { set_parallel_for(reinterpret_cast<TorchParallelFor>(function)); });
  m.def("set_tensor_api", &set_tensor_api);
  m.def("bind_linear", &bind_linear, "linear(x, layout, bias or None, activation) -> y; None: not for these tensors");
  m.attr("linear") = Fast<&run_linear>::define("linear");
  m.def("linear_workspace_bytes",
        [](size_t index, int64_t M, int64_t K, int64_t group) {
          LinearArgs args{};
          args.M = M;
          args.K = K;
          args.group = group;
          return linear_workspace_bytes(*entry(kLinear, index), args);
        });
  m.def("limits", [] {
    py::list rows;
    list(rows, "limit", kLimits);
    return rows;
  });
  m.def("run_limit", [](size_t index, uintptr_t data, int64_t bytes, int64_t streams, int64_t rounds, int64_t threads) {
    const Limit limit = entry(kLimits, index);
    py::gil_scoped_release release;
    return run_limit(limit, {pointer<const uint8_t>(data), bytes, streams, rounds}, threads);
  });
  m.attr("embedding") = Fast<&run_embedding>::define("embedding");
  m.def("panels_bytes", [](int64_t N, int64_t K) { return Panels(N, K).bytes; });
  m.def("pack_panels", [](uintptr_t qdata, uintptr_t scale, int64_t N, int64_t K, uintptr_t layout) {
    py::gil_scoped_release release;
    pack_panels(pointer<const uint8_t>(qdata), pointer<const float>(scale), N, K, pointer<uint8_t>(layout));
  });
  m.def("nibbles_offsets", [](int64_t N, int64_t K, int64_t group, int64_t scale_size, int64_t zero_size) {
    const Nibbles layout(N, K, group, scale_size, zero_size);
    return py::make_tuple(layout.zero, layout.codes, layout.bytes);
  });
  m.def("pack_nibbles", [](uintptr_t qdata, int64_t N, int64_t K, int bits, int shift, uintptr_t codes) {
    py::gil_scoped_release release;
    pack_nibbles(pointer<const uint8_t>(qdata), N, K, bits, shift, pointer<uint8_t>(codes));
  });
  m.def("unpack_nibbles", [](uintptr_t codes, int64_t N, int64_t K, int bits, int shift, uintptr_t qdata) {
    py::gil_scoped_release release;
    unpack_nibbles(pointer<const uint8_t>(codes), N, K, bits, shift, pointer<uint8_t>(qdata));
  });
  m.def("unpack_panels", [](uintptr_t layout, int64_t N, int64_t K, uintptr_t qdata, uintptr_t scale) {
    py::gil_scoped_release release;
    unpack_panels(pointer<const uint8_t>(layout), N, K, pointer<uint8_t>(qdata), pointer<float>(scale));
  });
  m.def("octets_bytes", [](int64_t N, int64_t K) { return Octets(N, K).bytes; });
  m.def("pack_octets", [](uintptr_t qdata, uintptr_t scale, int64_t N, int64_t K, uintptr_t layout) {
    py::gil_scoped_release release;
    pack_octets(pointer<const uint8_t>(qdata), pointer<const float>(scale), N, K, pointer<uint8_t>(layout));
  });
  m.def("unpack_octets", [](uintptr_t layout, int64_t N, int64_t K, uintptr_t qdata, uintptr_t scale) {
    py::gil_scoped_release release;
    unpack_octets(pointer<const uint8_t>(layout), N, K, pointer<uint8_t>(qdata), pointer<float>(scale));
  });
}
