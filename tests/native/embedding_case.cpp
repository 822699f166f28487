#include "embedding_case.h"

#include <cstring>

#include "float_control.h"
#include "values.h"

using namespace pyengine;

const std::vector<EmbeddingEntry> kEmbedding = {
#define PYENGINE_EMBEDDING(variant, isa) {#variant, #isa, pyengine::embedding_##variant##_##isa},
#include "kernels/embedding/kernels.inc"
#undef PYENGINE_EMBEDDING
};

namespace {

struct Memory {
  static constexpr size_t kReserve = 1 << 20;
  Guarded ids{kReserve}, layout{kReserve}, y{kReserve};
};

Memory& memory() {
  static Memory all;
  return all;
}

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

EmbeddingCase::EmbeddingCase(const EmbeddingEntry& entry, uint64_t seed)
    : entry_(entry), seed_(seed), random_(seed), at_end_(!random_.once_in(4)) {
  args_.count = random_.between(0, 12);
  args_.N = random_.between(1, 40);
  args_.K = random_.between(0, 100);
  args_.bits = std::strcmp(entry.variant, "int8") == 0 ? 8 : random_.between(1, 4);
  args_.group = random_.once_in(2) ? 8 * random_.between(1, 8) : std::max<int64_t>(1, args_.K);
  args_.zero = random_.once_in(2) ? kZerosUint8 : static_cast<int32_t>(random_.between(0, 128));
  args_.factor = args_.bits == 1 ? static_cast<int>(random_.between(1, 2)) : 1;
  args_.scale_type = random_.pick({DType::kFloat32, DType::kFloat16});
  args_.y_type = random_.pick({DType::kFloat32, DType::kBFloat16, DType::kFloat16});

  const int64_t row_bytes = (args_.K * args_.bits + 7) / 8, groups = (args_.K + args_.group - 1) / args_.group;
  const int64_t per_row = std::max<int64_t>(1, groups), scale_at = round_up(args_.N * row_bytes);
  const int64_t zero_at = round_up(scale_at + args_.N * per_row * element_size(args_.scale_type));
  const int64_t bytes = args_.zero == kZerosUint8 ? zero_at + args_.N * per_row
                                                  : scale_at + args_.N * per_row * element_size(args_.scale_type);
  uint8_t* layout = memory().layout.take(static_cast<size_t>(bytes), at_end_);
  for (int64_t i = 0; i < bytes; i++) layout[i] = static_cast<uint8_t>(random_.bits());
  for (int64_t i = 0; i < args_.N * per_row; i++)
    set_element(args_.scale_type, layout + scale_at, i, random_.once_in(10) ? 0 : random_.normal());
  args_.layout = layout;

  auto* ids = reinterpret_cast<int64_t*>(memory().ids.take(static_cast<size_t>(args_.count) * 8, at_end_));
  for (int64_t i = 0; i < args_.count; i++) ids[i] = random_.between(0, args_.N - 1);
  args_.ids = ids;
  args_.y = memory().y.take(static_cast<size_t>(args_.count * args_.K * element_size(args_.y_type)), at_end_);

  for (int64_t i = 0; i < args_.count; i++)
    for (int64_t k = 0; k < args_.K; k++) {
      int code = 0;
      for (int64_t bit = 0; bit < args_.bits; bit++) {
        const int64_t place = k * args_.bits + bit;
        code |= (layout[ids[i] * row_bytes + place / 8] >> (place % 8) & 1) << bit;
      }
      const int64_t group = ids[i] * per_row + k / args_.group;
      const int zero = args_.zero == kZerosUint8 ? layout[zero_at + group] : args_.zero;
      const float scale = static_cast<float>(element(args_.scale_type, layout + scale_at, group));
      expected_.push_back(static_cast<float>(code * args_.factor - zero) * scale);
    }
}

std::string EmbeddingCase::name() const {
  char text[200];
  std::snprintf(text, sizeof(text),
                "embedding %s %s case %llu: count=%lld K=%lld N=%lld bits=%lld y_type=%d group=%lld scale_type=%d zero=%d "
                "factor=%d guard %s",
                entry_.variant, entry_.isa, static_cast<unsigned long long>(seed_), static_cast<long long>(args_.count),
                static_cast<long long>(args_.K), static_cast<long long>(args_.N), static_cast<long long>(args_.bits),
                static_cast<int>(args_.y_type), static_cast<long long>(args_.group), static_cast<int>(args_.scale_type),
                args_.zero, args_.factor, at_end_ ? "behind" : "before");
  return text;
}

std::string EmbeddingCase::check() {
  const int64_t cut = random_.between(0, args_.count);
  entry_.kernel(args_, cut, args_.count);
  entry_.kernel(args_, 0, cut);
  if (!memory().y.margins_intact()) return "wrote outside y";
  const std::vector<uint8_t> y(memory().y.data(), memory().y.data() + memory().y.size());
  memory().y.poison();
  {
    const OtherFloatControl control;
    if (embedding(entry_.kernel, args_) != -1) return "refuses an id in range";
    if (!control.intact()) return "embedding() changes the control register";
  }
  if (y != std::vector<uint8_t>(memory().y.data(), memory().y.data() + memory().y.size()))
    return "embedding() gives other bits than the kernel";
  // A cast to 16 bits rounds to nearest.
  const double unit = args_.y_type == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  const double tiny = args_.y_type == DType::kBFloat16 ? 0x1p-134 : 0x1p-25;
  for (size_t i = 0; i < expected_.size(); i++) {
    const double got = element(args_.y_type, args_.y, static_cast<int64_t>(i)), exact = expected_[i];
    const double bound = args_.y_type == DType::kFloat32 ? 0 : std::max(tiny, unit * std::fabs(exact));
    if (!(std::fabs(got - exact) <= bound))
      return "element " + std::to_string(i) + ": " + std::to_string(got) + ", expected " + std::to_string(exact);
  }
  return {};
}
