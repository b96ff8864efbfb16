// 256-bit vectors.
#if defined(__x86_64__)
#define OCTAVO_KERNEL append_avx2
#define OCTAVO_WIDTH 8
#include "append.h"
#include "target_avx2.h"
#include "append_kernel.h"
#include "target_end.h"
#endif
