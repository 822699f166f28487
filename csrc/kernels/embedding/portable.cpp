#define PYENGINE_ISA portable
#include "simd/portable.h"

#include "kernels/embedding/generic.inc"
