// 256-bit vectors.
#if defined(__x86_64__)
#define OCTAVO_KERNEL attention_avx2
#define OCTAVO_WIDTH 8
#define OCTAVO_INTEGERS Pairs
#include "attention.h"
#include "target_avx2.h"
#include "attention_kernel.h"
#include "target_end.h"
#endif
