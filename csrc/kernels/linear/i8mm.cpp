// int8_a8 by smmla. Rows are those of neondot, whose kernels serve all else on a processor that has it.
#include "simd/neondot.h"

#include "kernels/linear/epilogue.inc"
#include "kernels/linear/quantize.inc"
#include "kernels/linear/signed_rows.inc"
#include "kernels/linear/tiles.inc"
#include "kernels/linear/octets.inc"

namespace pyengine {
const LinearKernel linear_int8_a8_i8mm = {signed_workspace_bytes<int8_t>, signed_rows<int8_t>, octets_panels};
}
