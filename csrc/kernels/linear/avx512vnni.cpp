#define PYENGINE_ISA avx512vnni
#include "simd/avx512vnni.h"

#include "kernels/linear/generic.inc"
