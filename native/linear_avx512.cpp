// 512-bit vectors.
#if defined(__x86_64__)
#define OCTAVO_WIDTH 16
#define OCTAVO_INTEGERS Quads
#define OCTAVO_HAS_HALVES has_bf16_products()
#include "isa.h"
#include "linear.h"
#include "target_avx512.h"
#include "bf16_kernel.h"
#include "w8a8_kernel.h"

const octavo::LinearKernels octavo::linears_avx512 = {
    pack_w8, run_w8a8, take_inputs, run_bf16, find_layout
};
#include "target_end.h"
#endif
