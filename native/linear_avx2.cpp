// 256-bit vectors.
#if defined(__x86_64__)
#include <immintrin.h>

#define OCTAVO_WIDTH 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "bf16_kernel.h"
#include "quantize_kernel.h"
#include "w8a8_kernel.h"

const octavo::LinearKernels octavo::linears_avx2 = {run_w8a8, run_bf16, run_quantize};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
