// 128-bit vectors, and products of bytes, alone: see `without_bytes`.
#if defined(__aarch64__)
#define OCTAVO_WIDTH 4
#define OCTAVO_INTEGERS SignedQuads
#include "linear.h"
#include "target_dotprod.h"
#include "w8a8_kernel.h"

const octavo::LinearKernels octavo::linears_dotprod = {
    pack_w8, run_w8a8, nullptr, nullptr, find_layout
};
#include "target_end.h"
#endif
