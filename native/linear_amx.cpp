// 512-bit vectors, and AMX.
#include "isa.h"
#if defined(OCTAVO_KNOWS_AMX)
#define OCTAVO_WIDTH 16
#define OCTAVO_INTEGERS Quads
#define OCTAVO_HAS_HALVES true
#define OCTAVO_AMX
#include "linear.h"
#include "target_avx512.h"
#include "bf16_amx.h"
#include "w8a8_amx.h"

const octavo::LinearKernels octavo::linears_amx = {
    pack_w8, run_w8a8_amx, take_inputs_amx, run_bf16_amx, find_layout_amx
};
#include "target_end.h"
#endif
