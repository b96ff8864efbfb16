// What AVX-512's kernels do to int8 and bf16, by AVX2's instructions: slow, and for tests on machines
// that lack the others.
#if defined(__x86_64__)
#define OCTAVO_WIDTH 16
#define OCTAVO_INTEGERS Quads
#define OCTAVO_HAS_HALVES true
#include "linear.h"
#include "target_avx2.h"
#include "bf16_kernel.h"
#include "w8a8_kernel.h"

const octavo::LinearKernels octavo::linears_avx512_emulated = {
    pack_w8, run_w8a8, take_inputs, run_bf16, find_layout
};
#include "target_end.h"
#endif
