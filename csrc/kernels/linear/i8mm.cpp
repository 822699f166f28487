// int8 weights with int8 activations by smmla; all else on a processor that has it is served by neondot. Of generic.inc
// this takes the parts: the kernels that it defines under a name that kernels.inc does not have stay in this file and
// are dropped.
#define PYENGINE_ISA unlisted
#include "simd/neondot.h"

#include "kernels/linear/generic.inc"
#include "kernels/linear/int8_a8_octets.inc"
