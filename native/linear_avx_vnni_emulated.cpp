// What AVX-VNNI's kernels do to int8, by AVX2's instructions: slow, and for tests on machines that lack
// the others.
#if defined(__x86_64__)
#define OCTAVO_WIDTH 8
#define OCTAVO_INTEGERS Quads
#include "linear.h"
#include "target_avx2.h"
#include "w8a8_kernel.h"

const octavo::LinearKernels octavo::linears_avx_vnni_emulated = {
    pack_w8, run_w8a8, nullptr, nullptr, find_layout
};
#include "target_end.h"
#endif
