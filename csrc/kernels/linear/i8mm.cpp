// int8_a8 by smmla. Rows are those of neondot, whose kernels serve all else on a processor that has it.
#include "simd/neondot.h"

#include "kernels/linear/epilogue.inc"
#include "kernels/linear/quantize.inc"
#include "kernels/linear/tiles.inc"
#include "kernels/linear/int8_a8.inc"
#include "kernels/linear/octets.inc"

namespace pyengine {
const LinearKernel linear_int8_a8_i8mm = {a8_workspace_bytes, a8_rows, octets_panels};
}
