#include "kernels/linear/linear.h"

#include <algorithm>

#include "kernels/linear/panels.h"
#include "parallel.h"

namespace pyengine {
namespace {

// A range of less work than this is not split over threads: about 10 us on one core.
constexpr int64_t kGrainMacs = 1 << 19;
constexpr int64_t kGrainElements = 1 << 13;

}  // namespace

int64_t linear_workspace_bytes(const LinearKernel& kernel, const LinearArgs& args) {
  LinearArgs block = args;
  block.M = std::min(kLinearRowBlock, args.M);
  return kernel.workspace_bytes(block);
}

void linear(const LinearKernel& kernel, const LinearArgs& args) {
  const int64_t panels = (args.N + kPanel - 1) / kPanel;
  for (int64_t m = 0; m < args.M; m += kLinearRowBlock) {
    LinearArgs block = args;
    block.M = std::min(kLinearRowBlock, args.M - m);
    block.x = static_cast<const char*>(args.x) + m * args.K * element_size(args.x_type);
    block.y = static_cast<char*>(args.y) + m * args.N * element_size(args.y_type);
    parallel_for(block.M, 1 + kGrainElements / (args.K + 1),
                 [&](int64_t begin, int64_t end) { kernel.rows(block, begin, end); });
    parallel_for(panels, 1 + kGrainMacs / (block.M * kPanel * (args.K + 1)),
                 [&](int64_t begin, int64_t end) { kernel.panels(block, begin, end); });
  }
}

}  // namespace pyengine
