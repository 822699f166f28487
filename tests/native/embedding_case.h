// One random call of one embedding kernel: rows scale * (code - zero), one product each, so by equality.
#pragma once
#include <string>
#include <vector>

#include "kernels/embedding/embedding.h"
#include "memory.h"

struct EmbeddingEntry {
  const char *variant, *isa;
  pyengine::EmbeddingKernel kernel;
};
extern const std::vector<EmbeddingEntry> kEmbedding;

class EmbeddingCase {
 public:
  EmbeddingCase(const EmbeddingEntry& entry, uint64_t seed);
  std::string name() const;
  // Runs the kernel over ranges and by embedding(); what is wrong, or nothing.
  std::string check();

 private:
  const EmbeddingEntry& entry_;
  uint64_t seed_;
  Random random_;
  bool at_end_;
  pyengine::EmbeddingArgs args_{};
  std::vector<float> expected_;  // (count, K) before the cast
};
