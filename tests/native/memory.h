// Memory between pages that nobody may touch, and random numbers that depend on a seed alone.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// One allocation for the life of the process: an access before or behind it kills the process.
class Guarded {
 public:
  explicit Guarded(size_t reserve) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), reserve_(reserve) {
    void* memory = mmap(nullptr, reserve + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    begin_ = static_cast<uint8_t*>(memory) + page_;
    if (mprotect(begin_, reserve, PROT_READ | PROT_WRITE)) std::abort();
  }

  // `bytes` bytes, poisoned, that end at the page behind, or as close as the alignment allows; or begin at the page
  // before. On the other side lies a margin that must stay as it is.
  uint8_t* take(size_t bytes, bool at_end, size_t alignment = 1) {
    if (bytes + kMargin + alignment > reserve_) {
      std::fprintf(stderr, "a buffer of %zu bytes does not fit its reserve\n", bytes);
      std::abort();
    }
    at_ = at_end ? begin_ + (reserve_ - bytes) / alignment * alignment : begin_;
    bytes_ = bytes;
    std::memset(low(), kPoison, static_cast<size_t>(high() - low()));
    return at_;
  }
  void poison() { std::memset(at_, kPoison, bytes_); }
  bool margins_intact() const {
    for (const uint8_t* p = low(); p < high(); p++)
      if ((p < at_ || p >= at_ + bytes_) && *p != kPoison) return false;
    return true;
  }
  uint8_t* data() const { return at_; }
  size_t size() const { return bytes_; }

 private:
  static constexpr size_t kMargin = 256;
  static constexpr uint8_t kPoison = 0xb7;
  uint8_t* low() const { return at_ - begin_ < static_cast<int64_t>(kMargin) ? begin_ : at_ - kMargin; }
  uint8_t* high() const {
    uint8_t *end = at_ + bytes_, *last = begin_ + reserve_;
    return last - end < static_cast<int64_t>(kMargin) ? last : end + kMargin;
  }

  size_t page_, reserve_, bytes_ = 0;
  uint8_t *begin_, *at_ = nullptr;
};

// splitmix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t between(int64_t low, int64_t high) {  // both included
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  bool once_in(int64_t n) { return between(1, n) == 1; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  // Bell-shaped, variance 1.
  double normal() {
    double sum = 0;
    for (int i = 0; i < 6; i++) sum += uniform() - 0.5;
    return sum * 1.41421356;
  }
  template <class T, size_t n>
  T pick(const T (&of)[n]) {
    return of[bits() % n];
  }

 private:
  uint64_t state_;
};
