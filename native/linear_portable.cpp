// 128-bit vectors: SSE2 on x86-64, NEON on arm64.
#define OCTAVO_WIDTH 4
#define OCTAVO_INTEGERS Pairs
#define OCTAVO_HAS_HALVES false
#include "bf16_kernel.h"
#include "w8a8_kernel.h"

const octavo::LinearKernels octavo::linears_portable = {
    pack_w8, run_w8a8, take_inputs, run_bf16, find_layout
};
