// One random call of one linear kernel: its arguments, the ranges of its phases, and what must come out.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/linear/linear.h"
#include "memory.h"

struct LinearEntry {
  const char *variant, *isa;
  const pyengine::LinearKernel* kernel;
};
extern const std::vector<LinearEntry> kLinear;

// A phase of a kernel on a range; plain words, since tests/bochs.py reads them.
struct Call {
  void (*phase)(const pyengine::LinearArgs&, int64_t begin, int64_t end);
  const pyengine::LinearArgs* args;
  int64_t begin, end;
};
struct Range {
  const void* at;
  uint64_t bytes;
};

// The buffers of all cases of a process.
struct LinearMemory {
  static constexpr size_t kReserve = 8 << 20;
  Guarded x{kReserve}, layout{kReserve}, bias{kReserve}, y{kReserve}, workspace{kReserve};
};

class LinearCase {
 public:
  LinearCase(const LinearEntry& entry, uint64_t seed, LinearMemory& memory);

  std::string name() const;
  // Both phases, block by block, over ranges as threads would take them.
  const std::vector<Call>& calls() const { return calls_; }
  // All that the calls touch.
  std::vector<Range> memory() const;
  // After the calls: what is wrong with y, or nothing. native: this processor runs the kernel, so that linear() is
  // compared with the calls too.
  std::string check(bool native);

 private:
  void choose_shape();
  void make_x();
  void make_panels();
  void make_nibbles();
  void make_calls();
  void set_weight(int64_t n, int64_t k, int32_t code, double value, double size);
  std::string compare_sums() const;
  std::string compare_floats(const uint8_t* expected) const;
  bool close(int64_t m, int64_t n, double got, double expected) const;

  const LinearEntry& entry_;
  uint64_t seed_;
  LinearMemory& memory_;
  Random random_;
  bool at_end_;
  int activation_bits_ = 0;  // 0: activations stay float
  bool panels_;              // else nibbles
  pyengine::LinearArgs args_{};
  std::vector<uint8_t> panels_layout_;  // panels16x4, for the portable kernel where this one has another layout
  std::vector<int32_t> codes_;  // (N, K) q - zero, where zero is whole
  std::vector<double> weight_;  // (N, K) scale * (q - zero)
  std::vector<double> size_;    // (N, K) the magnitudes that kernels subtract, scale * (q + zero)
  std::vector<int32_t> q_;      // (M, K) codes of x
  std::vector<double> x_;       // (M, K) what the codes, or x itself, stand for
  std::vector<pyengine::LinearArgs> blocks_;
  std::vector<Call> calls_;
};
