#define PYENGINE_ISA avxvnni
#include "simd/avxvnni.h"

#include "kernels/linear/generic.inc"
