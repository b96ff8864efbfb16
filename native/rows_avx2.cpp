// 256-bit vectors.
#if defined(__x86_64__)
#define OCTAVO_KERNEL rows_avx2
#define OCTAVO_WIDTH 8
#include "rows.h"
#include "target_avx2.h"
#include "rows_kernel.h"
#include "target_end.h"
#endif
