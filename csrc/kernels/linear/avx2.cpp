#define PYENGINE_ISA avx2
#define PYENGINE_NO_BYTE_DOT
#include "simd/avx2.h"

#include "kernels/linear/generic.inc"
