#define PYENGINE_ISA neondot
#include "simd/neondot.h"

#include "kernels/linear/generic.inc"
