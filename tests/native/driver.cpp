// Random calls of the kernels of one instruction set, in memory between guard pages, against plain loops and the portable
// kernels. As a program:
//
//   driver --supported                      the instruction sets that cpu_features.cpp claims
//   driver ISA FIRST COUNT [VARIANT]        cases FIRST to FIRST + COUNT - 1, whether it claims ISA or not
//
// As a shared object it hands out the cases, so that tests/bochs.py can make the calls in an emulator.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu_features.h"
#include "embedding_case.h"
#include "linear_case.h"

const std::vector<LinearEntry> kLinear = {
#define PYENGINE_LINEAR(variant, isa) {#variant, #isa, &pyengine::linear_##variant##_##isa},
#include "kernels/linear/kernels.inc"
#undef PYENGINE_LINEAR
};

namespace {

LinearMemory& memory() {
  static LinearMemory all;
  return all;
}

// What runs, for the report of a crash.
std::string running;
struct sigaction before;

void on_crash(int) {
  [[maybe_unused]] const ssize_t written = write(2, running.data(), running.size());
  sigaction(SIGSEGV, &before, nullptr);  // the access is repeated, and meets who was there before
}

void announce(const std::string& name) { running = "crashed in " + name + "\n"; }

int run(const char* isa, uint64_t first, uint64_t count, const char* variant) {
  uint64_t cases = 0, failures = 0;
  const auto report = [&](const std::string& name, const std::string& wrong) {
    cases++;
    if (!wrong.empty() && failures++ < 10) std::printf("%s\n  %s\n", name.c_str(), wrong.c_str());
  };
  for (uint64_t seed = first; seed < first + count; seed++) {
    for (const LinearEntry& entry : kLinear) {
      if (std::strcmp(entry.isa, isa) || (*variant && std::strcmp(entry.variant, variant))) continue;
      LinearCase linear(entry, seed, memory());
      announce(linear.name());
      for (const Call& call : linear.calls()) call.phase(*call.args, call.begin, call.end);
      report(linear.name(), linear.check(true));
    }
    for (const EmbeddingEntry& entry : kEmbedding) {
      if (std::strcmp(entry.isa, isa) || (*variant && std::strcmp(entry.variant, variant))) continue;
      EmbeddingCase embedding(entry, seed);
      announce(embedding.name());
      report(embedding.name(), embedding.check());
    }
  }
  std::printf("%s: %llu cases, %llu failed\n", isa, static_cast<unsigned long long>(cases),
              static_cast<unsigned long long>(failures));
  return failures || !cases;
}

}  // namespace

extern "C" {

// The case, or null where there is no such kernel. One at a time: they share their memory.
LinearCase* linear_case(const char* isa, const char* variant, uint64_t seed) {
  for (const LinearEntry& entry : kLinear)
    if (!std::strcmp(entry.isa, isa) && !std::strcmp(entry.variant, variant))
      return new LinearCase(entry, seed, memory());
  return nullptr;
}
// Each returns how many there are, and writes at most `room` of them.
uint64_t linear_case_calls(const LinearCase* one, Call* to, uint64_t room) {
  const std::vector<Call>& calls = one->calls();
  if (calls.size() <= room) std::copy(calls.begin(), calls.end(), to);
  return calls.size();
}
uint64_t linear_case_memory(const LinearCase* one, Range* to, uint64_t room) {
  const std::vector<Range> ranges = one->memory();
  if (ranges.size() <= room) std::copy(ranges.begin(), ranges.end(), to);
  return ranges.size();
}
// What is wrong after the calls, empty if nothing; frees the case.
void linear_case_finish(LinearCase* one, char* text, uint64_t room) {
  const std::unique_ptr<LinearCase> owned(one);
  const std::string wrong = one->check(false);
  std::snprintf(text, room, "%s%s%s", wrong.empty() ? "" : one->name().c_str(), wrong.empty() ? "" : "\n  ",
                wrong.c_str());
}
}

int main(int argc, char** argv) {
  if (argc == 2 && !std::strcmp(argv[1], "--supported")) {
    for (const char* isa : {PYENGINE_ISAS})
      if (pyengine::isa_supported(isa)) std::puts(isa);
    return 0;
  }
  if (argc != 4 && argc != 5) {
    std::fprintf(stderr, "driver --supported | driver ISA FIRST COUNT [VARIANT]\n");
    return 2;
  }
  struct sigaction action {};
  action.sa_handler = on_crash;
  sigaction(SIGSEGV, &action, &before);
  return run(argv[1], std::strtoull(argv[2], nullptr, 10), std::strtoull(argv[3], nullptr, 10), argc == 5 ? argv[4] : "");
}
