// AMX multiplies the signed bytes of int8_a8 in tiles. All else here is AVX-VNNI, which such processors have as well; the
// other kernels run better with AVX-512.
#include "simd/avxvnni.h"

#include "kernels/linear/epilogue.inc"
#include "kernels/linear/quantize.inc"
#include "kernels/linear/signed_rows.inc"
#include "kernels/linear/tiles.inc"
#include "kernels/linear/int8_a8.inc"
#include "kernels/linear/amx.inc"

namespace pyengine {
const LinearKernel linear_int8_a8_amx = {signed_workspace_bytes<int8_t>, signed_rows<int8_t>, amx_panels};
}
