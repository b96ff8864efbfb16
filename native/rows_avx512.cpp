// 512-bit vectors.
#if defined(__x86_64__)
#define OCTAVO_KERNEL rows_avx512
#define OCTAVO_WIDTH 16
#include "rows.h"
#include "target_avx512.h"
#include "rows_kernel.h"
#include "target_end.h"
#endif
