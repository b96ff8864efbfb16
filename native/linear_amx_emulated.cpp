// What AMX's kernels do to int8 and bf16, by AVX2's instructions: slow, and for tests on machines that lack
// the others.
#if defined(__x86_64__)
#define OCTAVO_WIDTH 16
#define OCTAVO_INTEGERS Quads
#define OCTAVO_HAS_HALVES true
#define OCTAVO_AMX
#include "linear.h"
#include "target_avx2.h"
#include "bf16_amx.h"
#include "w8a8_amx.h"

const octavo::LinearKernels octavo::linears_amx_emulated = {
    pack_w8, run_w8a8_amx, take_inputs_amx, run_bf16_amx, find_layout_amx
};
#include "target_end.h"
#endif
