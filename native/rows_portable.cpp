// 128-bit vectors: SSE2 on x86-64, NEON on arm64.
#define OCTAVO_KERNEL rows_portable
#define OCTAVO_WIDTH 4
#include "rows_kernel.h"
