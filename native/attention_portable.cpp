// 128-bit vectors: SSE2 on x86-64, NEON on arm64.
#define OCTAVO_KERNEL attention_portable
#define OCTAVO_WIDTH 4
#define OCTAVO_INTEGERS Pairs
#include "attention_kernel.h"
