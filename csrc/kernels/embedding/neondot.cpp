#define PYENGINE_ISA neondot
#include "simd/neondot.h"

#include "kernels/embedding/generic.inc"
