// What this processor and its operating system can run.
#pragma once

namespace pyengine {

// True if the instruction set that a kernel file names (csrc/kernels/*/<isa>.cpp) can run here.
bool isa_supported(const char* isa);

}  // namespace pyengine
