#include "parallel.h"

#include <atomic>

namespace pyengine {
namespace {
std::atomic<TorchParallelFor> torch_parallel_for{nullptr};
}

void set_parallel_for(TorchParallelFor function) { torch_parallel_for.store(function); }
TorchParallelFor get_parallel_for() { return torch_parallel_for.load(std::memory_order_relaxed); }

}  // namespace pyengine
