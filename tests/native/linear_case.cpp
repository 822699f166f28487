#include "linear_case.h"

#include <algorithm>
#include <cstring>

#include "float_control.h"
#include "kernels/linear/nibbles.h"
#include "kernels/linear/octets.h"
#include "kernels/linear/panels.h"
#include "values.h"

using namespace pyengine;

namespace {

constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

std::vector<int64_t> split(Random& random, int64_t count) {
  std::vector<int64_t> points{0, count};
  for (int64_t cuts = random.between(0, 3); cuts > 0; cuts--) points.push_back(random.between(0, count));
  std::sort(points.begin(), points.end());
  return points;
}

}  // namespace

LinearCase::LinearCase(const LinearEntry& entry, uint64_t seed, LinearMemory& memory)
    : entry_(entry), seed_(seed), memory_(memory), random_(seed) {
  const std::string variant = entry.variant;
  panels_ = variant.rfind("int8", 0) == 0;
  if (variant.find("_a") != std::string::npos) activation_bits_ = std::stoi(variant.substr(variant.find("_a") + 2));
  at_end_ = !random_.once_in(4);
  choose_shape();
  make_x();
  codes_.resize(static_cast<size_t>(args_.N * args_.K));
  weight_.resize(codes_.size());
  size_.resize(codes_.size());
  panels_ ? make_panels() : make_nibbles();
  make_calls();
}

std::string LinearCase::name() const {
  char text[256];
  std::snprintf(text, sizeof(text),
                "linear %s %s case %llu: M=%lld K=%lld N=%lld x_type=%d y_type=%d activation=%d bias=%d group=%lld "
                "scale_type=%d zero=%d guard %s",
                entry_.variant, entry_.isa, static_cast<unsigned long long>(seed_), static_cast<long long>(args_.M),
                static_cast<long long>(args_.K), static_cast<long long>(args_.N), static_cast<int>(args_.x_type),
                static_cast<int>(args_.y_type), static_cast<int>(args_.activation), args_.bias != nullptr,
                static_cast<long long>(args_.group), static_cast<int>(args_.scale_type), args_.zero,
                at_end_ ? "behind" : "before");
  return text;
}

// ---- arguments -----------------------------------------------------------------------------------------------------

void LinearCase::choose_shape() {
  args_.M = random_.once_in(3) ? random_.between(9, 40) : random_.between(0, 8);
  args_.K = random_.once_in(3) ? random_.between(0, 600) : random_.between(1, 80);
  args_.N = random_.once_in(20) ? random_.between(0, 1) : random_.between(1, 100);
  if (random_.once_in(25)) {  // blocks of rows
    args_.M = random_.between(kLinearRowBlock - 6, 2 * kLinearRowBlock + 6);
    args_.K = random_.between(1, 40);
  } else if (random_.once_in(25)) {
    args_.K = random_.between(600, 3000);
  } else if (activation_bits_ == 8 && random_.once_in(100)) {  // more than one int32 holds
    args_.M = random_.between(1, 2);
    args_.N = random_.between(1, 17);
    args_.K = (1 << 17) + random_.between(1, 200);
  }
  const DType codes = activation_bits_ == 8 ? DType::kInt8 : DType::kInt16;
  args_.x_type = activation_bits_ && random_.once_in(2) ? codes : random_.pick(kFloats);
  args_.y_type = random_.pick(kFloats);
  args_.activation = static_cast<Activation>(random_.once_in(2) ? 0 : random_.between(1, 3));

  args_.group = std::max<int64_t>(1, args_.K);
  args_.scale_type = DType::kFloat32;
  if (!panels_) {
    constexpr int64_t kGroups[] = {8, 16, 24, 32, 40, 64, 128, 256};
    args_.zero = random_.pick({kZerosUint8, kZerosFloat32, 8, 0, 3});
    args_.scale_type = random_.pick({DType::kFloat32, DType::kFloat16});
    // Zero points that are not whole need sums of a group that float32 holds.
    if (args_.zero == kZerosFloat32 || random_.once_in(2))
      args_.group = kGroups[random_.between(0, args_.zero == kZerosFloat32 && activation_bits_ == 16 ? 3 : 7)];
  }
  const int64_t span = activation_bits_ == 8 ? 1 << 17 : 512;
  if (activation_bits_ && args_.zero != kZerosFloat32 && args_.K <= span && random_.once_in(2))
    args_.y_type = DType::kInt32;

  if (random_.once_in(2)) {
    auto* bias = reinterpret_cast<float*>(memory_.bias.take(static_cast<size_t>(args_.N) * 4, at_end_));
    for (int64_t n = 0; n < args_.N; n++) bias[n] = static_cast<float>(random_.normal());
    args_.bias = bias;
  }
}

// Rows of all kinds, and what the row quantizer of csrc/kernels/linear/quantize.inc makes of them, in plain arithmetic.
void LinearCase::make_x() {
  const int64_t M = args_.M, K = args_.K;
  uint8_t* x = memory_.x.take(static_cast<size_t>(M * K * element_size(args_.x_type)), at_end_);
  args_.x = x;
  const float top = activation_bits_ == 16 ? 32767.0f : 127.0f;
  const bool codes = !is_float(args_.x_type);
  q_.assign(static_cast<size_t>(M * K), 0);
  x_.resize(q_.size());
  for (int64_t m = 0; m < M; m++) {
    const int64_t kind = random_.between(0, 9);
    const double size = codes                                ? top / 2
                        : kind == 1                          ? 1e-40
                        : kind != 2                          ? 1
                        : args_.x_type == DType::kFloat16    ? std::pow(10, random_.between(-6, 4))
                                                             : std::pow(10, random_.between(-37, 30));
    for (int64_t k = 0; k < K; k++) {
      double value = random_.normal() * size;
      if (kind == 3) value = std::fabs(value);
      if (kind == 4) value = 0;
      if (kind == 5) value = random_.once_in(2) ? top : -top;
      if (kind == 6) value = top;
      if (codes) value = kind == 2 ? -top : std::nearbyint(std::max(-double{top}, std::min(double{top}, value)));
      set_element(args_.x_type, x, m * K + k, value);
    }
    if (!codes && kind == 7 && K)
      set_element(args_.x_type, x, m * K + random_.between(0, K - 1), random_.pick({NAN, INFINITY, -INFINITY}));
    if (!codes && kind == 8 && K) set_element(args_.x_type, x, m * K + random_.between(0, K - 1), 3e4);

    float largest = 0;
    bool finite = true;
    for (int64_t k = 0; k < K; k++) {
      const float magnitude = static_cast<float>(std::fabs(element(args_.x_type, x, m * K + k)));
      finite = finite && std::isfinite(magnitude);
      largest = std::max(largest, magnitude);
    }
    const float factor = codes ? 1.0f : top / largest;
    const bool usable = finite && std::isfinite(factor);
    const double scale = codes ? 1.0 : usable ? largest / top : finite ? 0.0 : NAN;
    for (int64_t k = 0; k < K; k++) {
      const size_t at = static_cast<size_t>(m * K + k);
      const double value = element(args_.x_type, x, m * K + k);
      if (activation_bits_ && usable) q_[at] = static_cast<int32_t>(std::nearbyint(static_cast<float>(value) * factor));
      x_[at] = activation_bits_ ? q_[at] * scale : value;
    }
  }
}

void LinearCase::set_weight(int64_t n, int64_t k, int32_t code, double value, double size) {
  codes_[static_cast<size_t>(n * args_.K + k)] = code;
  weight_[static_cast<size_t>(n * args_.K + k)] = value;
  size_[static_cast<size_t>(n * args_.K + k)] = size;
}

void LinearCase::make_panels() {
  const int64_t N = args_.N, K = args_.K;
  std::vector<uint8_t> qdata(static_cast<size_t>(N * K));
  std::vector<float> scale(static_cast<size_t>(N) + 1);  // memcpy wants an address even of nothing
  const int64_t kind = random_.between(0, 5);
  for (int64_t n = 0; n < N; n++) {
    scale[static_cast<size_t>(n)] = random_.once_in(10) ? 0.0f : static_cast<float>((0.5 + random_.uniform()) / 128);
    for (int64_t k = 0; k < K; k++) {
      const bool negative = random_.once_in(2);
      const int size = k / 16 % 2 ? 127 : static_cast<int>(k % 5);  // limits of panels.h that differ along K
      const int code = kind == 0   ? -128
                       : kind == 1 ? (negative ? -127 : 127)
                       : kind == 2 ? (negative ? -size : size)
                       : kind == 3 ? static_cast<int>(random_.between(-63, 63))
                                   : static_cast<int>(random_.between(-128, 127));
      qdata[static_cast<size_t>(n * K + k)] = static_cast<uint8_t>(code + 128);
      const double value = code * double{scale[static_cast<size_t>(n)]};
      set_weight(n, k, code, value, std::fabs(value));
    }
  }
  panels_layout_.resize(static_cast<size_t>(Panels(N, K).bytes));
  pack_panels(qdata.data(), scale.data(), N, K, panels_layout_.data());
  const bool octets = std::strcmp(entry_.isa, "i8mm") == 0;
  uint8_t* layout = memory_.layout.take(octets ? static_cast<size_t>(Octets(N, K).bytes) : panels_layout_.size(), at_end_);
  octets ? pack_octets(qdata.data(), scale.data(), N, K, layout) : pack_panels(qdata.data(), scale.data(), N, K, layout);
  args_.layout = layout;
}

void LinearCase::make_nibbles() {
  const int64_t N = args_.N, K = args_.K;
  const int bits = static_cast<int>(random_.between(1, 4)), shift = bits == 1 && random_.once_in(2);
  const int64_t row_bytes = (K * bits + 7) / 8;
  const DType zero_type = args_.zero == kZerosFloat32 ? DType::kFloat32 : DType::kInt8;
  const Nibbles parts(N, K, args_.group, element_size(args_.scale_type), args_.zero < 0 ? element_size(zero_type) : 0);
  uint8_t* layout = memory_.layout.take(static_cast<size_t>(parts.bytes), at_end_);
  std::memset(layout, 0, static_cast<size_t>(parts.bytes));
  args_.layout = layout;

  std::vector<uint8_t> qdata(static_cast<size_t>(N * row_bytes));
  const int64_t kind = random_.between(0, 5);
  for (uint8_t& byte : qdata) byte = kind == 0 ? 0xff : kind == 1 ? 0 : static_cast<uint8_t>(random_.bits());
  pack_nibbles(qdata.data(), N, K, bits, shift, layout + parts.codes);

  for (int64_t n = 0; n < N; n++)
    for (int64_t group = 0; group < parts.groups; group++) {
      const int64_t at = (n / kPanel * parts.groups + group) * kPanel + n % kPanel;
      double zero = args_.zero;
      set_element(args_.scale_type, layout, at, random_.once_in(10) ? 0 : (0.5 + random_.uniform()) / 8);
      if (args_.zero == kZerosUint8) zero = static_cast<double>(random_.between(0, 15));
      if (args_.zero == kZerosFloat32) zero = random_.uniform() * 15;
      if (args_.zero < 0) set_element(zero_type, layout + parts.zero, at, zero);
      if (args_.zero == kZerosFloat32) zero = element(zero_type, layout + parts.zero, at);
      const double scale = element(args_.scale_type, layout, at);
      for (int64_t k = group * args_.group; k < std::min(K, (group + 1) * args_.group); k++) {
        int code = 0;
        for (int bit = 0; bit < bits; bit++) {
          const int64_t place = k * bits + bit;
          code |= (qdata[static_cast<size_t>(n * row_bytes + place / 8)] >> (place % 8) & 1) << bit;
        }
        code <<= shift;
        set_weight(n, k, code - static_cast<int>(zero), scale * (code - zero), scale * (code + zero));
      }
    }
}

void LinearCase::make_calls() {
  args_.y = memory_.y.take(static_cast<size_t>(args_.M * args_.N * element_size(args_.y_type)), at_end_);
  args_.workspace =
      memory_.workspace.take(static_cast<size_t>(linear_workspace_bytes(*entry_.kernel, args_)), at_end_, 64);
  for (int64_t m = 0; m < args_.M; m += kLinearRowBlock) {
    LinearArgs block = args_;
    block.M = std::min(kLinearRowBlock, args_.M - m);
    block.x = static_cast<const uint8_t*>(args_.x) + m * args_.K * element_size(args_.x_type);
    block.y = static_cast<uint8_t*>(args_.y) + m * args_.N * element_size(args_.y_type);
    blocks_.push_back(block);
  }
  for (const LinearArgs& block : blocks_)
    for (const bool second : {false, true}) {
      const auto points = split(random_, second ? (args_.N + kPanel - 1) / kPanel : block.M);
      std::vector<Call> phase;
      for (size_t i = 0; i + 1 < points.size(); i++)
        if (points[i] < points[i + 1])
          phase.push_back({second ? entry_.kernel->panels : entry_.kernel->rows, &block, points[i], points[i + 1]});
      if (random_.once_in(2)) std::reverse(phase.begin(), phase.end());
      calls_.insert(calls_.end(), phase.begin(), phase.end());
    }
}

std::vector<Range> LinearCase::memory() const {
  std::vector<Range> ranges{{blocks_.data(), blocks_.size() * sizeof(LinearArgs)}};
  for (const Guarded* part : {&memory_.x, &memory_.layout, &memory_.y, &memory_.workspace})
    ranges.push_back({part->data(), part->size()});
  if (args_.bias) ranges.push_back({memory_.bias.data(), memory_.bias.size()});
  return ranges;
}

// ---- results -------------------------------------------------------------------------------------------------------

std::string LinearCase::check(bool native) {
  if (!memory_.y.margins_intact() || !memory_.workspace.margins_intact()) return "wrote outside y or the workspace";
  const std::string wrong = args_.y_type == DType::kInt32 ? compare_sums() : std::string();
  if (!wrong.empty()) return wrong;

  const std::vector<uint8_t> y(memory_.y.data(), memory_.y.data() + memory_.y.size());
  if (native) {
    memory_.y.poison();
    memory_.workspace.poison();
    const OtherFloatControl control;
    linear(*entry_.kernel, args_);
    if (!control.intact()) return "linear() changes the control register";
    if (y != std::vector<uint8_t>(memory_.y.data(), memory_.y.data() + memory_.y.size()))
      return "linear() gives other bits than the calls";
  }
  if (args_.y_type == DType::kInt32) return {};

  for (const LinearEntry& portable : kLinear)
    if (std::strcmp(portable.variant, entry_.variant) == 0 && std::strcmp(portable.isa, "portable") == 0) {
      memory_.y.poison();
      LinearArgs args = args_;
      if (panels_) args.layout = panels_layout_.data();
      args.workspace =
          memory_.workspace.take(static_cast<size_t>(linear_workspace_bytes(*portable.kernel, args)), at_end_, 64);
      linear(*portable.kernel, args);
      const std::vector<uint8_t> expected(memory_.y.data(), memory_.y.data() + memory_.y.size());
      std::copy(y.begin(), y.end(), memory_.y.data());
      return compare_floats(expected.data());
    }
  return "has no portable kernel beside it";
}

std::string LinearCase::compare_sums() const {
  for (int64_t m = 0; m < args_.M; m++)
    for (int64_t n = 0; n < args_.N; n++) {
      int64_t sum = 0;
      for (int64_t k = 0; k < args_.K; k++)
        sum += int64_t{q_[static_cast<size_t>(m * args_.K + k)]} * codes_[static_cast<size_t>(n * args_.K + k)];
      const double got = element(DType::kInt32, args_.y, m * args_.N + n);
      if (got != static_cast<double>(sum))
        return "row " + std::to_string(m) + ", column " + std::to_string(n) + ": sum " + std::to_string(got) +
               ", expected " + std::to_string(sum);
    }
  return {};
}

std::string LinearCase::compare_floats(const uint8_t* expected) const {
  for (int64_t m = 0; m < args_.M; m++)
    for (int64_t n = 0; n < args_.N; n++) {
      const double got = element(args_.y_type, args_.y, m * args_.N + n);
      const double portable = element(args_.y_type, expected, m * args_.N + n);
      if (!close(m, n, got, portable)) {
        char text[128];
        std::snprintf(text, sizeof(text), "row %lld, column %lld: %.9g, portable gives %.9g",
                      static_cast<long long>(m), static_cast<long long>(n), got, portable);
        return text;
      }
    }
  return {};
}

// Kernels of int8 codes take the same steps after an exact sum: without gelu or silu, to the bit. Those of nibbles may
// fuse one multiply and add per segment, float kernels one per k: each step then differs by a rounding of at most
// 2^-24 of the sum of magnitudes. gelu and silu fuse too, and are no steeper than 1.13.
bool LinearCase::close(int64_t m, int64_t n, double got, double expected) const {
  if (got == expected || (got != got && expected != expected)) return true;
  const bool smooth = args_.activation == Activation::kGelu || args_.activation == Activation::kSilu;
  if (got != got || expected != expected || (panels_ && activation_bits_ && !smooth)) return false;
  double size = 0, sum = args_.bias ? args_.bias[n] : 0.0;
  for (int64_t k = 0; k < args_.K; k++) {
    const double x = x_[static_cast<size_t>(m * args_.K + k)];
    size += std::fabs(x) * size_[static_cast<size_t>(n * args_.K + k)];
    sum += x * weight_[static_cast<size_t>(n * args_.K + k)];
  }
  const int64_t segments = (args_.K + args_.group - 1) / args_.group + args_.K / 512;
  const double steps = static_cast<double>(!activation_bits_ ? 2 * args_.K + 4 : panels_ ? 0 : 2 * segments + 4);
  const double unit = args_.y_type == DType::kFloat32 ? 0x1p-23 : args_.y_type == DType::kBFloat16 ? 0x1p-7 : 0x1p-10;
  const double tiny = args_.y_type == DType::kFloat32 ? 0 : args_.y_type == DType::kBFloat16 ? 0x1p-132 : 0x1p-23;
  const double largest = args_.y_type == DType::kFloat16 ? 65504 : args_.y_type == DType::kBFloat16 ? 3.38e38 : 3.4e38;
  const double bound = 1.13 * (steps * 0x1p-24 * size + static_cast<double>(2 * args_.K + 8) * 0x1p-149) +
                       (smooth ? 2e-6 * std::fabs(sum) : 0) + unit * std::fabs(expected) + tiny;
  if (std::isinf(got) || std::isinf(expected))
    return std::signbit(got) == std::signbit(expected) && std::min(std::fabs(got), std::fabs(expected)) + bound > largest;
  return std::fabs(got - expected) <= bound;
}
