// 256-bit vectors, and products of bytes, alone: see `without_bytes`.
#include "isa.h"
#if defined(OCTAVO_KNOWS_AVX_VNNI)
#define OCTAVO_WIDTH 8
#define OCTAVO_INTEGERS Quads
#include "linear.h"
#include "target_avx_vnni.h"
#include "w8a8_kernel.h"

const octavo::LinearKernels octavo::linears_avx_vnni = {
    pack_w8, run_w8a8, nullptr, nullptr, find_layout
};
#include "target_end.h"
#endif
