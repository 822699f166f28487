#include "kernels/embedding/embedding.h"

#include "parallel.h"

namespace pyengine {
namespace {
constexpr int64_t kGrainElements = 1 << 15;  // about 10 us on one core
}

int64_t embedding(EmbeddingKernel kernel, const EmbeddingArgs& args) {
  for (int64_t i = 0; i < args.count; i++)
    if (args.ids[i] < 0 || args.ids[i] >= args.N) return i;
  parallel_for(args.count, 1 + kGrainElements / (args.K + 1),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return -1;
}

}  // namespace pyengine
