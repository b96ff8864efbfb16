// 256-bit vectors.
#if defined(__x86_64__)
#define OCTAVO_WIDTH 8
#define OCTAVO_INTEGERS Pairs
#define OCTAVO_HAS_HALVES false
#include "linear.h"
#include "target_avx2.h"
#include "bf16_kernel.h"
#include "w8a8_kernel.h"

const octavo::LinearKernels octavo::linears_avx2 = {
    pack_w8, run_w8a8, take_inputs, run_bf16, find_layout
};
#include "target_end.h"
#endif
