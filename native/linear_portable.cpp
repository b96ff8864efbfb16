// 128-bit vectors: SSE2 on x86-64, NEON on arm64.
#define OCTAVO_WIDTH 4
#include "bf16_kernel.h"
#include "quantize_kernel.h"
#include "w8a8_kernel.h"

const octavo::LinearKernels octavo::linears_portable = {run_w8a8, run_bf16, run_quantize};
